"""Which cgroups this host has, from the mounts that this process sees."""

import os
from dataclasses import dataclass
from typing import Final

from runtime.cgroup.interface import Cgroups
from runtime.cgroup.systemd import Systemd
from runtime.cgroup.v1 import V1, Hierarchy
from runtime.cgroup.v2 import V2
from runtime.errors import InvalidSpec, Unavailable

_V1_CONTROLLERS: Final = frozenset(
    "cpu cpuacct cpuset memory devices freezer blkio pids hugetlb net_cls net_prio perf_event rdma misc debug".split()
)
DRIVERS: Final = ("auto", "cgroupfs", "systemd")
_SYSTEMD: Final = "/run/systemd/system"  # there where systemd is the init system: sd_booted(3)


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """A line of mountinfo that is about cgroups. `options` are those of the superblock."""

    point: str
    fstype: str
    options: tuple[str, ...]


def detect(root: str = "/sys/fs/cgroup", driver: str = "auto") -> Cgroups:
    """The backend for the hierarchies mounted at `root`: v2 where it is cgroup2 itself, otherwise v1 below it.

    A cgroup2 hierarchy beside v1 ones (`unified`) isn't used. "auto" is systemd on v2 where that is the init system,
    else cgroupfs. Raises Unavailable where nothing is mounted or systemd doesn't run, InvalidSpec for an unknown driver
    and for systemd on v1.
    """
    if driver not in DRIVERS:
        raise InvalidSpec(f"cgroup driver {driver!r}: not one of {', '.join(DRIVERS)}")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = cgroup_mounts(file.read())
    root = os.path.realpath(root)
    if any(mount.point == root and mount.fstype == "cgroup2" for mount in mounts):
        booted = os.path.isdir(_SYSTEMD)
        if driver == "systemd" and not booted:
            raise Unavailable("cgroup driver systemd: systemd is not this host's init system")
        return Systemd(root) if booted and driver != "cgroupfs" else V2(root)
    if driver == "systemd":
        raise InvalidSpec("cgroup driver systemd: this host has cgroup v1")
    found = hierarchies(mounts, root)
    if not found:
        raise Unavailable(f"no cgroup hierarchy is mounted at {root}")
    return V1(root, found)


def cgroup_mounts(mountinfo: str) -> tuple[CgroupMount, ...]:
    """The cgroup mounts of a mountinfo file, without those that a later mount at the same place hides."""
    found: dict[str, CgroupMount] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (fstype, *rest) = before.split(), after.split()
        point = _unescaped(fields[4])
        found.pop(point, None)
        if fstype in ("cgroup", "cgroup2"):
            found[point] = CgroupMount(point, fstype, tuple(rest[-1].split(",")))
    return tuple(found.values())


def hierarchies(mounts: tuple[CgroupMount, ...], root: str) -> tuple[Hierarchy, ...]:
    """The v1 hierarchies mounted directly below `root`; each once, wherever else it is mounted as well."""
    found: dict[tuple[str, ...], Hierarchy] = {}
    for mount in mounts:
        if mount.fstype != "cgroup" or os.path.dirname(mount.point) != root:
            continue
        controllers = tuple(option for option in mount.options if option in _V1_CONTROLLERS)
        name = next((option.removeprefix("name=") for option in mount.options if option.startswith("name=")), "")
        if controllers or name:
            found.setdefault((*controllers, name), Hierarchy(mount.point, controllers, name))
    return tuple(found.values())


def _unescaped(field: str) -> str:
    """A field of mountinfo: blanks and backslashes are written in octal (proc(5))."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(octal, character)
    return field

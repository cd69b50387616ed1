"""Whether the sources of a container's mounts can propagate as asked, by the text of /proc/self/mountinfo."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cri.translate.field import show
from runtime.errors import InvalidSpec
from runtime.spec import Mount


@dataclass(frozen=True, slots=True)
class _HostMount:
    point: str
    shared: bool
    slave: bool


def wanted(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """The mounts that depend on their source's propagation; for the others mountinfo need not be read."""
    return tuple(mount for mount in mounts if {"rshared", "rslave"} & set(mount.options) and mount.type == "bind")


def check(mounts: Iterable[Mount], mountinfo: str, resolve: Callable[[str], str]) -> None:
    """Refuses Bidirectional from a mount that is not shared, HostToContainer from one neither shared nor a slave.

    The kernel gives no error for either: the container would just never see the host's mounts, or the host the
    container's. `resolve` gives a source's path without symlinks; a source below no mount of `mountinfo` is refused.
    """
    points = {mount.point: mount for mount in map(_parse, mountinfo.splitlines())}  # the last one on a point is on top
    for mount in wanted(mounts):
        source = resolve(mount.source)
        below = next((points[parent] for parent in _parents(source) if parent in points), None)
        where = f"mounts {show(mount.destination)}: host_path {show(mount.source)}"
        if below is None:
            raise InvalidSpec(f"{where}: on no mount of this host")
        if "rshared" in mount.options and not below.shared:
            raise InvalidSpec(f"{where}: PROPAGATION_BIDIRECTIONAL needs a shared mount, {show(below.point)} is not")
        if "rslave" in mount.options and not (below.shared or below.slave):
            raise InvalidSpec(
                f"{where}: PROPAGATION_HOST_TO_CONTAINER needs a shared or slave mount, {show(below.point)} is neither"
            )


def _parents(path: str) -> Iterable[str]:
    while path != "/":
        yield path
        path = path.rpartition("/")[0] or "/"
    yield "/"


def _parse(line: str) -> _HostMount:
    """A line of mountinfo: see proc_pid_mountinfo(5). Blanks and backslashes in paths are octal escapes."""
    fields = line.split(" ")
    optional = fields[6 : fields.index("-", 6)]
    point = (
        fields[4]
        .encode("utf-8", "surrogateescape")
        .decode("unicode_escape")
        .encode("latin-1")
        .decode("utf-8", "surrogateescape")
    )
    return _HostMount(
        point=point,
        shared=any(tag.startswith("shared:") for tag in optional),
        slave=any(tag.startswith("master:") for tag in optional),
    )

"""The mounts and devices of a container as steps: what a spec's mounts become, by the kinds of mounts there are."""

import os.path
from dataclasses import dataclass, field
from typing import Final

from runtime.cgroup import Cgroups
from runtime.cgroup import Mount as CgroupMount
from runtime.errors import InvalidSpec
from runtime.linux.mount import MS
from runtime.linux.namespaces import CLONE
from runtime.linux.userns import mapped
from runtime.plan import identity, mounts, user
from runtime.plan.layers import context_option
from runtime.plan.options import Options, parse
from runtime.plan.plan import Step
from runtime.spec import Device, IDMapping, Mount

_DEFAULT_NODES: Final = (
    ("null", "c", 1, 3, 0o666, 0, 0),
    ("zero", "c", 1, 5, 0o666, 0, 0),
    ("full", "c", 1, 7, 0o666, 0, 0),
    ("random", "c", 1, 8, 0o666, 0, 0),
    ("urandom", "c", 1, 9, 0o666, 0, 0),
    ("tty", "c", 5, 0, 0o666, 0, 0),
)
_DEFAULT_LINKS: Final = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
)
_LABELLED: Final = ("tmpfs", "devpts")  # SELinux knows /proc and /sys by themselves
Maps = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Namespaces:
    """The pod's namespaces as paths (`/proc/MONITOR/ns/net`); "" where the pod uses the host's.

    `user` owns the others: its containers are mapped.
    """

    network: str = ""
    ipc: str = ""
    uts: str = ""
    pid: str = ""
    user: str = ""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A container's cgroup as its first process needs it.

    `join_files`: files that take "0"; `clone_dir`: the v2 directory for CLONE_INTO_CGROUP, or ""; `mounts`: what
    /sys/fs/cgroup consists of inside.
    """

    path: str
    join_files: tuple[str, ...]
    clone_dir: str
    kill_dirs: tuple[str, ...]
    memory_events: str
    mounts: tuple[CgroupMount, ...]

    @classmethod
    def of(cls, cgroups: Cgroups, path: str) -> "Cgroup":
        """The cgroup at `path`, which has been made. Raises what `Cgroups` raises."""
        join_files = cgroups.join_files(path)
        return cls(
            path=path,
            join_files=join_files,
            clone_dir=cgroups.clone_dir(path) or "",
            kill_dirs=tuple(os.path.dirname(file) for file in join_files),
            memory_events=cgroups.memory_events(path) or "",
            mounts=cgroups.mounts_in_container(path),
        )


@dataclass(frozen=True, slots=True)
class Environment:
    """What compile must know of this host and this pod.

    `staging` is an empty directory that root file systems are mounted over; `shm_path` stands for the pod's /dev/shm,
    and is a real mount only where `shm_attached`. `directory` is the pod's, for bundles. `overlay_of_descriptors`: what
    the kernel's overlay can. `hard_limits`: what no resource limit can be raised above, by number; () for no bounds.
    """

    staging: str
    namespaces: Namespaces
    shm_path: str
    shm_attached: bool
    last_cap: int
    directory: str = ""
    overlay_of_descriptors: bool = True
    hard_limits: tuple[int, ...] = ()


@dataclass(slots=True)
class Build:
    """The parts of a plan while it grows; `uids` and `gids` are there for a container in a user namespace.

    `label` is the SELinux label of the container's own file systems, `requested` are paths of devices.
    """

    uids: Maps = ()
    gids: Maps = ()
    mappings: dict[tuple[Maps, Maps], str] = field(default_factory=dict)
    sources: list[Step] = field(default_factory=list)
    unshare: int = int(CLONE.NEWNS)
    joins: list[Step] = field(default_factory=list)
    devices: list[Step] = field(default_factory=list)
    own_dev: bool = False
    label: str = ""
    requested: frozenset[str] = frozenset()
    tree: list[Step] = field(default_factory=list)


def enter_cgroup(cgroup: Cgroup, own_namespace: bool, *, mapped: bool) -> list[Step]:
    """Late, so that what building the tree costs is not charged to the container (v1); a mapped root is in it."""
    steps: list[Step] = [] if cgroup.clone_dir or mapped else [identity.JoinCgroup(cgroup.join_files)]
    if own_namespace:
        steps.append(identity.Unshare(int(CLONE.NEWCGROUP)))
    return steps


def add_mount(
    build: Build, mount: Mount, key: str, cgroup: Cgroup, environment: Environment, own_cgroup_ns: bool
) -> None:
    options = parse(mount.options)
    if mount.destination == "/dev" and mount.type == "tmpfs":
        _dev(build, options)
    elif mount.type == "cgroup":
        _cgroup_mounts(build, mount, options, key, cgroup, own_cgroup_ns)
    elif options.bind or mount.type == "bind":
        shared = mount.source == environment.shm_path and not environment.shm_attached
        if shared:
            build.sources.append(mounts.CloneSource(key, "shm"))
        else:
            build.sources.append(mounts.OpenSource(key, mount.source, options.recursive, options.make_source))
        _attach(build, key, mount, options, mount.source, mount.destination)
    else:
        source = mount.source or mount.type
        data = options.data + (context_option(build.label) if mount.type in _LABELLED else "")
        build.tree.append(mounts.Mount(mount.type, mount.destination, options.flags, data.lstrip(","), source))
        if mount.type == "mqueue" and build.label and environment.namespaces.ipc:  # one for all that are in there
            build.tree.append(mounts.Label(mount.destination, build.label))
        if options.propagation == MS.SHARED:
            raise InvalidSpec(f"mount {mount.destination}: a new file system can't be {mount.options}")


def _attach(build: Build, key: str, mount: Mount, options: Options, source: str, target: str) -> None:
    """Attach an opened source. What takes the host's privileges is done to it before it is handed in."""
    deep = bool(options.recursive_set or options.recursive_clear)
    set_, clear = options.set_ | options.recursive_set, options.clear | options.recursive_clear
    # A clone of a shared mount is its peer already: "shared" is what there is, if it is.
    propagation = 0 if options.propagation == MS.SHARED else options.propagation or int(MS.PRIVATE)
    mapping = _mapping(build, mount, options)
    if not build.uids:
        if mapping:
            build.sources.append(user.Adjust(key, mapping, options.idmap_recursive, 0, 0, False, 0, source))
        build.tree.append(mounts.Attach(key, target, set_, clear, deep, propagation, source))
        return
    build.sources.append(user.Adjust(key, mapping, options.idmap_recursive, set_, clear, deep, propagation, source))
    build.tree.append(mounts.Attach(key, target, 0, 0, False, 0, source))


def _mapping(build: Build, mount: Mount, options: Options) -> str:
    """The descriptor of the user namespace for an idmapped mount, or ""."""
    if not (mount.uid_mappings or mount.gid_mappings or options.idmap):
        return ""
    maps = id_maps(mount.uid_mappings) or build.uids, id_maps(mount.gid_mappings) or build.gids
    if not all(maps):
        raise InvalidSpec(f"mount {mount.destination}: idmapped without a mapping")
    if maps == (build.uids, build.gids):
        return "user"
    if maps not in build.mappings:
        build.mappings[maps] = f"mapping{len(build.mappings)}"
        build.sources.append(user.MakeMapping(build.mappings[maps], *maps))
    return build.mappings[maps]


def id_maps(mappings: tuple[IDMapping, ...]) -> Maps:
    return tuple((each.container_id, each.host_id, each.size) for each in mappings)


def _dev(build: Build, options: Options) -> None:
    """/dev with the default devices, as far as the request has no others of their names."""
    defaults = [node for node in _DEFAULT_NODES if f"/dev/{node[0]}" not in build.requested]
    if not build.uids:
        data = (options.data + context_option(build.label)).lstrip(",")
        build.tree.append(mounts.Mount("tmpfs", "/dev", options.flags, data, "tmpfs"))
        build.tree.append(mounts.MakeDevices("/dev", tuple(defaults)))
        build.tree.append(mounts.MakeLinks("/dev", _DEFAULT_LINKS))
        return
    build.own_dev = True
    root = mapped(0, build.uids), mapped(0, build.gids)
    nodes = tuple((name, kind, major, minor, mode, *root) for name, kind, major, minor, mode, _, _ in defaults)
    build.devices.append(user.MakeDev("dev", options.data, options.set_, nodes, _DEFAULT_LINKS, *root, build.label))
    build.tree.append(mounts.Attach("dev", "/dev", 0, 0, False, 0, "the device file system"))


def _cgroup_mounts(build: Build, mount: Mount, options: Options, key: str, cgroup: Cgroup, own_namespace: bool) -> None:
    """/sys/fs/cgroup as the container sees it: one mount on v2, on v1 one per hierarchy below a tmpfs."""
    flags = options.flags
    split = [part for part in cgroup.mounts if part.target]
    if split:
        data = "mode=755" + context_option(build.label)
        build.tree.append(mounts.Mount("tmpfs", mount.destination, flags & ~MS.RDONLY, data, "tmpfs"))
    for number, part in enumerate(cgroup.mounts):
        target = f"{mount.destination}/{part.target}" if part.target else mount.destination
        if own_namespace:
            build.tree.append(mounts.Mount(part.fstype, target, flags, part.data, part.source))
        else:
            bound = f"{key}.{number}"
            build.sources.append(mounts.OpenSource(bound, part.directory, False, False))
            _attach(build, bound, mount, options, part.directory, target)
        if part.links:
            links = tuple((name, part.target) for name in part.links)
            build.tree.append(mounts.MakeLinks(mount.destination, links))
    if split and flags & MS.RDONLY:
        build.tree.append(mounts.RemountReadOnly(mount.destination))


def add_devices(build: Build, devices: tuple[Device, ...]) -> None:
    """The request's devices; for a mapped root those below its own /dev come with that file system."""
    by_directory: dict[str, list[tuple[str, str, int, int, int, int, int]]] = {}
    below_dev = []
    for device in devices:
        mode = 0o666 if device.file_mode is None else device.file_mode
        owner = mapped(device.uid or 0, build.uids), mapped(device.gid or 0, build.gids)
        if build.own_dev and device.path.startswith("/dev/"):
            below_dev.append((device.path[5:], device.type, device.major, device.minor, mode, *owner))
            continue
        node = (os.path.basename(device.path), device.type, device.major, device.minor, mode, *owner)
        by_directory.setdefault(os.path.dirname(device.path), []).append(node)
    if below_dev:
        dev = build.devices.pop()
        assert isinstance(dev, user.MakeDev)
        linked = {name for name, _ in dev.links}  # the host's /dev/ptmx is a device, the container's a link
        named = {node[0]: node for node in (*dev.nodes, *below_dev) if node[0] not in linked}
        build.devices.append(
            user.MakeDev(
                dev.key, dev.data, dev.attributes, tuple(named.values()), dev.links, dev.uid, dev.gid, build.label
            )
        )
    build.devices += [mounts.MakeDevices(directory, tuple(nodes)) for directory, nodes in by_directory.items()]

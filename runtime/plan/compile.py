"""From an OCI spec to a plan: pure, every decision is made here and none in the steps."""

import binascii
import os.path
from dataclasses import dataclass, field
from typing import Final

from runtime import seccomp as seccomp_compiler
from runtime.cgroup import Cgroups
from runtime.cgroup import Mount as CgroupMount
from runtime.errors import InvalidSpec
from runtime.hooks import TIMEOUT_S as HOOK_TIMEOUT_S
from runtime.images import RootFs
from runtime.linux import caps
from runtime.linux.mount import MS, MountAttr
from runtime.linux.namespaces import CLONE, FLAGS
from runtime.linux.userns import mapped
from runtime.plan import hooks, identity, layers, mounts, user
from runtime.plan.options import Options, parse
from runtime.plan.plan import Plan, Step
from runtime.spec import Capabilities, Device, Hook, Hooks, IDMapping, Linux, Mount, Process, Spec

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
_RLIMITS: Final = {f"RLIMIT_{name}": number for number, name in enumerate(identity.RLIMIT_NAMES)}
Maps = tuple[tuple[int, int, int], ...]
_DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CGROUP_ROOT: Final = "/sys/fs/cgroup"


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
    the kernel's overlay can.
    """

    staging: str
    namespaces: Namespaces
    shm_path: str
    shm_attached: bool
    last_cap: int
    directory: str = ""
    overlay_of_descriptors: bool = True


@dataclass(frozen=True, slots=True)
class Start:
    """A container's plan, and how its process is cloned: `pid` is "new", "pod", "host" or "join" (of `pid_ns`).

    `watches`: see the function of that name.
    """

    plan: Plan
    pid: str
    pid_ns: str
    terminal: bool
    watches: bool = False


@dataclass(slots=True)
class _Build:
    """The parts of a plan while it grows; `uids` and `gids` are there for a container in a user namespace."""

    uids: Maps = ()
    gids: Maps = ()
    mappings: dict[tuple[Maps, Maps], str] = field(default_factory=dict)
    sources: list[Step] = field(default_factory=list)
    images: list[Step] = field(default_factory=list)
    unshare: int = int(CLONE.NEWNS)
    joins: list[Step] = field(default_factory=list)
    devices: list[Step] = field(default_factory=list)
    own_dev: bool = False
    tree: list[Step] = field(default_factory=list)


def compile_start(spec: Spec, rootfs: RootFs, cgroup: Cgroup, environment: Environment, state: str = "") -> Start:
    """The plan that makes a container's first process; `state` is for its hooks. Raises InvalidSpec or Unsupported."""
    linux = spec.linux or Linux()
    build = _Build(_maps(linux.uid_mappings), _maps(linux.gid_mappings))
    pid, pid_ns = _namespaces(build, linux, environment)
    own_cgroup_ns = bool(build.unshare & CLONE.NEWCGROUP)
    build.unshare &= ~CLONE.NEWCGROUP
    entered = False
    for number, mount in enumerate(spec.mounts):
        if mount.type == "cgroup" and not entered:
            build.tree += _enter_cgroup(cgroup, own_cgroup_ns, mapped=bool(build.uids))
            entered = True
        _mount(build, mount, f"source{number}", cgroup, environment, own_cgroup_ns)
    if not entered:
        build.tree += _enter_cgroup(cgroup, own_cgroup_ns, mapped=bool(build.uids))
    _devices(build, linux.devices)
    if not build.uids:
        build.tree += build.devices
    found = spec.hooks or Hooks()
    if found.prestart or found.create_runtime:
        build.tree.append(hooks.Pause())
    build.tree += _hooks("createContainer", found.create_container, spec, state, environment)
    if linux.masked_paths:
        build.tree.append(mounts.MaskPaths(linux.masked_paths))
    if linux.readonly_paths:
        build.tree.append(mounts.ReadOnlyPaths(linux.readonly_paths))
    if spec.root.readonly:
        build.tree.append(mounts.ReadOnlyRoot())
    process = spec.process
    plan: list[Step] = [identity.Detach(), *_inherited(process), *build.sources, *build.images, *build.joins]
    if build.uids:
        root = (rootfs.base, rootfs.lowers, rootfs.upper, rootfs.work, build.uids, build.gids)
        # Where root inside may look up a path, whatever the modes of the state directory's parents are.
        attach: Step = user.AttachRoot("/sys")
        plan.append(user.MountMappedOverlay(*root, environment.overlay_of_descriptors, environment.staging))
        plan += build.devices
        if not cgroup.clone_dir:
            plan.append(identity.JoinCgroup(cgroup.join_files))
        plan += [user.JoinUser(), user.CloneAgain(int(CLONE.NEWPID) if pid == "new" else 0), identity.Detach()]
    else:
        attach = mounts.MountOverlay(rootfs.base, rootfs.lowers, rootfs.upper, rootfs.work, environment.staging)
    plan.append(identity.Unshare(build.unshare))
    if spec.hostname:
        plan.append(identity.Hostname(spec.hostname))
    plan.append(mounts.Propagation(int(MS.SLAVE)))
    plan.append(attach)
    plan += _label(process)
    plan += build.tree
    plan.append(mounts.PivotRoot())
    plan += _hooks("startContainer", found.start_container, spec, state, environment)
    plan += _become(process, linux, environment.last_cap)
    return Start(tuple(plan), pid, pid_ns, process.terminal, watches(process, linux))


def compile_exec(process: Process, linux: Linux, join_files: tuple[str, ...], clone_dir: str, last_cap: int) -> Plan:
    """The plan of one more process in a running container. Raises InvalidSpec.

    One that the container could take over before execve is moved into its cgroup by the monitor (see `watches`).
    """
    plan: list[Step] = [identity.Detach()]
    if not clone_dir and not watches(process, linux):
        plan.append(identity.JoinCgroup(join_files))
    plan += _inherited(process)
    plan += _label(process)
    flags = CLONE.NEWNS | CLONE.NEWCGROUP | CLONE.NEWIPC | CLONE.NEWUTS | CLONE.NEWNET
    if linux.uid_mappings:
        flags |= CLONE.NEWUSER
    plan.append(identity.JoinProcess("container", int(flags)))
    plan += _become(process, linux, last_cap)
    return tuple(plan)


def watches(process: Process, linux: Linux) -> bool:
    """Whether the container could take over a process of crib's that enters its pid namespace (CVE-2016-9962).

    CAP_SYS_PTRACE is all it takes, but for one in a user namespace; in the host's pid namespace it could have any
    process of the host anyhow. See `runtime.zygote.hold`.
    """
    sets = process.capabilities or Capabilities()
    own_pids = any(namespace.type == "pid" for namespace in linux.namespaces)
    return "CAP_SYS_PTRACE" in sets.bounding and own_pids and not linux.uid_mappings


def _namespaces(build: _Build, linux: Linux, environment: Environment) -> tuple[str, str]:
    """Sort the spec's namespaces into new, joined and inherited; returns how the pid namespace is come by."""
    wanted = {namespace.type: namespace.path for namespace in linux.namespaces}
    for kind in wanted:
        if kind not in FLAGS:
            raise InvalidSpec(f"namespace type {kind!r} is unknown")
    pod = environment.namespaces
    if wanted.get("user", "") != pod.user or bool(pod.user) != bool(build.uids and build.gids):
        raise InvalidSpec("the user namespace is not the pod's, or has no mapping")
    inherited = {"network": pod.network, "ipc": pod.ipc, "uts": pod.uts}
    for kind, own in inherited.items():
        path = wanted.get(kind)
        if path == "":
            build.unshare |= FLAGS[kind]
        elif path is not None and path != own:
            build.joins.append(identity.JoinNamespace(path, int(FLAGS[kind])))
        elif path is None and own:
            name = {"network": "net"}.get(kind, kind)
            build.joins.append(identity.JoinNamespace(f"/proc/1/ns/{name}", int(FLAGS[kind])))
    if "cgroup" in wanted:
        build.unshare |= CLONE.NEWCGROUP
    path = wanted.get("pid")
    if path is None:
        return "host", ""
    if path == "":
        return "new", ""
    return ("pod", "") if path == pod.pid else ("join", path)


def _enter_cgroup(cgroup: Cgroup, own_namespace: bool, *, mapped: bool) -> list[Step]:
    """Late, so that what building the tree costs is not charged to the container (v1); a mapped root is in it."""
    steps: list[Step] = [] if cgroup.clone_dir or mapped else [identity.JoinCgroup(cgroup.join_files)]
    if own_namespace:
        steps.append(identity.Unshare(int(CLONE.NEWCGROUP)))
    return steps


def _mount(
    build: _Build, mount: Mount, key: str, cgroup: Cgroup, environment: Environment, own_cgroup_ns: bool
) -> None:
    options = parse(mount.options)
    if mount.destination == "/dev" and mount.type == "tmpfs":
        _dev(build, options)
    elif mount.type == "cgroup":
        _cgroup_mounts(build, mount, options, key, cgroup, own_cgroup_ns)
    elif mount.type == "overlay" and options.lowers:
        descriptors = environment.overlay_of_descriptors
        build.images.append(
            layers.OpenImage(key, options.lowers, options.sub_path, bool(build.uids), descriptors, environment.staging)
        )
        attributes = int(options.set_ | MountAttr.RDONLY)
        build.tree.append(mounts.Attach(key, mount.destination, attributes, 0, False, int(MS.PRIVATE), "an image"))
    elif options.bind or mount.type == "bind":
        shared = mount.source == environment.shm_path and not environment.shm_attached
        if shared:
            build.sources.append(mounts.CloneSource(key, "shm"))
        else:
            build.sources.append(mounts.OpenSource(key, mount.source, options.recursive, options.make_source))
        _attach(build, key, mount, options, mount.source, mount.destination)
    else:
        source = mount.source or mount.type
        build.tree.append(mounts.Mount(mount.type, mount.destination, options.flags, options.data, source))
        if options.propagation == MS.SHARED:
            raise InvalidSpec(f"mount {mount.destination}: a new file system can't be {mount.options}")


def _attach(build: _Build, key: str, mount: Mount, options: Options, source: str, target: str) -> None:
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


def _mapping(build: _Build, mount: Mount, options: Options) -> str:
    """The descriptor of the user namespace for an idmapped mount, or ""."""
    if not (mount.uid_mappings or mount.gid_mappings or options.idmap):
        return ""
    maps = _maps(mount.uid_mappings) or build.uids, _maps(mount.gid_mappings) or build.gids
    if not all(maps):
        raise InvalidSpec(f"mount {mount.destination}: idmapped without a mapping")
    if maps == (build.uids, build.gids):
        return "user"
    if maps not in build.mappings:
        build.mappings[maps] = f"mapping{len(build.mappings)}"
        build.sources.append(user.MakeMapping(build.mappings[maps], *maps))
    return build.mappings[maps]


def _maps(mappings: tuple[IDMapping, ...]) -> Maps:
    return tuple((each.container_id, each.host_id, each.size) for each in mappings)


def _dev(build: _Build, options: Options) -> None:
    """/dev with the default devices."""
    if not build.uids:
        build.tree.append(mounts.Mount("tmpfs", "/dev", options.flags, options.data, "tmpfs"))
        build.tree.append(mounts.MakeDevices("/dev", _DEFAULT_NODES))
        build.tree.append(mounts.MakeLinks("/dev", _DEFAULT_LINKS))
        return
    build.own_dev = True
    root = mapped(0, build.uids), mapped(0, build.gids)
    nodes = tuple((name, kind, major, minor, mode, *root) for name, kind, major, minor, mode, _, _ in _DEFAULT_NODES)
    build.devices.append(user.MakeDev("dev", options.data, options.set_, nodes, _DEFAULT_LINKS, *root))
    build.tree.append(mounts.Attach("dev", "/dev", 0, 0, False, 0, "the device file system"))


def _cgroup_mounts(
    build: _Build, mount: Mount, options: Options, key: str, cgroup: Cgroup, own_namespace: bool
) -> None:
    """/sys/fs/cgroup as the container sees it: one mount on v2, on v1 one per hierarchy below a tmpfs."""
    flags = options.flags
    split = [part for part in cgroup.mounts if part.target]
    if split:
        build.tree.append(mounts.Mount("tmpfs", mount.destination, flags & ~MS.RDONLY, "mode=755", "tmpfs"))
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


def _devices(build: _Build, devices: tuple[Device, ...]) -> None:
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
        named = {node[0]: node for node in (*dev.nodes, *below_dev)}
        build.devices.append(
            user.MakeDev(dev.key, dev.data, dev.attributes, tuple(named.values()), dev.links, dev.uid, dev.gid)
        )
    build.devices += [mounts.MakeDevices(directory, tuple(nodes)) for directory, nodes in by_directory.items()]


def _hooks(stage: str, wanted: tuple[Hook, ...], spec: Spec, state: str, environment: Environment) -> list[Step]:
    """Hooks in the container's namespaces; what the image may have put in their place gets no more than the process."""
    if not wanted:
        return []
    execute = _become(spec.process, spec.linux or Linux(), environment.last_cap)[-1]
    assert isinstance(execute, identity.Execute)
    return [
        hooks.RunHook(
            stage=stage,
            path=hook.path,
            args=hook.args,
            env=hook.env,
            timeout_s=hook.timeout or HOOK_TIMEOUT_S,
            state=state,
            confined=stage == "startContainer",
            bounding=execute.bounding,
            permitted=execute.permitted & execute.bounding,
            last_cap=environment.last_cap,
            no_new_privileges=execute.no_new_privileges,
            seccomp=execute.seccomp,
            seccomp_flags=execute.seccomp_flags,
        )
        for hook in wanted
    ]


def _inherited(process: Process) -> list[Step]:
    steps: list[Step] = []
    if process.oom_score_adj is not None:
        steps.append(identity.OomScoreAdj(process.oom_score_adj))
    if process.rlimits:
        limits = []
        for limit in process.rlimits:
            if limit.type not in _RLIMITS:
                raise InvalidSpec(f"rlimit {limit.type!r} is unknown")
            limits.append((_RLIMITS[limit.type], limit.soft, limit.hard))
        steps.append(identity.Rlimits(tuple(limits)))
    return steps


def _label(process: Process) -> list[Step]:
    if process.apparmor_profile and process.apparmor_profile != "unconfined":
        return [identity.OpenLabel("/proc/self/attr/apparmor/exec")]
    if process.selinux_label:
        return [identity.OpenLabel("/proc/self/attr/exec")]
    return []


def _become(process: Process, linux: Linux, last_cap: int) -> list[Step]:
    """The fixed end of a start."""
    if not process.args:
        raise InvalidSpec("no command to run")
    steps: list[Step] = []
    if process.terminal:
        size = process.console_size
        steps.append(identity.OpenTerminal(size.height if size else 0, size.width if size else 0, process.user.uid))
    path = next((item[5:] for item in process.env if item.startswith("PATH=")), _DEFAULT_PATH)
    sets = process.capabilities or Capabilities()
    try:
        masks = [
            caps.mask(names)
            for names in (sets.bounding, sets.effective, sets.permitted, sets.inheritable, sets.ambient)
        ]
    except KeyError as error:
        raise InvalidSpec(f"capability {error.args[0]} is unknown") from None
    bounding, effective, permitted, inheritable, ambient = (mask & (1 << last_cap + 1) - 1 for mask in masks)
    filtered = linux.seccomp is not None
    who = process.user
    label = process.selinux_label
    if process.apparmor_profile and process.apparmor_profile != "unconfined":
        label = f"exec {process.apparmor_profile}"
    steps.append(identity.WorkingDirectory(process.cwd or "/"))
    steps.append(identity.FindExecutable(process.args[0], path))
    steps.append(
        identity.Execute(
            args=process.args,
            env=process.env,
            uid=who.uid,
            gid=who.gid,
            groups=who.additional_gids,
            bounding=bounding,
            effective=effective,
            permitted=permitted,
            inheritable=inheritable,
            ambient=ambient,
            last_cap=last_cap,
            umask=0o022 if who.umask is None else who.umask,
            no_new_privileges=process.no_new_privileges,
            seccomp=_filter(linux) if filtered else "",
            seccomp_flags=0 if linux.seccomp is None else seccomp_compiler.flags(linux.seccomp),
            label=label,
        )
    )
    return steps


def _filter(linux: Linux) -> str:
    assert linux.seccomp is not None
    return binascii.b2a_base64(seccomp_compiler.bpf(linux.seccomp), newline=False).decode("ascii")

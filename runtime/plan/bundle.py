"""From an OCI spec to the bundle of an external runtime, and the plan that hands it over: pure, as `compile` is.

The spec stays what it is but for what crib does itself. What only crib can open (the pod's /dev/shm) becomes a bind of
where the plan has attached it. Limits are the cgroup room's, which has set them: only the device
rules are left in, since a runtime without any would make its own. The pod's namespaces are joined by their paths.
"""

from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from runtime.errors import Unsupported
from runtime.images import RootFs
from runtime.linux.mount import MS
from runtime.linux.namespaces import CLONE, FLAGS
from runtime.plan import external, identity, mounts, user
from runtime.plan.options import parse
from runtime.plan.plan import Plan, Step
from runtime.plan.tree import Environment, id_maps
from runtime.spec import Linux, Mount, Process, Resources, Root, Spec

ENVIRONMENT: Final = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)
_NUMBERS: Final = {f"RLIMIT_{name}": number for number, name in enumerate(identity.RLIMIT_NAMES)}
_OF_A_SANDBOX: Final = "io.kubernetes.cri.container-type"
"""Has runsc look for a sandbox of its own making to put the container into; without it each is one by itself."""
_MAPPED_ROOT: Final = "/sys/fs/bpf"
"""Where the root of a user namespace may look up a path, whatever the modes of the state directory's parents are: in
sysfs, which it may mount itself only where nothing hides a part of it, a directory that is there to be mounted on."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """`spec` is its config.json, and `user` what its link of that name leads to, if there is one: the user namespace.
    The last step of `plan` is the runtime."""

    spec: Spec
    user: str
    plan: Plan


@dataclass(slots=True)
class _Mounts:
    """The spec's mounts as the runtime gets them, and what has to be done for them, in this order."""

    handed: list[Mount] = field(default_factory=list)
    made: list[Step] = field(default_factory=list)
    opened: list[Step] = field(default_factory=list)
    attached: list[Step] = field(default_factory=list)


def compile_bundle(
    spec: Spec, rootfs: RootFs, environment: Environment, directory: str, command: tuple[str, ...], host: str
) -> Bundle:
    """The bundle in `directory` (a real path), and the plan that mounts its parts and becomes `command`.

    `host` is where the host's namespaces are ("/proc/PID/ns"). Raises Unsupported.
    """
    linux = spec.linux or Linux()
    uids, gids = id_maps(linux.uid_mappings), id_maps(linux.gid_mappings)
    label = linux.mount_label
    root = _MAPPED_ROOT if uids else environment.staging
    found = _mounts(spec.mounts, environment, directory, mapped=bool(uids))
    if uids and not environment.overlay_of_descriptors and _propagates(spec.mounts, "slave", "shared"):
        raise Unsupported("mounts that propagate, in a user namespace, by an external runtime: needs Linux 6.15")
    plan: list[Step] = [identity.Detach(""), *_inherited(spec.process), *found.made, *found.opened]
    if uids:
        where = (rootfs.base, rootfs.lowers, rootfs.upper, rootfs.work, uids, gids)
        plan.append(user.MountMappedOverlay(*where, environment.overlay_of_descriptors, environment.staging, label))
    # In the host's namespaces, as hooks of the runtime's expect; it joins the pod's by itself.
    pod = environment.namespaces
    for kind, name, own in (("network", "net", pod.network), ("ipc", "ipc", pod.ipc), ("uts", "uts", pod.uts)):
        if own:
            plan.append(identity.JoinNamespace(f"{host}/{name}", int(FLAGS[kind])))
    plan.append(identity.Unshare(int(CLONE.NEWNS)))
    if _propagates(spec.mounts, "shared"):
        plan += [external.SlaveAround(path) for path in dict.fromkeys((root, environment.staging, directory))]
    else:
        plan.append(mounts.Propagation(int(MS.SLAVE)))
    if uids:
        plan.append(user.AttachRoot(root))
    else:
        plan.append(mounts.MountOverlay(rootfs.base, rootfs.lowers, rootfs.upper, rootfs.work, root, label))
    plan += [*found.attached, external.RunCommand(command, ENVIRONMENT, directory)]
    # By a link: of a path in /proc that isn't PID/ns/user, runc 1.3 takes the process for one in the namespace.
    namespaces = tuple(
        replace(each, path=f"{directory}/user") if each.type == "user" else each for each in linux.namespaces
    )
    limits = Resources(devices=linux.resources.devices if linux.resources else ())
    handed = replace(
        spec,
        process=handed_process(spec.process, environment),
        root=Root(path=root, readonly=spec.root.readonly),
        mounts=tuple(found.handed),
        annotations={key: value for key, value in spec.annotations.items() if key != _OF_A_SANDBOX},
        linux=replace(linux, namespaces=namespaces, resources=limits),
    )
    return Bundle(handed, pod.user, tuple(plan))


def compile_command(process: Process, directory: str, command: tuple[str, ...]) -> Plan:
    """The plan that becomes a command for one more process of a container."""
    return (identity.Detach(""), *_inherited(process), external.RunCommand(command, ENVIRONMENT, directory))


def handed_process(process: Process, environment: Environment) -> Process:
    """The process as the runtime gets it: what this host may not raise is kept at what there is."""
    hard = environment.hard_limits
    limits = tuple(
        replace(limit, soft=min(limit.soft, most), hard=min(limit.hard, most))
        for limit in process.rlimits
        for most in [hard[_NUMBERS[limit.type]] if hard else limit.hard]
    )
    return replace(process, rlimits=limits, oom_score_adj=None)


def _inherited(process: Process) -> list[Step]:
    """Set beforehand, since runtimes fail where it can't be lowered."""
    return [] if process.oom_score_adj is None else [identity.OomScoreAdj(process.oom_score_adj)]


def _mounts(wanted: tuple[Mount, ...], environment: Environment, directory: str, *, mapped: bool) -> _Mounts:
    found = _Mounts()
    for number, mount in enumerate(wanted):
        options = parse(mount.options)
        mount = replace(mount, options=tuple(name for name in mount.options if not name.startswith("x-crib.")))
        key, at = f"source{number}", f"{directory}/{number}"
        if mount.source == environment.shm_path and not environment.shm_attached and options.bind:
            found.opened.append(mounts.CloneSource(key, "shm"))
            mount = replace(mount, source=at)
        elif mapped and options.bind and not options.recursive:  # which the root inside may not leave anything out of
            found.opened.append(mounts.OpenSource(key, mount.source, False, False))
            mount = replace(mount, source=at)
        else:
            if options.make_source:
                found.made.append(external.MakeSource(mount.source))
            found.handed.append(mount)
            continue
        found.attached.append(external.AttachAt(key, at))
        found.handed.append(mount)
    return found


def _propagates(wanted: tuple[Mount, ...], *how: str) -> bool:
    names = {name for each in how for name in (each, f"r{each}")}
    return any(names & set(mount.options) for mount in wanted)

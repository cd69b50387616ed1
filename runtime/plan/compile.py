"""From an OCI spec to a plan: pure, every decision is made here and none in the steps."""

import binascii
import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from runtime import seccomp as seccomp_compiler
from runtime.errors import InvalidSpec
from runtime.hooks import TIMEOUT_S as HOOK_TIMEOUT_S
from runtime.images import RootFs
from runtime.linux import caps
from runtime.linux.mount import MS
from runtime.linux.namespaces import CLONE, FLAGS
from runtime.plan import hooks, identity, mounts, user
from runtime.plan.plan import Plan, Step
from runtime.plan.tree import (
    Build,
    Cgroup,
    Environment,
    Maps,
    Namespaces,
    add_devices,
    add_mount,
    enter_cgroup,
    id_maps,
)
from runtime.spec import Capabilities, Hook, Hooks, Linux, Process, Spec, sysctl

__all__ = [
    "HOOKS_ROOT",
    "Cgroup",
    "Environment",
    "Maps",
    "Namespaces",
    "Start",
    "compile_exec",
    "compile_start",
    "id_maps",
]

_RLIMITS: Final = {f"RLIMIT_{name}": number for number, name in enumerate(identity.RLIMIT_NAMES)}
_NOFILE: Final = "RLIMIT_NOFILE"
_DESCRIPTORS: Final = 64
"""So many a start may have open beside the sources of mounts and the layers."""
_VISIBLE: Final = "/sys"
HOOKS_ROOT: Final = f"{_VISIBLE}/rootfs"
"""Where createContainer hooks find the root file system of a mapped container."""
_HOOKS_BUNDLE: Final = f"{_VISIBLE}/bundle"
_DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


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


def compile_start(
    spec: Spec,
    rootfs: RootFs,
    cgroup: Cgroup,
    environment: Environment,
    state: Mapping[str, object] = MappingProxyType({}),
) -> Start:
    """The plan that makes a container's first process; `state` is for its hooks. Raises InvalidSpec or Unsupported."""
    linux = spec.linux or Linux()
    requested = frozenset(device.path for device in linux.devices)
    maps = id_maps(linux.uid_mappings), id_maps(linux.gid_mappings)
    build = Build(*maps, label=linux.mount_label, requested=requested)
    pid, pid_ns = _namespaces(build, linux, environment)
    own_cgroup_ns = bool(build.unshare & CLONE.NEWCGROUP)
    build.unshare &= ~CLONE.NEWCGROUP
    entered = False
    for number, mount in enumerate(spec.mounts):
        if mount.type == "cgroup" and not entered:
            build.tree += enter_cgroup(cgroup, own_cgroup_ns, mapped=bool(build.uids))
            entered = True
        add_mount(build, mount, f"source{number}", cgroup, environment, own_cgroup_ns)
    if not entered:
        build.tree += enter_cgroup(cgroup, own_cgroup_ns, mapped=bool(build.uids))
    add_devices(build, linux.devices)
    if not build.uids:
        build.tree += build.devices
    found = spec.hooks or Hooks()
    if found.prestart or found.create_runtime:
        build.tree.append(hooks.Pause())
    shown = bool(build.uids and found.create_container)  # root inside reaches neither bundle nor state directory
    if shown:
        build.sources.append(mounts.OpenSource("bundle", str(state["bundle"]), False, False))
    inside = {**state, "bundle": _HOOKS_BUNDLE} if shown else state
    build.tree += _hooks("createContainer", found.create_container, spec, inside, environment)
    if linux.masked_paths:
        build.tree.append(mounts.MaskPaths(linux.masked_paths))
    if linux.readonly_paths:
        build.tree.append(mounts.ReadOnlyPaths(linux.readonly_paths))
    process = spec.process
    if spec.root.readonly:
        if process.cwd not in ("", "/"):
            build.tree.append(mounts.MakeDirectory(process.cwd))
        build.tree.append(mounts.ReadOnlyRoot())
    detach = identity.Detach(process.selinux_label)
    descriptors = len(build.sources) + len(rootfs.lowers) + _DESCRIPTORS
    plan: list[Step] = [detach, *_inherited(process, descriptors), *build.sources, *build.joins]
    if build.uids:
        root = (rootfs.base, rootfs.lowers, rootfs.upper, rootfs.work, build.uids, build.gids)
        # Where root inside may look up a path, whatever the modes of the state directory's parents are.
        attach: list[Step] = [user.ShowBundle("bundle", *map(os.path.basename, (_HOOKS_BUNDLE, HOOKS_ROOT)))] * shown
        attach.append(user.AttachRoot(HOOKS_ROOT if shown else _VISIBLE))
        plan.append(
            user.MountMappedOverlay(*root, environment.overlay_of_descriptors, environment.staging, build.label)
        )
        plan += build.devices
        if not cgroup.clone_dir:
            plan.append(identity.JoinCgroup(cgroup.join_files))
        plan += [user.JoinUser(), user.CloneAgain(int(CLONE.NEWPID) if pid == "new" else 0), detach]
    else:
        own = (rootfs.base, rootfs.lowers, rootfs.upper, rootfs.work)
        attach = [mounts.MountOverlay(*own, environment.staging, build.label)]
    plan.append(identity.Unshare(build.unshare))
    if spec.hostname:
        plan.append(identity.Hostname(spec.hostname))
    plan += [identity.Sysctl(name, value) for name, value in _sysctls(linux)]
    plan.append(mounts.Propagation(int(MS.SLAVE)))
    plan += attach
    plan += _label(process)
    plan += build.tree
    plan.append(mounts.PivotRoot())
    plan += _own_descriptors(process, descriptors)
    plan += _hooks("startContainer", found.start_container, spec, {**state, "status": "created"}, environment)
    become = _become(process, linux, environment.last_cap)
    if process.terminal and any((mount.destination, mount.type) == ("/dev", "tmpfs") for mount in spec.mounts):
        become.insert(1, mounts.Console())
    plan += become
    return Start(tuple(plan), pid, pid_ns, process.terminal, watches(process, linux))


def compile_exec(process: Process, linux: Linux, join_files: tuple[str, ...], clone_dir: str, last_cap: int) -> Plan:
    """The plan of one more process in a running container. Raises InvalidSpec.

    One that the container could take over before execve is moved into its cgroup by the monitor (see `watches`).
    """
    plan: list[Step] = [identity.Detach(process.selinux_label)]
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
    """Whether the container could take over, or look into, a process of crib's that enters its pid namespace.

    CAP_SYS_PTRACE is all it takes (CVE-2016-9962), but for one in a user namespace; in the host's pid namespace it
    could have any process of the host anyhow. CAP_PERFMON shows a process's memory map. See `runtime.zygote.hold`.
    """
    sets = process.capabilities or Capabilities()
    own_pids = any(namespace.type == "pid" for namespace in linux.namespaces)
    able = not {"CAP_SYS_PTRACE", "CAP_PERFMON"}.isdisjoint(sets.bounding)
    return able and own_pids and not linux.uid_mappings


def _namespaces(build: Build, linux: Linux, environment: Environment) -> tuple[str, str]:
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


def _sysctls(linux: Linux) -> list[tuple[str, str]]:
    """Kernel parameters by their files below /proc/sys; only such as belong to one of the spec's namespaces."""
    listed = {namespace.type for namespace in linux.namespaces}
    for name in linux.sysctl:
        if sysctl.namespace(sysctl.dotted(name)) not in listed:
            raise InvalidSpec(f"sysctl {name}: belongs to no namespace of the container, it would change the host")
    return [(sysctl.file(name), value) for name, value in linux.sysctl.items()]


def _hooks(
    stage: str, wanted: tuple[Hook, ...], spec: Spec, state: Mapping[str, object], environment: Environment
) -> list[Step]:
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
            state=json.dumps(state),
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


def _inherited(process: Process, descriptors: int = 0) -> list[Step]:
    """What can't be had any more once the host's privileges are gone; so many descriptors may be open meanwhile."""
    steps: list[Step] = []
    if process.oom_score_adj is not None:
        steps.append(identity.OomScoreAdj(process.oom_score_adj))
    if process.rlimits:
        limits = []
        for limit in process.rlimits:
            if limit.type not in _RLIMITS:
                raise InvalidSpec(f"rlimit {limit.type!r} is unknown")
            room = min(descriptors, limit.hard) if limit.type == _NOFILE else 0
            limits.append((_RLIMITS[limit.type], max(limit.soft, room), limit.hard))
        steps.append(identity.Rlimits(tuple(limits)))
    return steps


def _own_descriptors(process: Process, descriptors: int) -> list[Step]:
    """The process's own limit, where the steps before needed more."""
    limits = [each for each in process.rlimits if each.type == _NOFILE and each.soft < min(descriptors, each.hard)]
    return [identity.Rlimits(tuple((_RLIMITS[_NOFILE], each.soft, each.hard) for each in limits))] * bool(limits)


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
            seccomp=_text(seccomp_compiler.bpf(linux.seccomp)) if linux.seccomp else "",
            seccomp_flags=0 if linux.seccomp is None else seccomp_compiler.flags(linux.seccomp),
            label=label,
        )
    )
    return steps


@lru_cache(maxsize=64)
def _text(program: bytes) -> str:
    """In base64; the same object each time, since plans are kept."""
    return binascii.b2a_base64(program, newline=False).decode("ascii")

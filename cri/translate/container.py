"""ContainerConfig to the OCI spec of a container."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from cri.api import cri_pb2 as pb
from cri.translate import process, security
from cri.translate.capabilities import capabilities
from cri.translate.defaults import Defaults, Handler, Host
from cri.translate.devices import HostDevice, container_devices
from cri.translate.field import REQUEST_LIMIT_BYTES, absolute, name
from cri.translate.field import labels as check_labels
from cri.translate.mounts import MountRules, PodPaths, container_mounts
from cri.translate.namespaces import PodNamespaces, UserMapping, container_namespaces, container_pid_mode
from cri.translate.resources import oom_score_adj, resources
from cri.translate.sandbox import PodPlan, sandbox_to_pod
from cri.translate.seccomp import seccomp
from cri.translate.user import ResolvedUser
from runtime.errors import InvalidSpec
from runtime.spec import Linux, Process, Root, Spec, User

if TYPE_CHECKING:
    from runtime.images import Image

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""What the kubelet sends for the default procMount; used here only for a request without a security context, as
empty lists in one mean procMount Unmasked."""
PATHS_LIMIT = 16384  # the kubelet names a directory of each of up to 8192 processors


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerInput:
    """All that a container's spec is made of.

    `target_pid` is the path of the pid namespace that pid mode TARGET joins. `seccomp_file` holds the bytes of
    the file that `seccomp.localhost_file` names. `devices` has what each of `devices.paths` is, `host_devices` every
    device of the host by path (for a privileged container). `image_volumes` has where the host has it for
    each target of `mounts.image_volumes`, `own_volumes` for each of `mounts.own_volumes`.
    """

    sandbox: pb.PodSandboxConfig
    config: pb.ContainerConfig
    image: Image
    paths: PodPaths
    namespaces: PodNamespaces
    user: ResolvedUser
    cgroup_path: str
    cgroup_version: int
    defaults: Defaults = field(default_factory=Defaults)
    host: Host = field(default_factory=Host)
    handler: Handler = field(default_factory=Handler)
    pod: PodPlan | None = None
    sandbox_id: str = ""
    selinux_level: str = ""
    target_pid: str | None = None
    seccomp_file: bytes | None = None
    image_volumes: Mapping[str, str] = field(default_factory=dict)
    own_volumes: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Sequence[HostDevice]] = field(default_factory=dict)
    host_devices: Mapping[str, HostDevice] = field(default_factory=dict)


def check_container(config: pb.ContainerConfig, sandbox: pb.PodSandboxConfig) -> None:
    """What can be refused before an image is looked up or anything is made.

    Raises:
        InvalidSpec: no metadata, too large, or privileged in a sandbox that isn't.
    """
    if not config.HasField("metadata"):
        raise InvalidSpec("metadata is missing from the container config")
    name("metadata.name", config.metadata.name)
    if config.ByteSize() > REQUEST_LIMIT_BYTES:
        raise InvalidSpec(f"container config: {config.ByteSize()} bytes, the limit is {REQUEST_LIMIT_BYTES}")
    if not config.image.image:
        raise InvalidSpec("image.image is missing from the container config")
    check_labels("labels", dict(config.labels))
    check_labels("annotations", dict(config.annotations))
    if config.linux.security_context.privileged and not sandbox.linux.security_context.privileged:
        raise InvalidSpec("security_context.privileged true: the sandbox is not privileged")


def container_to_spec(given: ContainerInput) -> Spec:
    """The OCI spec of the container.

    Raises:
        InvalidSpec: names the field and the value.
        Unsupported: this host can't do it.
    """
    config, defaults, host = given.config, given.defaults, given.host
    check_container(config, given.sandbox)
    pod = given.pod or sandbox_to_pod(given.sandbox, defaults=defaults, host=host)
    if pod.user:
        _check_mapped(given.user, pod.user)
    context = config.linux.security_context
    privileged = context.privileged
    pid_mode = container_pid_mode(context.namespace_options, pod.modes)
    caps = capabilities(
        context.capabilities,
        default=defaults.capabilities,
        privileged=privileged,
        uid=given.user.uid,
        host=host.capabilities,
    )
    masked, readonly = _paths(config)
    nodes, rules = container_devices(
        config.devices,
        given.devices,
        every=given.host_devices if privileged and not given.handler.privileged_without_host_devices else None,
        mapped=pod.user is not None,
    )
    mounts = container_mounts(
        config.mounts,
        given.paths,
        MountRules(
            readonly_root=context.readonly_rootfs,
            privileged=privileged,
            host_ipc=not pod.ipc,
            bind_sys=pod.user is not None and not pod.network,
            writable_cgroup=given.handler.writable_cgroup,
            recursive_read_only=host.recursive_read_only,
            idmapped=host.idmapped_mounts,
            volumes=given.image_volumes,
            own=given.own_volumes,
        ),
    )
    theirs = given.sandbox.linux.security_context
    labels = security.selinux(
        context.selinux_options if context.HasField("selinux_options") else None,
        theirs.selinux_options if theirs.HasField("selinux_options") else None,
        level=given.selinux_level,
        enabled=host.selinux,
        privileged=privileged,
        types=host.selinux_types,
    )
    propagation = {option for mount in mounts for option in mount.options} & {"rshared", "rslave"}
    image = given.image.config
    return Spec(
        process=Process(
            args=process.arguments(config, image.entrypoint, image.cmd),
            env=process.environment(
                image.env,
                config.envs,
                hostname=defaults.node_name if pod.hostname is None else pod.hostname,
                home=given.user.home,
                terminal=config.tty,
            ),
            cwd=process.working_directory(config.working_dir, image.working_dir),
            user=User(
                uid=given.user.uid,
                gid=given.user.gid,
                additional_gids=given.user.additional_gids,
                umask=defaults.umask,
            ),
            terminal=config.tty,
            capabilities=caps,
            rlimits=defaults.rlimits,
            no_new_privileges=context.no_new_privs,
            oom_score_adj=oom_score_adj(config.linux.resources),
            apparmor_profile=security.apparmor(
                context, enabled=host.apparmor, default=defaults.apparmor_default, loaded=host.apparmor_profiles
            ),
            selinux_label=labels.process,
        ),
        root=Root(path="rootfs", readonly=context.readonly_rootfs),
        mounts=mounts,
        annotations=_annotations(given),
        linux=Linux(
            namespaces=container_namespaces(
                pid_mode, pod.modes, given.namespaces, target_pid=given.target_pid, own_cgroup=not privileged
            ),
            uid_mappings=(pod.user.uid,) if pod.user else (),
            gid_mappings=(pod.user.gid,) if pod.user else (),
            devices=nodes,
            cgroups_path=given.cgroup_path,
            resources=resources(config.linux.resources, cgroup_version=given.cgroup_version, devices=rules),
            rootfs_propagation="rshared" if "rshared" in propagation else "rslave" if propagation else "",
            seccomp=seccomp(
                context,
                file=given.seccomp_file,
                capabilities=caps.bounding,
                machine=host.machine,
                kernel=host.kernel,
                default_when_unset=defaults.seccomp_unset,
            ),
            masked_paths=masked,
            readonly_paths=readonly,
            mount_label=labels.file,
        ),
    )


def _paths(config: pb.ContainerConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Masked and read-only paths: exactly the request's, none for a privileged container."""
    if not config.linux.HasField("security_context"):
        return MASKED_PATHS, READONLY_PATHS
    context = config.linux.security_context
    masked = _below_root("masked_paths", context.masked_paths)
    readonly = _below_root("readonly_paths", context.readonly_paths)
    return ((), ()) if context.privileged else (masked, readonly)


def _below_root(kind: str, paths: Sequence[str]) -> tuple[str, ...]:
    """Normal absolute paths. The root itself can't be covered: what runs in it would go on seeing what is below."""
    if len(paths) > PATHS_LIMIT:
        raise InvalidSpec(f"{kind}: {len(paths)} entries, the limit is {PATHS_LIMIT}")
    found = tuple(absolute(kind, path) for path in paths)
    if "/" in found:
        raise InvalidSpec(f"{kind} '/': only what is below the root can be among them")
    return found


def _check_mapped(user: ResolvedUser, mapping: UserMapping) -> None:
    """Refuses ids, of the request or of the image, that the pod's user namespace doesn't have."""
    groups = (("supplemental_groups", gid) for gid in user.additional_gids if gid != user.gid)
    for kind, id in (("run_as_user", user.uid), ("run_as_group", user.gid), *groups):
        size = (mapping.uid if kind == "run_as_user" else mapping.gid).size
        if id >= size:
            raise InvalidSpec(f"{kind} {id}: the pod's user namespace has ids below {size}")


def _annotations(given: ContainerInput) -> dict[str, str]:
    """Who the container is, in the words of containerd, which OCI runtimes like runsc, hooks and plugins look for,
    and of the request's own annotations those that the handler lets through (CVE-2024-3154: none by default)."""
    pod, prefix = given.sandbox.metadata, "io.kubernetes.cri"
    own = {
        f"{prefix}.container-type": "container",
        f"{prefix}.container-name": given.config.metadata.name,
        f"{prefix}.image-name": given.config.image.user_specified_image or given.config.image.image,
        f"{prefix}.sandbox-id": given.sandbox_id,
        f"{prefix}.sandbox-name": pod.name,
        f"{prefix}.sandbox-namespace": pod.namespace,
        f"{prefix}.sandbox-uid": pod.uid,
    }
    asked = {**given.sandbox.annotations, **given.config.annotations}
    patterns = given.handler.annotations
    return {key: value for key, value in asked.items() if any(fnmatchcase(key, each) for each in patterns)} | own

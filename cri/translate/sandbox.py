"""PodSandboxConfig to a PodPlan: everything about a pod that can be decided without looking at the host."""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cri.api import cri_pb2 as pb
from cri.translate import etc, security
from cri.translate.defaults import Defaults, Host
from cri.translate.field import (
    PATH_LIMIT_BYTES,
    REQUEST_LIMIT_BYTES,
    bounded,
    identity,
    labels,
    name,
    no_backsteps,
    on_host,
    show,
)
from cri.translate.namespaces import PodModes, UserMapping, pod_modes
from cri.translate.resources import resources
from cri.translate.sysctls import pod_sysctls
from runtime.errors import InvalidSpec, Unsupported

SHM_ANNOTATION = "crib/shm-size"
"""Size of the pod's /dev/shm, "128Mi" or bytes; the pages count in the memory cgroups of those who write them."""
_QUANTITY = re.compile(r"([1-9]\d{0,14})(|k|M|G|T|Ki|Mi|Gi|Ti)")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{letter}i": 1 << (10 * power) for power, letter in enumerate("KMGT", 1)
}
_SHM_LIMIT_BYTES = 1 << 44


@dataclass(frozen=True, slots=True)
class HostPort:
    """One port of the node that leads to the pod; `host_ip` "" is any address."""

    protocol: str
    container_port: int
    host_port: int
    host_ip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPlan:
    """A validated sandbox request, apart from its id.

    `name_key` is what no two live sandboxes share. `hostname` is None in the host's uts namespace. `resolv_conf` None
    means a copy of the host's file. `cgroup_parent` and `log_directory` are "" where the request names none.
    `selinux` are the labels of what its containers share. `privileged` allows privileged containers in the pod.
    """

    name_key: str
    modes: PodModes
    hostname: str | None
    shm_bytes: int
    sysctls: Mapping[str, str]
    cgroup_parent: str
    resolv_conf: str | None
    log_directory: str
    privileged: bool
    host_ports: tuple[HostPort, ...]
    selinux: security.Labels

    @property
    def network(self) -> bool:
        """Whether the pod has a network namespace of its own."""
        return self.modes.network

    @property
    def ipc(self) -> bool:
        """Whether the pod has an ipc namespace of its own."""
        return self.modes.ipc

    @property
    def pid(self) -> bool:
        """Whether the pod's containers share one pid namespace, which needs a pod init."""
        return self.modes.pid == pb.NamespaceMode.POD

    @property
    def user(self) -> UserMapping | None:
        """The mapping of the pod's own user namespace."""
        return self.modes.user

    def etc_hostname(self, node_name: str) -> str:
        """The text of /etc/hostname."""
        return f"{self.hostname if self.hostname is not None else node_name}\n"


def _key(*parts: str | int) -> str:
    """The parts joined by "_", which is escaped in each of them so that no two tuples give one key."""
    return "_".join(str(part).replace("%", "%25").replace("_", "%5F") for part in parts)


def sandbox_key(metadata: pb.PodSandboxMetadata) -> str:
    """`name_namespace_uid_attempt`."""
    return _key(
        name("metadata.name", metadata.name),
        name("metadata.namespace", metadata.namespace),
        name("metadata.uid", metadata.uid),
        metadata.attempt,
    )


def container_key(metadata: pb.ContainerMetadata, sandbox: pb.PodSandboxMetadata) -> str:
    """`container_name_namespace_uid_attempt`, the attempt being the container's."""
    container = name("metadata.name", metadata.name)
    return _key(container, sandbox.name, sandbox.namespace, sandbox.uid, metadata.attempt)


def sandbox_to_pod(
    config: pb.PodSandboxConfig, *, defaults: Defaults | None = None, host: Host | None = None, level: str = ""
) -> PodPlan:
    """The plan of a pod; `level` is its SELinux level where the request names none.

    Raises:
        InvalidSpec: names the field and the value.
        Unsupported: this host can't do it.
    """
    defaults, host = defaults or Defaults(), host or Host()
    if not config.HasField("metadata"):
        raise InvalidSpec("metadata is missing from the sandbox config")
    if config.ByteSize() > REQUEST_LIMIT_BYTES:
        raise InvalidSpec(f"sandbox config: {config.ByteSize()} bytes, the limit is {REQUEST_LIMIT_BYTES}")
    key = sandbox_key(config.metadata)
    labels("labels", dict(config.labels))
    labels("annotations", dict(config.annotations))
    linux = config.linux
    context = linux.security_context
    _check_identity(context)
    modes = pod_modes(context.namespace_options)
    if modes.user is not None and not host.user_namespaces:
        raise Unsupported("userns_options.mode POD: user namespaces are not supported on this host")
    security.profile("seccomp", context.seccomp if context.HasField("seccomp") else None, context.seccomp_profile_path)
    security.profile("apparmor", context.apparmor if context.HasField("apparmor") else None, "")
    for part in (linux.overhead, linux.resources):  # the kubelet's to write; unified is as valid as the host
        resources(part, cgroup_version=2)
    hostname = None
    if modes.uts:
        hostname = etc.hostname(config.hostname or defaults.node_name[: etc.HOSTNAME_LIMIT])
    return PodPlan(
        name_key=key,
        modes=modes,
        hostname=hostname,
        shm_bytes=_shm_bytes(config.annotations.get(SHM_ANNOTATION, ""), defaults.shm_bytes),
        sysctls=pod_sysctls(
            linux.sysctls,
            own_network=modes.network,
            own_ipc=modes.ipc,
            own_user=modes.user is not None,
            default=defaults.sysctls,
        ),
        cgroup_parent=cgroup_parent(linux.cgroup_parent),
        resolv_conf=etc.resolv_conf(config.dns_config),
        log_directory=on_host("log_directory", config.log_directory) if config.log_directory else "",
        privileged=context.privileged,
        host_ports=_host_ports(config) if modes.network else (),
        selinux=security.selinux(
            context.selinux_options if context.HasField("selinux_options") else None,
            level=level,
            enabled=host.selinux,
            privileged=context.privileged,
            types=host.selinux_types,
        ),
    )


def _check_identity(context: pb.LinuxSandboxSecurityContext) -> None:
    """The pod runs no process of the request's identity (a pod init has its own), but nonsense is refused."""
    if context.HasField("run_as_group"):
        identity("run_as_group", context.run_as_group.value)
        if not context.HasField("run_as_user"):
            raise InvalidSpec(f"run_as_group {context.run_as_group.value}: set without run_as_user")
    if context.HasField("run_as_user"):
        identity("run_as_user", context.run_as_user.value)
    for group in context.supplemental_groups:
        identity("supplemental_groups", group)
    if context.supplemental_groups_policy not in pb.SupplementalGroupsPolicy.values():
        raise InvalidSpec(f"supplemental_groups_policy {context.supplemental_groups_policy}: neither Merge nor Strict")


def cgroup_parent(value: str) -> str:
    """A path below the cgroup hierarchy's root, normal and absolute, or a systemd slice's name, or ""."""
    if not value:
        return ""
    no_backsteps("cgroup_parent", bounded("cgroup_parent", value, PATH_LIMIT_BYTES))
    if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in value):
        raise InvalidSpec(f"cgroup_parent {show(value)}: holds a space or a control character")
    if "/" not in value and value.endswith(".slice"):
        return value
    normal = posixpath.normpath(f"/{value.lstrip('/')}")
    if normal == "/":
        raise InvalidSpec(f"cgroup_parent {show(value)}: the root itself can't hold a pod")
    return normal


def _shm_bytes(annotation: str, default: int) -> int:
    if not annotation:
        return default
    match = _QUANTITY.fullmatch(annotation)
    size_bytes = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 4096 <= size_bytes <= _SHM_LIMIT_BYTES:
        raise InvalidSpec(f"annotations {SHM_ANNOTATION} {show(annotation)}: not a size like 128Mi, from 4Ki to 16Ti")
    return size_bytes


def _host_ports(config: pb.PodSandboxConfig) -> tuple[HostPort, ...]:
    found: dict[tuple[str, int, str], HostPort] = {}
    for mapping in config.port_mappings:
        try:
            protocol = pb.Protocol.Name(mapping.protocol).lower()
        except ValueError:
            raise InvalidSpec(f"port_mappings.protocol {mapping.protocol}: not TCP, UDP or SCTP") from None
        if not 0 <= mapping.host_port <= 65535:
            raise InvalidSpec(f"port_mappings.host_port {mapping.host_port}: not a port")
        if mapping.host_port == 0:
            continue  # a declared port of the container, not a mapping
        if not 1 <= mapping.container_port <= 65535:
            raise InvalidSpec(f"port_mappings.container_port {mapping.container_port}: not a port")
        host_ip = ""
        if mapping.host_ip:
            try:
                address = ipaddress.ip_address(mapping.host_ip)
            except ValueError:
                raise InvalidSpec(f"port_mappings.host_ip {show(mapping.host_ip)}: not an IP address") from None
            host_ip = "" if address.is_unspecified and address.version == 4 else str(address)
        port = HostPort(protocol, mapping.container_port, mapping.host_port, host_ip)
        if found.setdefault((protocol, port.host_port, host_ip), port) != port:
            raise InvalidSpec(f"port_mappings.host_port {port.host_port}/{protocol}: leads to two container ports")
    return tuple(found.values())

"""Which namespaces a pod has of its own, and which of them a container joins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cri.api import cri_pb2 as pb
from cri.translate.field import show
from runtime.errors import InvalidSpec
from runtime.spec import IDMapping, Namespace

POD, CONTAINER, NODE, TARGET = (
    pb.NamespaceMode.POD,
    pb.NamespaceMode.CONTAINER,
    pb.NamespaceMode.NODE,
    pb.NamespaceMode.TARGET,
)
_ID_RANGE = 1 << 32


@dataclass(frozen=True, slots=True)
class UserMapping:
    """The one range of uids and the one of gids of a pod with its own user namespace."""

    uid: IDMapping
    gid: IDMapping


@dataclass(frozen=True, slots=True)
class PodModes:
    """What a pod has of its own: `pid` means one pid namespace shared by its containers (POD), None for `user` the
    host's user namespace. The uts namespace goes with the network one, as the kubelet's hostNetwork expects."""

    network: bool
    ipc: bool
    pid: pb.NamespaceMode
    user: UserMapping | None

    @property
    def uts(self) -> bool:
        return self.network


class PodNamespaces(Protocol):
    """Paths of the pod's namespaces, "" for the host's; `pid` is None without a pod init."""

    @property
    def network(self) -> str: ...
    @property
    def ipc(self) -> str: ...
    @property
    def uts(self) -> str: ...
    @property
    def pid(self) -> str | None: ...
    @property
    def user(self) -> str: ...


def _mode(value: pb.NamespaceMode) -> str:
    try:
        return pb.NamespaceMode.Name(value)
    except ValueError:
        return str(value)


def pod_modes(options: pb.NamespaceOption) -> PodModes:
    """A sandbox's namespaces. Raises InvalidSpec for a mode that a pod can't have and for contradictions."""
    for kind, mode, allowed in (
        ("network", options.network, (POD, NODE)),
        ("ipc", options.ipc, (POD, NODE)),
        ("pid", options.pid, (POD, CONTAINER, NODE)),
    ):
        if mode not in allowed:
            raise InvalidSpec(f"namespace_options.{kind} {_mode(mode)}: a sandbox takes {_either(allowed)}")
    if options.target_id:
        raise InvalidSpec(f"namespace_options.target_id {show(options.target_id)}: a sandbox has no target")
    user = user_mapping(options.userns_options)
    if user is not None:
        for kind, mode in (("ipc", options.ipc), ("pid", options.pid)):
            if mode == NODE:
                raise InvalidSpec(f"namespace_options.{kind} NODE: a pod with its own user namespace needs its own")
    return PodModes(options.network == POD, options.ipc == POD, options.pid, user)


def _either(modes: tuple[pb.NamespaceMode, ...]) -> str:
    return " or ".join(_mode(mode) for mode in modes)


def user_mapping(options: pb.UserNamespace) -> UserMapping | None:
    """The mapping of a pod with its own user namespace, None for the host's.

    An absent message is NODE: mode POD, the zero value, without any mapping is how a client says nothing.
    """
    if options.mode == NODE or (options.mode == POD and not options.uids and not options.gids):
        if options.uids or options.gids:
            raise InvalidSpec("userns_options: mode NODE takes no mappings")
        return None
    if options.mode != POD:
        raise InvalidSpec(f"userns_options.mode {_mode(options.mode)}: only POD and NODE can be asked for")
    return UserMapping(_one("uids", list(options.uids)), _one("gids", list(options.gids)))


def _one(kind: str, mappings: list[pb.IDMapping]) -> IDMapping:
    if len(mappings) != 1:
        raise InvalidSpec(f"userns_options.{kind}: {len(mappings)} mappings, exactly one is supported")
    mapping = mappings[0]
    text = f"container {mapping.container_id}, host {mapping.host_id}, length {mapping.length}"
    if mapping.container_id != 0 or mapping.length == 0:
        raise InvalidSpec(f"userns_options.{kind} ({text}): the mapping has to hold id 0 of the container")
    if mapping.host_id + mapping.length > _ID_RANGE - 1:
        raise InvalidSpec(f"userns_options.{kind} ({text}): goes beyond the greatest id")
    return IDMapping(container_id=0, host_id=mapping.host_id, size=mapping.length)


def container_pid_mode(options: pb.NamespaceOption, pod: PodModes) -> pb.NamespaceMode:
    """The pid mode of a container, checked together with its other modes against the pod's.

    Options that are absent or all zero follow the pod. CONTAINER is allowed in every pod, as it only takes away;
    every other difference is a contradiction.
    """
    if options == pb.NamespaceOption():
        return pod.pid
    for kind, mode, own in (("network", options.network, pod.network), ("ipc", options.ipc, pod.ipc)):
        if mode != (POD if own else NODE):
            has = _mode(POD if own else NODE)
            raise InvalidSpec(f"namespace_options.{kind} {_mode(mode)}: the sandbox's mode is {has}")
    if options.HasField("userns_options") and user_mapping(options.userns_options) != pod.user:
        raise InvalidSpec("namespace_options.userns_options: differ from the sandbox's")
    if options.pid == TARGET:
        if not options.target_id:
            raise InvalidSpec("namespace_options.target_id is missing: pid mode TARGET needs a container")
    elif options.target_id:
        raise InvalidSpec(f"namespace_options.target_id {show(options.target_id)}: pid mode is {_mode(options.pid)}")
    if options.pid in (CONTAINER, TARGET) or options.pid == pod.pid:
        return options.pid
    raise InvalidSpec(f"namespace_options.pid {_mode(options.pid)}: the sandbox's mode is {_mode(pod.pid)}")


def container_namespaces(
    pid_mode: pb.NamespaceMode,
    pod: PodModes,
    paths: PodNamespaces,
    *,
    target_pid: str | None,
    own_cgroup: bool,
) -> tuple[Namespace, ...]:
    """The OCI list: the pod's are joined, mount is always new, a type left out is the host's.

    `target_pid` is the pid namespace of the container that mode TARGET names.
    """
    found = [Namespace(type="mount")]
    if pod.user is not None:
        found.append(Namespace(type="user", path=paths.user))
    if pod.network:
        found.append(Namespace(type="network", path=paths.network))
    if pod.ipc:
        found.append(Namespace(type="ipc", path=paths.ipc))
    if pod.uts:
        found.append(Namespace(type="uts", path=paths.uts))
    if pid_mode == CONTAINER:
        found.append(Namespace(type="pid"))
    elif pid_mode == POD:
        if not paths.pid:
            raise InvalidSpec("namespace_options.pid POD: the sandbox has no shared pid namespace")
        found.append(Namespace(type="pid", path=paths.pid))
    elif pid_mode == TARGET:
        if not target_pid:
            raise InvalidSpec("namespace_options.target_id: the target container is not running in this sandbox")
        found.append(Namespace(type="pid", path=target_pid))
    if own_cgroup:
        found.append(Namespace(type="cgroup"))
    return tuple(found)

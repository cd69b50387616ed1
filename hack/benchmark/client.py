"""One CRI socket under measurement: the same client and the same requests for every runtime."""

from __future__ import annotations

import socket
import struct
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cri.api import cri_pb2 as api

LABEL = "crib-bench"
PLAIN, USERNS, SECCOMP, MOUNTS = "plain", "user namespace", "seccomp", "50 mounts"
FEATURES = (PLAIN, USERNS, SECCOMP, MOUNTS)
"""What a start is measured with, beside what all have; "" is a usual pod: seccomp and no_new_privs."""
_MOUNTS = 50
_MAPPING = (api.IDMapping(container_id=0, host_id=1 << 20, length=1 << 16),)
SLEEP = ("sleep", "2147483")
_SERVICES = ("RuntimeService", "ImageService")
_MASKED = (
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
    "/sys/devices/virtual/powercap",
)  # fmt: skip
_READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def _methods(channel: grpc.Channel) -> dict[str, tuple[Any, type[Message]]]:
    found: dict[str, tuple[Any, type[Message]]] = {}
    for name in _SERVICES:
        service = api.DESCRIPTOR.services_by_name[name]
        for method in service.methods:
            request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
            call = channel.unary_unary(
                f"/{service.full_name}/{method.name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            found[method.name] = call, request
    return found


class CallFailed(Exception):
    """A runtime refused a call; the message names both and gives its words."""


@dataclass(slots=True)
class Pod:
    sandbox_id: str
    container_id: str
    started_ms: float


@dataclass(slots=True)
class Endpoint:
    """A runtime behind `unix:///path`; `times` holds the milliseconds of each successful call by its name."""

    name: str
    target: str
    image: str
    run: str
    log_directory: str
    host_network: bool
    timeout_s: float = 60
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cgroup_parent: str = ""
    _serial: int = 0
    _channel: grpc.Channel = field(init=False)
    _calls: dict[str, tuple[Any, type[Message]]] = field(init=False)

    def __post_init__(self) -> None:
        self._channel = grpc.insecure_channel(self.target, options=[("grpc.max_receive_message_length", 16 << 20)])
        self._calls = _methods(self._channel)

    def close(self) -> None:
        self._channel.close()

    def call(self, method: str, **fields: Any) -> Any:
        """The response of one call; its time is recorded. Raises CallFailed."""
        call, request = self._calls[method]
        message = request(**fields)
        begin = time.perf_counter()
        try:
            response = call(message, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise CallFailed(f"{self.name}: {method}: {error.code().name}: {error.details()}") from error
        self.times[method].append((time.perf_counter() - begin) * 1e3)
        return response

    def daemon_pid(self) -> int:
        """The process that listens on the socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(self.target.removeprefix("unix://"))
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", peer)[0]
        return pid

    def prepare(self, cgroup_parent: str) -> None:
        self.cgroup_parent = cgroup_parent
        if not self.call("ImageStatus", image=api.ImageSpec(image=self.image)).image.id:
            self.call("PullImage", image=api.ImageSpec(image=self.image))

    def _modes(self, feature: str) -> api.NamespaceOption:
        network = api.NODE if self.host_network else api.POD
        modes = api.NamespaceOption(network=network, pid=api.CONTAINER, ipc=api.POD)
        if feature == USERNS:
            modes.userns_options.CopyFrom(api.UserNamespace(mode=api.POD, uids=_MAPPING, gids=_MAPPING))
        return modes

    def _mounts(self) -> list[api.Mount]:
        """Directories that are there, as a kubelet's volumes are."""
        paths = [Path(self.log_directory, "volumes", str(number)) for number in range(_MOUNTS)]
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
        return [api.Mount(container_path=f"/volumes/{path.name}", host_path=str(path)) for path in paths]

    def _sandbox(self, feature: str = "") -> api.PodSandboxConfig:
        self._serial += 1
        name = f"bench-{self.run}-{self._serial}"
        return api.PodSandboxConfig(
            metadata=api.PodSandboxMetadata(name=name, uid=name, namespace=LABEL),
            hostname="" if self.host_network else name[:63],
            log_directory=f"{self.log_directory}/{self.name}",
            dns_config=api.DNSConfig(servers=["192.0.2.53"], searches=["bench.invalid"]),
            labels={LABEL: self.run},
            linux=api.LinuxPodSandboxConfig(
                cgroup_parent=self.cgroup_parent,
                security_context=api.LinuxSandboxSecurityContext(
                    namespace_options=self._modes(feature),
                    seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault),
                ),
            ),
        )

    def _container(self, feature: str = "", command: tuple[str, ...] = SLEEP) -> api.ContainerConfig:
        profile = api.SecurityProfile.RuntimeDefault if feature in ("", SECCOMP) else api.SecurityProfile.Unconfined
        return api.ContainerConfig(
            mounts=self._mounts() if feature == MOUNTS else (),
            metadata=api.ContainerMetadata(name="c"),
            image=api.ImageSpec(image=self.image),
            command=command,
            log_path=f"{self._serial}.log",
            labels={LABEL: self.run},
            linux=api.LinuxContainerConfig(
                resources=api.LinuxContainerResources(
                    cpu_shares=102, cpu_period=100_000, cpu_quota=100_000, memory_limit_in_bytes=256 << 20
                ),
                security_context=api.LinuxContainerSecurityContext(
                    namespace_options=self._modes(feature),
                    seccomp=api.SecurityProfile(profile_type=profile),
                    no_new_privs=True,
                    masked_paths=_MASKED,
                    readonly_paths=_READONLY,
                ),
            ),
        )

    def start(self, feature: str = "", command: tuple[str, ...] = SLEEP) -> Pod:
        """RunPodSandbox, CreateContainer and StartContainer of a new pod."""
        sandbox, container = self._sandbox(feature), self._container(feature, command)
        begin = time.perf_counter()
        sandbox_id = self.call("RunPodSandbox", config=sandbox).pod_sandbox_id
        container_id = self.call(
            "CreateContainer", pod_sandbox_id=sandbox_id, config=container, sandbox_config=sandbox
        ).container_id
        self.call("StartContainer", container_id=container_id)
        return Pod(sandbox_id, container_id, (time.perf_counter() - begin) * 1e3)

    def exec_true(self, pod: Pod) -> None:
        answer = self.call("ExecSync", container_id=pod.container_id, cmd=["true"], timeout=30)
        if answer.exit_code:
            raise RuntimeError(f"{self.name}: ExecSync of true ended with exit code {answer.exit_code}")

    def stop(self, pod: Pod) -> float:
        """StopContainer without grace, StopPodSandbox, RemoveContainer, RemovePodSandbox; milliseconds of all four."""
        begin = time.perf_counter()
        self.call("StopContainer", container_id=pod.container_id, timeout=0)
        self.call("StopPodSandbox", pod_sandbox_id=pod.sandbox_id)
        self.call("RemoveContainer", container_id=pod.container_id)
        self.call("RemovePodSandbox", pod_sandbox_id=pod.sandbox_id)
        return (time.perf_counter() - begin) * 1e3

    def sweep(self) -> None:
        """Remove whatever this run left."""
        mine = api.PodSandboxFilter(label_selector={LABEL: self.run})
        for sandbox in self.call("ListPodSandbox", filter=mine).items:
            self.call("StopPodSandbox", pod_sandbox_id=sandbox.id)
            self.call("RemovePodSandbox", pod_sandbox_id=sandbox.id)

"""The CRI's calls about use: of a container, of a pod, of all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cri.api import cri_pb2 as pb
from cri.container import view
from cri.rpc import Call, Handler, streamed
from cri.state.records import ContainerState
from cri.stats import usage
from cri.stats.interfaces import interfaces
from runtime.cgroup.stats import Stats
from runtime.errors import CribError, NotFound

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node
    from cri.sandbox.pod import Pod

# A rate over less than this says more about the clock than about the container.
_RATE_NS = 100_000_000


class StatsCalls:
    """Requests in, answers out. Cgroup files and layers are read by worker threads, one thread per call."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._samples: dict[str, tuple[int, int, int]] = {}  # by container: read_ns, usage_ns, nano cores up to then

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "ContainerStats": self.container,
            "ListContainerStats": self.containers,
            "StreamContainerStats": streamed(self.containers, pb.StreamContainerStatsResponse),
            "PodSandboxStats": self.pod,
            "ListPodSandboxStats": self.pods,
            "StreamPodSandboxStats": streamed(self.pods, pb.StreamPodSandboxStatsResponse),
        }

    async def container(self, request: pb.ContainerStatsRequest, call: Call) -> pb.ContainerStatsResponse:
        found = self._node.containers.find(request.container_id)
        if found is None or not found.shown:
            raise NotFound(f"no container {request.container_id}")
        stats = await self._node.work(self._read, [found])
        if not stats:
            raise NotFound(f"{found.title} is {found.state}: it uses nothing that could be counted")
        return pb.ContainerStatsResponse(stats=stats[0])

    async def containers(self, request: pb.ListContainerStatsRequest, call: Call) -> pb.ListContainerStatsResponse:
        given = request.filter
        wanted = pb.ContainerFilter(
            id=given.id, pod_sandbox_id=given.pod_sandbox_id, label_selector=given.label_selector
        )
        chosen = [self._node.containers.get(listed.id) for listed in view.listed(self._node, wanted)]
        self._forget()
        return pb.ListContainerStatsResponse(stats=await self._node.work(self._read, chosen))

    async def pod(self, request: pb.PodSandboxStatsRequest, call: Call) -> pb.PodSandboxStatsResponse:
        pod = self._node.pods.get(request.pod_sandbox_id)
        return pb.PodSandboxStatsResponse(stats=await self._node.work(self._read_pod, pod))

    async def pods(self, request: pb.ListPodSandboxStatsRequest, call: Call) -> pb.ListPodSandboxStatsResponse:
        given = request.filter
        only = self._node.pods.find(given.id) if given.id else None
        chosen = [
            pod
            for pod in self._node.pods
            if pod.ready
            and (not given.id or pod is only)
            and all(pod.config.labels.get(key) == value for key, value in given.label_selector.items())
        ]
        self._forget()
        return pb.ListPodSandboxStatsResponse(stats=await self._node.work(self._read_pods, chosen))

    def _read_pods(self, pods: list[Pod]) -> list[pb.PodSandboxStats]:
        return [self._read_pod(pod) for pod in pods]

    def _read_pod(self, pod: Pod) -> pb.PodSandboxStats:
        """Blocks. The pod's figures are its containers', with those of its own cgroup for the processes."""
        config = pod.config
        attributes = pb.PodSandboxAttributes(
            id=pod.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )
        alive = [container for container in list(pod.containers.values()) if container.alive]
        parts, processes, now_ns = [], 0, time.time_ns()
        for container in alive:
            try:
                parts += self._read([container])
                processes += len(self._node.cgroups.procs(container.record.cgroup_path))
            except CribError:  # it ended meanwhile
                continue
        cpu, memory = usage.total(parts, now_ns)
        linux = pb.LinuxPodSandboxStats(
            cpu=cpu,
            memory=memory,
            network=self._network(pod, now_ns),
            process=pb.ProcessUsage(timestamp=now_ns, process_count=pb.UInt64Value(value=processes)),
            containers=parts,
        )
        return pb.PodSandboxStats(attributes=attributes, linux=linux)

    def _network(self, pod: Pod, now_ns: int) -> pb.NetworkUsage | None:
        """Blocks."""
        found = interfaces(pod)
        return None if found is None else usage.network(found, now_ns)

    def _read(self, containers: list[Container]) -> list[pb.ContainerStats]:
        """Blocks. The figures of those that run; one that ends meanwhile is left out."""
        found = []
        for container in containers:
            if container.state is not ContainerState.RUNNING:
                continue
            try:
                stats = self._node.cgroups.stats(container.record.cgroup_path)
                layer = self._layer(container)
            except CribError:
                continue
            listed = container.listed
            attributes = pb.ContainerAttributes(
                id=container.id, metadata=listed.metadata, labels=listed.labels, annotations=listed.annotations
            )
            found.append(usage.container_stats(attributes, stats, self._nano_cores(container, stats), layer))
        return found

    def _layer(self, container: Container) -> pb.FilesystemUsage:
        used, inodes = self._node.images.upper_usage(container.id)
        return pb.FilesystemUsage(
            timestamp=time.time_ns(),
            fs_id=pb.FilesystemIdentifier(mountpoint=self._node.layers_dir),
            used_bytes=pb.UInt64Value(value=used),
            inodes_used=pb.UInt64Value(value=inodes),
        )

    def _nano_cores(self, container: Container, stats: Stats) -> int | None:
        """CPU time per second since the call before, in ns; since the start at the first call."""
        if stats.cpu is None:
            return None
        before = self._samples.get(container.id, (container.record.started_ns, 0, 0))
        elapsed_ns = stats.read_ns - before[0]
        if elapsed_ns < _RATE_NS and before[2]:
            return before[2]
        rate = max(stats.cpu.usage_ns - before[1], 0) * 1_000_000_000 // max(elapsed_ns, 1)
        self._samples[container.id] = (stats.read_ns, stats.cpu.usage_ns, rate)
        return rate

    def _forget(self) -> None:
        """Samples of containers that are gone."""
        for gone in [id for id in self._samples if self._node.containers.find(id) is None]:
            del self._samples[gone]

"""The CRI's calls about metrics: figures read and labelled."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from cri.api import cri_pb2 as pb
from cri.rpc import Call, Handler, streamed
from cri.state.records import ContainerState
from cri.stats import metrics
from cri.stats.interfaces import interfaces
from runtime.cgroup.processes import look
from runtime.errors import CribError

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node
    from cri.sandbox.pod import Pod

_OWN: Final = "POD"
"""What stands for a container's name in a metric of the pod's own, as in cAdvisor's."""


class MetricsCalls:
    """Requests in, answers out. What is counted is read by worker threads, one thread per call."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "ListMetricDescriptors": self.descriptors,
            "ListPodSandboxMetrics": self.list,
            "StreamPodSandboxMetrics": streamed(self.list, pb.StreamPodSandboxMetricsResponse),
        }

    async def descriptors(
        self, request: pb.ListMetricDescriptorsRequest, call: Call
    ) -> pb.ListMetricDescriptorsResponse:
        return pb.ListMetricDescriptorsResponse(descriptors=metrics.descriptors())

    async def list(self, request: pb.ListPodSandboxMetricsRequest, call: Call) -> pb.ListPodSandboxMetricsResponse:
        """Those of the pods that are ready, and of the containers that run in them."""
        pods = [pod for pod in self._node.pods if pod.ready]
        return pb.ListPodSandboxMetricsResponse(pod_metrics=await self._node.work(self._read, pods))

    def _read(self, pods: Sequence[Pod]) -> Sequence[pb.PodSandboxMetrics]:
        """Blocks."""
        disk = _disk(self._node.layers_dir)
        return [
            pb.PodSandboxMetrics(
                pod_sandbox_id=pod.id, metrics=self._of_pod(pod), container_metrics=self._of_containers(pod, disk)
            )
            for pod in pods
        ]

    def _of_pod(self, pod: Pod) -> Sequence[pb.Metric]:
        base = _base(pod, _OWN, pod.record.cgroup_path, "", pod.id)
        return metrics.of_pod(base, interfaces(pod) or (), time.time_ns())

    def _of_containers(self, pod: Pod, disk: metrics.FileSystem) -> Sequence[pb.ContainerMetrics]:
        found = []
        for container in tuple(pod.containers.values()):
            if container.state is not ContainerState.RUNNING:
                continue
            try:
                sample = self._sample(container, disk)
            except (CribError, OSError):  # it ended meanwhile
                continue
            record = container.record
            base = _base(pod, container.config.metadata.name, record.cgroup_path, record.image_name, container.id)
            found.append(pb.ContainerMetrics(container_id=container.id, metrics=metrics.of_container(base, sample)))
        return found

    def _sample(self, container: Container, disk: metrics.FileSystem) -> metrics.Sample:
        path = container.record.cgroup_path
        used, _ = self._node.images.upper_usage(container.id)
        return metrics.Sample(
            stats=self._node.cgroups.stats(path),
            processes=look(self._node.cgroups.procs(path)),
            layer=dataclasses.replace(disk, used_bytes=used),
            resources=container.resources,
            started_ns=container.record.started_ns,
            device_name=_device_name,
        )


def _disk(root: str) -> metrics.FileSystem:
    """The file system of all writable layers, nothing used yet. Blocks."""
    disk, device = os.statvfs(root), os.stat(root).st_dev
    return metrics.FileSystem(
        device=_device_name(os.major(device), os.minor(device)),
        used_bytes=0,
        size_bytes=disk.f_blocks * disk.f_frsize,
        inodes_free=disk.f_favail,
        inodes=disk.f_files,
    )


def _base(pod: Pod, container: str, path: str, image: str, id: str) -> tuple[str, ...]:
    """The values of `metrics.BASE`."""
    metadata = pod.config.metadata
    return container, path, image, id, metadata.namespace, metadata.name


@functools.cache
def _device_name(major: int, minor: int) -> str:
    """A block device's path, or its numbers where there is none, as for a file system without one."""
    try:
        return f"/dev/{os.path.basename(os.readlink(f'/sys/dev/block/{major}:{minor}'))}"
    except OSError:
        return f"{major}:{minor}"

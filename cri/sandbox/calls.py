"""The CRI's calls about pod sandboxes."""

from __future__ import annotations

from collections.abc import Mapping

from cri.api import cri_pb2 as pb
from cri.daemon import log
from cri.node import Node
from cri.rpc import Call, Handler, streamed
from cri.sandbox import end, view
from cri.sandbox.run import run
from cri.translate.resources import resources
from runtime.errors import InvalidSpec


class SandboxCalls:
    """Requests in, answers out; what is done is in this package's other modules."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "RunPodSandbox": self.run,
            "StopPodSandbox": self.stop,
            "RemovePodSandbox": self.remove,
            "PodSandboxStatus": self.status,
            "ListPodSandbox": self.list,
            "StreamPodSandboxes": streamed(self.list, pb.StreamPodSandboxesResponse),
            "UpdatePodSandboxResources": self.update,
        }

    async def run(self, request: pb.RunPodSandboxRequest, call: Call) -> pb.RunPodSandboxResponse:
        if not request.HasField("config"):
            raise InvalidSpec("config is missing")
        pod = await run(self._node, request.config, request.runtime_handler)
        log.bind(sandbox_id=pod.id)
        return pb.RunPodSandboxResponse(pod_sandbox_id=pod.id)

    async def stop(self, request: pb.StopPodSandboxRequest, call: Call) -> pb.StopPodSandboxResponse:
        if pod := self._node.pods.find(request.pod_sandbox_id):
            log.bind(sandbox_id=pod.id)
            await end.stop(self._node, pod)
        return pb.StopPodSandboxResponse()

    async def remove(self, request: pb.RemovePodSandboxRequest, call: Call) -> pb.RemovePodSandboxResponse:
        if pod := self._node.pods.find(request.pod_sandbox_id):
            log.bind(sandbox_id=pod.id)
            await end.remove(self._node, pod)
        return pb.RemovePodSandboxResponse()

    async def status(self, request: pb.PodSandboxStatusRequest, call: Call) -> pb.PodSandboxStatusResponse:
        pod = self._node.pods.get(request.pod_sandbox_id)
        found = view.info(self._node, pod) if request.verbose else {}
        return pb.PodSandboxStatusResponse(status=view.status(pod), info=found)

    async def list(self, request: pb.ListPodSandboxRequest, call: Call) -> pb.ListPodSandboxResponse:
        return pb.ListPodSandboxResponse(items=view.listed(self._node, request.filter))

    async def update(
        self, request: pb.UpdatePodSandboxResourcesRequest, call: Call
    ) -> pb.UpdatePodSandboxResourcesResponse:
        """Take note of the pod's new resources (KEP-1287): the pod's cgroup itself is the kubelet's to write."""
        pod = self._node.pods.get(request.pod_sandbox_id)
        log.bind(sandbox_id=pod.id)
        async with pod.changing():
            pod.must_be_ready()
            for part in (request.resources, request.overhead):
                resources(part, cgroup_version=self._node.cgroups.version)
            self._node.save(pod, resources=request.SerializeToString())
        return pb.UpdatePodSandboxResourcesResponse()

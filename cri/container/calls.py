"""The CRI's calls about containers."""

from __future__ import annotations

from collections.abc import Mapping

from cri.api import cri_pb2 as pb
from cri.container import view
from cri.container.container import Container
from cri.container.create import create
from cri.container.exec import exec_sync
from cri.container.remove import remove
from cri.container.start import start
from cri.container.stop import stop
from cri.container.update import update
from cri.daemon import log
from cri.node import Node
from cri.rpc import Call, Handler, streamed
from runtime.errors import InvalidSpec, NotFound


class ContainerCalls:
    """Requests in, answers out; what is done is in this package's other modules."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "CreateContainer": self.create,
            "StartContainer": self.start,
            "StopContainer": self.stop,
            "RemoveContainer": self.remove,
            "ContainerStatus": self.status,
            "ListContainers": self.list,
            "StreamContainers": streamed(self.list, pb.StreamContainersResponse),
            "ExecSync": self.exec_sync,
            "UpdateContainerResources": self.update,
        }

    def _find(self, id: str) -> Container | None:
        container = self._node.containers.find(id)
        if container is None or not container.shown:
            return None
        log.bind(sandbox_id=container.pod.id, container_id=container.id)
        return container

    def _get(self, id: str) -> Container:
        container = self._find(id)
        if container is None:
            raise NotFound(f"no container {id}")
        return container

    async def create(self, request: pb.CreateContainerRequest, call: Call) -> pb.CreateContainerResponse:
        if not request.HasField("config"):
            raise InvalidSpec("config is missing")
        pod = self._node.pods.get(request.pod_sandbox_id)
        log.bind(sandbox_id=pod.id)
        container = await create(self._node, pod, request.config)
        log.bind(container_id=container.id)
        return pb.CreateContainerResponse(container_id=container.id)

    async def start(self, request: pb.StartContainerRequest, call: Call) -> pb.StartContainerResponse:
        await start(self._node, self._get(request.container_id))
        return pb.StartContainerResponse()

    async def stop(self, request: pb.StopContainerRequest, call: Call) -> pb.StopContainerResponse:
        if container := self._find(request.container_id):
            await stop(self._node, container, request.timeout)
        return pb.StopContainerResponse()

    async def remove(self, request: pb.RemoveContainerRequest, call: Call) -> pb.RemoveContainerResponse:
        if container := self._find(request.container_id):
            await remove(self._node, container)
        return pb.RemoveContainerResponse()

    async def status(self, request: pb.ContainerStatusRequest, call: Call) -> pb.ContainerStatusResponse:
        container = self._get(request.container_id)
        found = view.info(self._node, container) if request.verbose else {}
        return pb.ContainerStatusResponse(status=view.status(container), info=found)

    async def list(self, request: pb.ListContainersRequest, call: Call) -> pb.ListContainersResponse:
        return pb.ListContainersResponse(containers=view.listed(self._node, request.filter))

    async def exec_sync(self, request: pb.ExecSyncRequest, call: Call) -> pb.ExecSyncResponse:
        if request.timeout < 0:
            raise InvalidSpec(f"timeout {request.timeout} is below zero")
        container = self._get(request.container_id)
        stdout, stderr, code = await exec_sync(self._node, container, list(request.cmd), request.timeout)
        return pb.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=code)

    async def update(
        self, request: pb.UpdateContainerResourcesRequest, call: Call
    ) -> pb.UpdateContainerResourcesResponse:
        if not request.HasField("linux"):
            raise InvalidSpec("linux is missing: there is nothing to update")
        await update(self._node, self._get(request.container_id), request.linux)
        return pb.UpdateContainerResourcesResponse()

"""Exec, Attach, PortForward and ReopenContainerLog."""

from __future__ import annotations

from collections.abc import Mapping

from cri.api import cri_pb2 as pb
from cri.container.container import Container
from cri.container.exec import exec_start
from cri.container.log import reopen
from cri.daemon import log
from cri.node import Node
from cri.rpc import Call, Handler
from cri.state.records import ContainerState
from cri.streaming.request import Attach, Exec, Forward, Streams
from cri.streaming.server import StreamingServer
from runtime.errors import InvalidSpec, NotFound, WrongState

_MAX_PORT = 65535


class StreamingCalls:
    """Checks a request and answers with the address where it may be taken up."""

    def __init__(self, node: Node, server: StreamingServer) -> None:
        self._node = node
        self._server = server

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "Exec": self.exec,
            "Attach": self.attach,
            "PortForward": self.port_forward,
            "ReopenContainerLog": self.reopen_log,
        }

    def _running(self, id: str) -> Container:
        container = self._node.containers.find(id)
        if container is None or not container.shown:
            raise NotFound(f"no container {id}")
        log.bind(sandbox_id=container.pod.id, container_id=container.id)
        if container.state is not ContainerState.RUNNING:
            raise WrongState(f"{container.title} is not running")
        return container

    async def exec(self, request: pb.ExecRequest, call: Call) -> pb.ExecResponse:
        streams = _streams(request)
        container = self._running(request.container_id)
        exec_start(self._node, container, list(request.cmd))  # what can be refused now should be
        return pb.ExecResponse(url=self._server.url(Exec(container, tuple(request.cmd), streams)))

    async def attach(self, request: pb.AttachRequest, call: Call) -> pb.AttachResponse:
        streams = _streams(request)
        container = self._running(request.container_id)
        if streams.tty and not container.config.tty:
            raise InvalidSpec(f"{container.title} has no terminal")
        return pb.AttachResponse(url=self._server.url(Attach(container, streams)))

    async def port_forward(self, request: pb.PortForwardRequest, call: Call) -> pb.PortForwardResponse:
        if not request.pod_sandbox_id:
            raise InvalidSpec("pod_sandbox_id is missing")
        if bad := [port for port in request.port if not 0 < port <= _MAX_PORT]:
            raise InvalidSpec(f"port {bad[0]} is none")
        pod = self._node.pods.get(request.pod_sandbox_id)
        log.bind(sandbox_id=pod.id)
        pod.must_be_ready()
        return pb.PortForwardResponse(url=self._server.url(Forward(pod, tuple(request.port))))

    async def reopen_log(self, request: pb.ReopenContainerLogRequest, call: Call) -> pb.ReopenContainerLogResponse:
        """Answered once every later byte goes to a new file. Raises WrongState, and makes no file, unless it runs."""
        container = self._running(request.container_id)
        await reopen(self._node, container)
        return pb.ReopenContainerLogResponse()


def _streams(request: pb.ExecRequest | pb.AttachRequest) -> Streams:
    """Raises InvalidSpec for what can't be asked for together."""
    if not request.container_id:
        raise InvalidSpec("container_id is missing")
    if request.tty and request.stderr:
        raise InvalidSpec("tty and stderr exclude each other")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidSpec("one of stdin, stdout and stderr must be set")
    return Streams(request.stdin, request.stdout, request.stderr, request.tty)

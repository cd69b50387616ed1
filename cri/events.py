"""What happens to pods and containers, told as it happens (GetContainerEvents)."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

from cri.api import cri_pb2 as pb
from cri.container import view as containers
from cri.sandbox import view as pods
from cri.state.records import ContainerState, SandboxState
from runtime.errors import Exhausted

_Queue: TypeAlias = "asyncio.Queue[pb.ContainerEventResponse | Exhausted | None]"

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.rpc import Call, Handler
    from cri.sandbox.pod import Pod

BACKLOG: Final = 1000
"""Events that wait for one subscriber. The stream of one that falls further behind ends, and it has to list again."""

_CONTAINER: Final = {
    ContainerState.CREATED: pb.CONTAINER_CREATED_EVENT,
    ContainerState.RUNNING: pb.CONTAINER_STARTED_EVENT,
    ContainerState.EXITED: pb.CONTAINER_STOPPED_EVENT,
}


class Events:
    """The subscribers. Without one nothing is made, and telling costs nothing."""

    def __init__(self) -> None:
        self._queues: weakref.WeakSet[_Queue] = weakref.WeakSet()  # a subscriber that is gone leaves nothing

    def handlers(self) -> Mapping[str, Handler]:
        return {"GetContainerEvents": self.subscribe}

    def subscribe(self, request: pb.GetEventsRequest, call: Call) -> AsyncIterator[pb.ContainerEventResponse]:
        """What happens from now on, until the caller or cribd goes. Raises Exhausted for one that doesn't read."""
        queue: _Queue = asyncio.Queue(BACKLOG)
        self._queues.add(queue)
        return _read(queue)

    def close(self) -> None:
        """End all streams."""
        for queue in self._queues:
            _end(queue, None)

    def pod_became(self, pod: Pod, before: SandboxState, now_ns: int) -> None:
        """Tell of the pod's new state, if it is one."""
        state = pod.record.state
        if state is before:
            return
        if state is SandboxState.READY:
            self._tell(pb.CONTAINER_CREATED_EVENT, pod.id, pod, now_ns)
            self._tell(pb.CONTAINER_STARTED_EVENT, pod.id, pod, now_ns)
        elif before is SandboxState.READY:
            self._tell(pb.CONTAINER_STOPPED_EVENT, pod.id, pod, now_ns)

    def container_became(self, container: Container, before: ContainerState, now_ns: int) -> None:
        """Tell of the container's new state, if it is one."""
        state = container.state
        if state is not before and (kind := _CONTAINER.get(state)) is not None:
            self._tell(kind, container.id, container.pod, now_ns)

    def removed(self, id: str, pod: Pod, now_ns: int) -> None:
        """Tell that the pod, or a container of it, is gone."""
        self._tell(pb.CONTAINER_DELETED_EVENT, id, pod, now_ns)

    def _tell(self, kind: pb.ContainerEventType, id: str, pod: Pod, now_ns: int) -> None:
        if not self._queues:
            return
        event = pb.ContainerEventResponse(
            container_id=id,
            container_event_type=kind,
            created_at=now_ns,
            pod_sandbox_status=pods.status(pod),
            containers_statuses=[containers.status(one) for one in pod.containers.values() if one.shown],
        )
        for queue in tuple(self._queues):
            if queue.full():
                self._queues.discard(queue)
                _end(queue, Exhausted(f"{BACKLOG} events were not read: list again, and subscribe again"))
            else:
                queue.put_nowait(event)


async def _read(queue: _Queue) -> AsyncIterator[pb.ContainerEventResponse]:
    while (event := await queue.get()) is not None:
        if isinstance(event, Exhausted):
            raise event
        yield event


def _end(queue: _Queue, last: Exhausted | None) -> None:
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(last)

"""One container in memory: its record, the request, and the events that others wait for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from cri.api import cri_pb2 as pb
from cri.container.log import close_log
from cri.state.records import ContainerRecord, ContainerState
from runtime.engine import ContainerExit, ContainerStart, ExecStart, LogFile, LogLoss
from runtime.images import RootFs
from runtime.spec import Spec

if TYPE_CHECKING:
    from cri.sandbox.pod import Pod

_STATES: Final = {
    ContainerState.CREATING: pb.ContainerState.CONTAINER_CREATED,
    ContainerState.CREATED: pb.ContainerState.CONTAINER_CREATED,
    ContainerState.STARTING: pb.ContainerState.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.ContainerState.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.ContainerState.CONTAINER_EXITED,
}


class Container:
    """`ended` is set once it is EXITED, or never will run. `stop_by` is the loop's time of the earliest stop asked for.

    `spec` (until its end) and `rootfs` (until its start) are None where they have to be read back. `prepared` and
    `log`, which is being opened, are for the start to come.
    `command` is the last one that was run in it, without a terminal: a probe's is the same each time.
    `removing`: RemoveContainer has begun. `settled`: its cgroup has been given back.
    `log_loss`: what of its output its monitor said isn't in its log.
    `exit` is an exit that was told before the start that it belongs to had been recorded.
    """

    def __init__(self, record: ContainerRecord, config: pb.ContainerConfig, pod: Pod) -> None:
        self.config = config
        self.pod = pod
        self.spec: Spec | None = None
        self.rootfs: RootFs | None = None
        self.prepared: ContainerStart | None = None
        self.log: asyncio.Task[LogFile | None] | None = None
        self.command: ExecStart | None = None
        self.exit: ContainerExit | None = None
        self.log_loss = LogLoss()
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.stop_by: float | None = None
        self.removing = False
        self.settled = False
        self.listed = pb.Container(
            id=record.id,
            pod_sandbox_id=record.sandbox_id,
            metadata=config.metadata,
            created_at=record.created_ns,
            labels=config.labels,
            annotations=config.annotations,
        )
        self.name = self.name_of(pod, config.metadata)
        self.show(record)

    @staticmethod
    def name_of(pod: Pod, metadata: pb.ContainerMetadata) -> tuple[object, ...]:
        """What two containers can't have in common."""
        return ("container", pod.id, metadata.name, metadata.attempt)

    def show(self, record: ContainerRecord) -> None:
        """Take `record` as the container's: let lists say so, and wake who waits for it."""
        self.record = record
        self.listed.state = _STATES[record.state]
        self.listed.image.image = record.image_name
        self.listed.image.user_specified_image = record.image_name
        self.listed.image_ref = record.image_ref
        self.listed.image_id = record.image_id
        if record.state in (ContainerState.RUNNING, ContainerState.EXITED):
            self.started.set()
        if record.state is ContainerState.EXITED:
            self.ended.set()

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def state(self) -> ContainerState:
        return self.record.state

    @property
    def resources(self) -> pb.LinuxContainerResources:
        """The limits in force, as requested last."""
        if self.record.resources:
            return pb.LinuxContainerResources.FromString(self.record.resources)
        return self.config.linux.resources

    def unprepare(self) -> None:
        """Drop what was made for a start that doesn't come soon: its log is opened again then."""
        if self.log:
            self.log.add_done_callback(close_log)
        self.log = self.prepared = None

    @property
    def alive(self) -> bool:
        """Whether it has processes, or is about to."""
        return self.state in (ContainerState.STARTING, ContainerState.RUNNING)

    @property
    def shown(self) -> bool:
        """Whether lists have it: not before CreateContainer is through."""
        return self.state is not ContainerState.CREATING

    @property
    def title(self) -> str:
        """The container for people: "container name (id)"."""
        return f"container {self.config.metadata.name} ({self.id[:12]})"

"""One pod in memory: its record, the request, its containers, and the lock of all of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from cri.api import cri_pb2 as pb
from cri.state.records import SandboxRecord, SandboxState
from cri.translate.sandbox import PodPlan
from runtime import engine
from runtime.errors import Unavailable, WrongState

if TYPE_CHECKING:
    from cri.container.container import Container


class Pod:
    """`running` is the engine's pod, None where its monitor is gone, or can't be talked to: `trouble` says why.

    `stopping` is set by StopPodSandbox for good.
    """

    def __init__(self, record: SandboxRecord, config: pb.PodSandboxConfig, plan: PodPlan) -> None:
        self.config = config
        self.plan = plan
        self.running: engine.Pod | None = None
        self.trouble = ""
        self.stopping = record.state is SandboxState.NOTREADY
        self.containers: dict[str, Container] = {}
        self._lock = asyncio.Lock()
        meta = config.metadata
        self.listed = pb.PodSandbox(
            id=record.id,
            metadata=meta,
            created_at=record.created_ns,
            labels=config.labels,
            annotations=config.annotations,
            runtime_handler=record.handler,
        )
        self.name = ("sandbox", plan.name_key)
        self.show(record)

    def show(self, record: SandboxRecord) -> None:
        """Take `record` as the pod's, and let lists say so."""
        self.record = record
        self.listed.state = (
            pb.PodSandboxState.SANDBOX_READY
            if record.state is SandboxState.READY
            else pb.PodSandboxState.SANDBOX_NOTREADY
        )

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def title(self) -> str:
        """The pod for people: "namespace/name (id)"."""
        meta = self.config.metadata
        return f"pod {meta.namespace}/{meta.name} ({self.id[:12]})"

    @property
    def monitor(self) -> engine.Pod:
        """The engine's pod. Raises Unavailable while there is none to talk to."""
        if self.running is None:
            raise Unavailable(f"{self.title}: {self.trouble or 'its monitor does not answer'}")
        return self.running

    @property
    def ready(self) -> bool:
        return self.record.state is SandboxState.READY and not self.stopping

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """The pod's one lock: for every change of what the pod consists of.

        Never held across a wait for a container's behaviour: grace periods, starts, streams.
        """
        async with self._lock:
            yield

    def must_be_ready(self) -> None:
        """Raises WrongState for a pod that takes no containers any more."""
        if not self.ready:
            raise WrongState(f"{self.title} is {'being stopped' if self.stopping else 'not ready'}")

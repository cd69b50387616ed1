"""What cribd holds while it runs: the rooms below, the records, and the pods and containers by id."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from cri.config import Config
from cri.container.container import Container
from cri.container.turns import Turns
from cri.container.user import Users
from cri.events import Events
from cri.flights import Flights
from cri.handlers import Handlers
from cri.metrics import Metrics
from cri.sandbox.pod import Pod
from cri.state.index import Index, Names
from cri.state.records import ContainerRecord, SandboxRecord, Timeline
from cri.state.store import Store
from cri.translate.defaults import Host
from net import Network
from net.netns import Pins
from runtime.cgroup import Cgroups
from runtime.engine import Engine
from runtime.images import Images

P = ParamSpec("P")
T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Node:
    """One cribd. All of it belongs to the event loop's thread; blocking calls of the rooms go through `work`."""

    def __init__(
        self,
        config: Config,
        store: Store,
        engine: Engine,
        images: Images,
        network: Network,
        cgroups: Cgroups,
        pins: Pins,
        host: Host,
    ) -> None:
        self.config = config
        self.store = store
        self.engine = engine
        self.images = images
        self.network = network
        self.cgroups = cgroups
        self.pins = pins
        self.pods: Index[Pod] = Index("pod sandbox")
        self.containers: Index[Container] = Index("container")
        self.making: dict[str, Pod] = {}
        self.names = Names()
        self.users = Users(images)
        self.flights = Flights()
        self.turns = Turns()
        self.events = Events()
        self.metrics = Metrics(self) if config.metrics.port else None
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.defaults = config.defaults.translated()
        self.host = host
        self.handlers = Handlers(config.handlers, host)
        self.cgroup_parent = config.cgroup.parent or cgroups.default_parent(config.instance)
        self._workers = ThreadPoolExecutor(config.limits.workers, "work")
        self._pullers = ThreadPoolExecutor(config.limits.pulls, "pull")
        self._tasks: set[asyncio.Task[object]] = set()

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a blocking call, made by a thread of the one bounded pool, with this task's log context."""
        return await self._in(self._workers, function, *args, **kwargs)

    async def pull(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `work`, by threads for what may take minutes, so that pulls never hold up a start."""
        return await self._in(self._pullers, function, *args, **kwargs)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
        result: T = await asyncio.get_running_loop().run_in_executor(pool, call)
        return result

    def spawn(self, work: asyncio.Task[object]) -> None:
        """Keep a background task alive until it is done; its failure is logged."""
        self._tasks.add(work)
        work.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _logger.error("background work failed", exc_info=error)

    @staticmethod
    def new_id() -> str:
        """A pod's or container's id: 64 hexadecimal digits."""
        return os.urandom(32).hex()

    @staticmethod
    def now_ns() -> int:
        """The time in ns since the epoch."""
        return time.time_ns()

    def directory(self, sandbox_id: str) -> Path:
        """Where a pod's own files are: <state>/pods/<id>."""
        return Path(self.config.state, "pods", sandbox_id)

    @property
    def layers_dir(self) -> str:
        """Where containers' writable layers are, as ImageFsInfo names their file system."""
        return self.config.images.containers_dir or self.config.root

    def cgroup_of(self, pod: Pod, container_id: str) -> str:
        """The cgroup of one of the pod's containers."""
        if pod.plan.cgroup_parent:
            return self.cgroups.join_path(pod.plan.cgroup_parent, container_id)
        return self.cgroups.join_path(self.cgroup_parent, pod.id, container_id)

    def save(self, pod: Pod, timeline: Timeline | None = None, **changes: object) -> None:
        """Change a pod's record, on disk first."""
        record: SandboxRecord = msgspec.structs.replace(pod.record, **changes)
        self.store.put_sandbox(record, timeline)
        before = pod.record.state
        pod.show(record)
        self.events.pod_became(pod, before, self.now_ns())

    def save_container(self, container: Container, spec: bytes | None = None, **changes: object) -> None:
        """Change a container's record, on disk first."""
        record: ContainerRecord = msgspec.structs.replace(container.record, **changes)
        self.store.put_container(record, spec)
        before = container.state
        container.show(record)
        self.events.container_became(container, before, self.now_ns())

    async def close(self, timeout_s: float) -> None:
        """Let running calls finish, for at most `timeout_s`; the next cribd takes up the rest. Pods keep running."""
        late = await self.flights.land(timeout_s)
        if late:
            _logger.warning("calls cut off by the end of cribd", extra={"fields": {"calls": late}})
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pullers.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.store.close()

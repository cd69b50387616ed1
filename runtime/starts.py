"""Containers on their way to running: what cribd asks their pod's monitor for, and what it does meanwhile."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from runtime import hooks
from runtime.channel import Channel
from runtime.errors import CribError, DeadlineExceeded
from runtime.external import Bundle, Call
from runtime.linux.userns import mapped
from runtime.plan.compile import HOOKS_ROOT, Environment, Start, compile_start, id_maps
from runtime.plan.plan import encode
from runtime.replies import failure
from runtime.request import ContainerStart, LogFile, Started, StepTiming
from runtime.spec import Hooks, Linux
from runtime.zygote.messages import Kind

START_TIMEOUT_S: Final = 60.0


class Starts:
    """Those of one pod. `ask` is `Pod.request`."""

    def __init__(
        self, channel: Channel, environment: Environment, ask: Callable[..., Awaitable[object]], run_hooks: hooks.Run
    ) -> None:
        self._channel = channel
        self._environment = environment
        self._ask = ask
        self._run_hooks = run_hooks
        self._prepared: dict[str, tuple[Start, bytes]] = {}
        self._starting: dict[str, Callable[[int], Awaitable[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def prepare(self, request: ContainerStart) -> bool:
        """Have the process of a `start` to come cloned ahead, without its log: it waits, until `forget` at the latest.

        False where others would have to be held still meanwhile, or hooks or a runtime are to be run. Raises
        InvalidSpec, Unsupported, Unavailable.
        """
        if request.runtime or request.spec.hooks or request.pid_target:
            return False
        start = compile_start(request.spec, request.rootfs, request.cgroup, self._environment)
        if start.pid != "new":
            return False
        plan = encode(start.plan)
        self._channel.post(Kind.PREPARE, (), lambda _: None, **_asked(request, start, plan))
        self._prepared[request.id] = start, plan
        return True

    async def start(self, request: ContainerStart) -> Started:
        """Start a container. Raises StepFailed, with the cause, after which nothing of it is left in the monitor."""
        begun_ns = time.time_ns()
        found = request.spec.hooks or Hooks()
        external: Bundle | None = None
        call: Call | None = None
        state: dict[str, object] = {}
        created: Callable[[int], Awaitable[None]] = partial(self._created, found, state)
        if request.id in self._prepared:
            start, plan = self._prepared.pop(request.id)
        elif request.runtime:
            external = Bundle(request.runtime, self._environment.directory, request.id)
            call = external.create(request.spec, request.rootfs, self._environment, request.cgroup.kill_dirs)
            start = Start(call.plan, "host", "", request.spec.process.terminal)
            plan, created = encode(start.plan), external.start
            request = dataclasses.replace(request, pid_target="")  # the runtime joins what paths lead to
        else:
            bundle = self._bundle(request) if request.spec.hooks else ""
            state = hooks.state(request.id, "creating", bundle, request.spec.annotations)
            start = compile_start(request.spec, request.rootfs, request.cgroup, self._environment, state)
            plan, created = encode(start.plan), partial(self._created, found, state)
        sent_ns = time.time_ns()
        log = request.log
        self._starting[request.id] = created
        try:
            answer = self._channel.request(
                Kind.START,
                (*(call.descriptors if call else ()), *((log.fd,) if log else ())),
                START_TIMEOUT_S,
                **_asked(request, start, plan, log, call),
            )
            steps = [(step.phase, step.describe()) for step in start.plan]  # while the monitor is at it
            reply = await answer
        except DeadlineExceeded:
            await self._ask(Kind.KILL, id=request.id)
            raise
        finally:
            self._starting.pop(request.id, None)
            if call:
                call.close()
        if reply.kind == Kind.FAILED:
            raise failure(start.plan, reply.fields, external, "create")
        fields = reply.fields
        durations = fields["durations_ns"]
        last = fields["running_ns"] - fields["started_ns"] - sum(durations)
        timeline = (
            StepTiming("plan", f"compile {len(start.plan)} steps", sent_ns - begun_ns),
            StepTiming("namespaces", "have the monitor clone the process", fields["started_ns"] - sent_ns),
            *(StepTiming(*step, ns) for step, ns in zip(steps, [*durations, last], strict=True)),
        )
        warnings = tuple(fields["warnings"])
        if found.poststart and not call:
            try:
                await self._run_hooks("poststart", found.poststart, state | {"status": "running", "pid": fields["pid"]})
            except CribError as error:
                warnings = (*warnings, str(error))
        return Started(fields["pid"], fields["running_ns"], timeline, warnings)

    def _bundle(self, request: ContainerStart) -> str:
        """The directory with config.json that hooks are told of; root.path is where createContainer hooks find it.

        It belongs to the container's root, who shall read it in there.
        """
        bundle = f"{self._environment.directory}/bundle-{request.id}"
        root = replace(
            request.spec.root, path=HOOKS_ROOT if self._environment.namespaces.user else self._environment.staging
        )
        linux = request.spec.linux or Linux()
        owner = mapped(0, id_maps(linux.uid_mappings)), mapped(0, id_maps(linux.gid_mappings))
        os.makedirs(bundle, 0o700, exist_ok=True)
        os.chown(bundle, *owner)
        with open(os.open(f"{bundle}/config.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(replace(request.spec, root=root)))
            os.fchown(file.fileno(), *owner)
        return bundle

    async def _created(self, wanted: Hooks, state: Mapping[str, object], pid: int) -> None:
        """A start has come to where its createRuntime hooks are run. Raises CribError."""
        await self._run_hooks("prestart", wanted.prestart, {**state, "pid": pid})
        await self._run_hooks("createRuntime", wanted.create_runtime, {**state, "pid": pid})

    async def _resume(self, container_id: str, pid: int) -> None:
        """A container is made, and waits to be started."""
        detail = ""
        try:
            if created := self._starting.get(container_id):
                await created(pid)
        except CribError as error:
            detail = str(error)
        await self._ask(Kind.RESUME, id=container_id, detail=detail)

    def paused(self, container_id: str, pid: int) -> None:
        """A container is made, and waits for its hooks."""
        task = asyncio.create_task(self._resume(container_id, pid))
        self._tasks.add(task)
        task.add_done_callback(self._resumed)

    def forget(self, container_id: str) -> None:
        """Nobody is going to start what was prepared."""
        self._prepared.pop(container_id, None)

    def _resumed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the monitor is gone, which `on_lost` tells


def _asked(
    request: ContainerStart, start: Start, plan: bytes, log: LogFile | None = None, call: Call | None = None
) -> dict[str, Any]:
    """What PREPARE and START say."""
    cgroup, target = request.cgroup, request.pid_target
    return {
        "id": request.id,
        "plan": plan,
        "pid": "target" if target else start.pid,
        "pid_ns": target or start.pid_ns,
        "own_pid": start.pid == "new" and not target,
        "terminal": start.terminal,
        "watches": start.watches,
        "stdin": request.stdin,
        "stdin_once": request.stdin_once,
        "owner": request.owner,
        "log": log.path if log else "",
        "log_size": log.size if log else 0,
        "log_max_bytes": log.max_bytes if log else 0,
        "cgroup": cgroup.path,
        "clone_dir": "" if call else cgroup.clone_dir,
        "kill_dirs": cgroup.kill_dirs,
        "memory_events": cgroup.memory_events,
        "adopt": call.adopt if call else "",
    }

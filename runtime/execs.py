"""Processes that are run in a pod's containers, as cribd sees them."""

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from runtime.channel import Channel, Reply
from runtime.errors import Unavailable
from runtime.external import Bundle, Call
from runtime.plan.compile import Environment, compile_exec, watches
from runtime.plan.plan import Plan, encode
from runtime.replies import failure
from runtime.request import ExecExit, ExecStart, owner
from runtime.zygote.messages import Kind


@dataclass(frozen=True, slots=True)
class _Command:
    """A command and its plan; `held`: others in the pod are frozen until it runs."""

    request: ExecStart
    plan: Plan
    encoded: bytes
    held: bool

    def fits(self, request: ExecStart) -> bool:
        """Whether this is the plan of `request` as well: by identity, where comparing would cost more than it saves."""
        mine = self.request
        where = request.clone_dir, request.join_files
        same = request.process is mine.process and request.linux is mine.linux
        return same and where == (mine.clone_dir, mine.join_files)


class Exec:
    """An exec'd process."""

    def __init__(
        self,
        ask: Callable[..., Awaitable[object]],
        exec_id: str,
        started: asyncio.Future[int],
        exited: asyncio.Future[ExecExit],
    ) -> None:
        self._ask = ask
        self._id = exec_id
        self._started = started
        self._exited = exited

    async def started(self) -> int:
        """Wait until one with a terminal has become its program; the terminal's master, the caller's from here on.

        Raises what `wait` raises. Cancelling the wait leaves the process alone.
        """
        either: set[asyncio.Future[Any]] = {self._started, self._exited}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._started.done():
            self._exited.result()
        return self._started.result()

    async def wait(self) -> ExecExit:
        """How it ended. Raises StepFailed or WrongState if it never became its program, Unavailable if the monitor
        is lost. Cancelling the wait leaves the process alone."""
        return await asyncio.shield(self._exited)

    async def kill(self) -> None:
        """End it, with all its descendants. Raises Unavailable or DeadlineExceeded."""
        await self._ask(Kind.KILL, exec=self._id)


class Execs:
    """Those of one pod. `ask` is `Pod.request`."""

    def __init__(self, channel: Channel, environment: Environment, ask: Callable[..., Awaitable[object]]) -> None:
        self._channel = channel
        self._environment = environment
        self._ask = ask
        self._running: dict[str, tuple[int, asyncio.Future[ExecExit]]] = {}  # with the request's number
        self._commands: dict[str, _Command] = {}  # by container, the last one

    def start(self, request: ExecStart, stdin: int = -1, stdout: int = -1, stderr: int = -1) -> Exec:
        """Run a process in a container with these descriptors, which stay the caller's, or with a terminal of the
        container's own, as the request's process says.

        A pipe among them becomes the process's user's, who may open /dev/stdout then.

        A failure to start is what `Exec.wait` raises. Raises Unavailable when the monitor is gone.
        """
        external: Bundle | None = None
        call: Call | None = None
        if request.runtime:
            external = Bundle(request.runtime, self._environment.directory, request.container_id)
            call = external.exec(request.id, request.process, self._environment)
            compiled = _Command(request, call.plan, encode(call.plan), False)
        else:
            compiled = self._compiled(request)
        loop = asyncio.get_running_loop()
        started: asyncio.Future[int] = loop.create_future()
        exited: asyncio.Future[ExecExit] = loop.create_future()

        def replied(reply: Reply) -> None:
            if reply.kind != Kind.FAILED:
                started.set_result(reply.fds[0] if reply.fds else -1)
            else:
                self._running.pop(request.id, None)
                _fail(exited, failure(compiled.plan, reply.fields, external, request.id))
            if external:
                external.discard(request.id)

        streams = () if request.process.terminal else (stdin, stdout, stderr)
        if user := owner(request.process, request.linux):
            for fd in streams:
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    os.fchown(fd, user, -1)
        try:
            number = self._channel.post(
                Kind.EXEC,
                (*(call.descriptors if call else ()), *streams),
                replied,
                plan=compiled.encoded,
                id=request.container_id,
                exec=request.id,
                clone_dir="" if compiled.held or call else request.clone_dir,
                join_files=request.join_files if compiled.held else (),
                adopt=call.adopt if call else "",
                quiet=not (call or request.process.terminal),
            )
        finally:
            if call:
                call.close()
        self._running[request.id] = number, exited
        return Exec(self._ask, request.id, started, exited)

    def _compiled(self, request: ExecStart) -> _Command:
        """A probe's command is the one before, for its container: the same plan."""
        kept = self._commands.get(request.container_id)
        if kept is None or not kept.fits(request):
            process, linux = request.process, request.linux
            plan = compile_exec(process, linux, request.join_files, request.clone_dir, self._environment.last_cap)
            kept = self._commands[request.container_id] = _Command(request, plan, encode(plan), watches(process, linux))
        return kept

    def exited(self, exec_id: str, code: int, exited_ns: int) -> None:
        """The monitor says so."""
        number, future = self._running.pop(exec_id, (0, None))
        self._channel.forget(number)
        if future and not future.done():
            future.set_result(ExecExit(code, exited_ns))

    def forget(self, container_id: str) -> None:
        """The container is gone."""
        self._commands.pop(container_id, None)

    def fail(self, error: Unavailable) -> None:
        """The monitor is gone: so are they."""
        for _, future in self._running.values():
            _fail(future, error)
        self._running.clear()


def _fail(exited: asyncio.Future[ExecExit], error: Exception) -> None:
    """Tell who waits, if anybody does."""
    if not exited.done():
        exited.set_exception(error)
        exited.exception()  # seen, as far as asyncio's log is concerned

"""One more process in a running container: how it is asked for, and ExecSync, which keeps what it writes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Final

import msgspec

from cri.container.start import spec_of
from cri.state.records import ContainerState
from cri.translate.process import STRING_LIMIT_BYTES, TOTAL_LIMIT_BYTES
from runtime.engine import Exec, ExecStart
from runtime.errors import CribError, DeadlineExceeded, InvalidSpec, StepFailed, WrongState
from runtime.spec import Linux

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

KEPT_BYTES: Final = (16 << 20) - (64 << 10)
"""Of both streams together, so that the answer fits into the client's 16 MiB; more is read and dropped.

Half of it is each stream's own, whichever is first to flood; what one doesn't use is the other's.
"""
_READ_BYTES: Final = 64 << 10
_KILL_WAIT_S: Final = 5.0
_SOON_S: Final = 0.05
_logger = logging.getLogger(__name__)


class Output:
    """Reads a process's stdout and stderr from two pipes, in the loop, keeping at most `KEPT_BYTES` of both.

    Not from the beginning: a command such as a probe has ended soon, and then the pipes hold all that it wrote. The
    write ends are the caller's to hand out and to close.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._kept: dict[int, bytearray] = {}
        self._watched = False
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self.write_ends: list[int] = []
        self._open: list[int] = []
        self._timer = self._loop.call_later(_SOON_S, self._watch)
        try:
            for _ in range(2):
                reading, writing = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(reading, False)
                self.write_ends.append(writing)
                self._open.append(reading)
                self._kept[reading] = bytearray()
        except OSError:  # no more descriptors
            self.close()
            raise

    def _watch(self) -> None:
        self._watched = True
        for fd in self._open:
            self._loop.add_reader(fd, self._readable, fd)

    def _readable(self, fd: int) -> bool:
        """Take one read; whether there may be more at once."""
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close(fd)
            return False
        kept = self._kept[fd]
        (other,) = (one for number, one in self._kept.items() if number != fd)
        kept += data
        for one, beside in ((kept, other), (other, kept)):
            del one[max(KEPT_BYTES // 2, KEPT_BYTES - len(beside)) :]
        return True

    def _close(self, fd: int) -> None:
        if self._watched:
            self._loop.remove_reader(fd)
        self._open.remove(fd)
        os.close(fd)
        if not self._open and not self._closed.done():
            self._closed.set_result(None)

    def release_write_ends(self) -> None:
        """Close our copies of the write ends: the process has its own."""
        while self.write_ends:
            os.close(self.write_ends.pop())

    async def finish(self, drain_s: float) -> tuple[bytes, bytes]:
        """What was written, once the process has ended.

        All that it wrote itself is in the pipes by then. A child that it left behind may hold them open: that one is
        given `drain_s`, and then what it writes gets nowhere.
        """
        for fd in list(self._open):
            for _ in range(KEPT_BYTES // _READ_BYTES):
                if not self._readable(fd):
                    break
        if self._open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._closed
        stdout, stderr = map(bytes, self._kept.values())
        return stdout, stderr

    def close(self) -> None:
        """Let go of all descriptors."""
        self._timer.cancel()
        self.release_write_ends()
        for fd in list(self._open):
            self._close(fd)


async def exec_sync(node: Node, container: Container, command: list[str], timeout_s: int) -> tuple[bytes, bytes, int]:
    """Run `command`; its stdout, stderr and exit code. With `timeout_s` 0 it may take as long as the caller waits.

    Where commands come faster than the pod can start them it waits for its turn first, outside that time.

    Raises Exhausted where too many wait, DeadlineExceeded when the time is over, WrongState unless the container runs,
    StepFailed for a command that can't be run. However this ends, cancellation included, the command and what descends
    from it don't outlive it, except for what a command that ended by itself has left running.
    """
    turn = await node.turns.take(container.pod.id)
    try:
        return await _exec_sync(node, container, command, timeout_s)
    finally:
        turn.end()


async def _exec_sync(node: Node, container: Container, command: list[str], timeout_s: int) -> tuple[bytes, bytes, int]:
    request = exec_start(node, container, command)
    output = Output()
    try:
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            process = container.pod.monitor.exec(request, null, *output.write_ends)
        finally:
            os.close(null)
            output.release_write_ends()
        try:
            async with asyncio.timeout(timeout_s or None):
                exit = await process.wait()
        except TimeoutError:
            await kill(process)
            raise DeadlineExceeded(f"{container.title}: command {command[0]!r} timed out after {timeout_s} s") from None
        except BaseException:
            await asyncio.shield(kill(process))
            raise
        stdout, stderr = await output.finish(node.config.limits.exec_drain_s)
        return stdout, stderr, exit.code
    finally:
        output.close()


async def kill(process: Exec) -> None:
    """End a command with its descendants, and wait until it has ended; what goes wrong is logged."""
    try:
        await process.kill()
        async with asyncio.timeout(_KILL_WAIT_S):
            await process.wait()
    except (StepFailed, WrongState):
        return  # it never became its program
    except (CribError, TimeoutError) as error:
        _logger.warning("killing a command failed", extra={"fields": {"error": str(error) or "it lives on"}})


def exec_start(node: Node, container: Container, command: list[str], *, terminal: bool = False) -> ExecStart:
    """What the engine is asked to run. Raises InvalidSpec, or WrongState unless the container runs."""
    args = tuple(command)
    last = container.command
    if last is None or last.process.args != args:
        last = None
        _check(args)
    if container.state is not ContainerState.RUNNING:
        raise WrongState(f"{container.title} is not running")
    new_id = node.new_id()[:16]
    if last and not terminal:
        return dataclasses.replace(last, id=new_id)
    spec = spec_of(node, container)
    env = spec.process.env
    if terminal and not any(item.startswith("TERM=") for item in env):
        env = (*env, "TERM=xterm")
    start = ExecStart(
        id=new_id,
        container_id=container.id,
        process=msgspec.structs.replace(spec.process, args=args, env=env, terminal=terminal, console_size=None),
        linux=spec.linux or Linux(),
        join_files=node.cgroups.join_files(container.record.cgroup_path),
        clone_dir=node.cgroups.clone_dir(container.record.cgroup_path) or "",
        runtime=container.pod.record.runtime,
    )
    if not terminal:
        container.command = start
    return start


def _check(command: tuple[str, ...]) -> None:
    if not command or not command[0]:
        raise InvalidSpec("cmd is missing")
    sizes = [len(word.encode()) for word in command]
    if max(sizes) > STRING_LIMIT_BYTES or sum(sizes) > TOTAL_LIMIT_BYTES or any("\0" in word for word in command):
        raise InvalidSpec("cmd is longer than the kernel takes, or holds a NUL character")

"""Exec: a command in a container, its streams the client's. The command's data pass through cribd alone."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cri.container.exec import exec_start, kill
from cri.streaming.command import ERROR, STDERR, STDIN, STDOUT, Command
from cri.streaming.flow import Inflow, Outflow
from cri.streaming.spdy import Spdy
from runtime.errors import CribError
from runtime.execs import Exec as Process

if TYPE_CHECKING:
    from cri.node import Node
    from cri.streaming.link import Link
    from cri.streaming.request import Exec


class ExecSession(Command):
    """One exec. The command's whole tree ends with the session."""

    def __init__(self, node: Node, link: Link, request: Exec, version: int, wire: Spdy | None) -> None:
        super().__init__(node, link, request.streams, version, wire)
        self._request = request
        self._size: tuple[int, int] | None = None
        self._terminal = -1
        self._flows: dict[str, Outflow] = {}

    def make_stdin(self, stream: int) -> Inflow:
        return Inflow(self._link, stream)

    async def run(self) -> bytes:
        request = self._request
        terminal = request.streams.tty
        start = exec_start(self._node, request.container, list(request.command), terminal=terminal)
        monitor = request.container.pod.monitor
        try:
            if terminal:
                process = monitor.exec(start)
            else:
                with ExitStack() as theirs:
                    process = monitor.exec(start, *(self._pipe(name, theirs) for name in (STDIN, STDOUT, STDERR)))
            try:
                return await self._attend(process)
            except CribError:  # there is nothing to kill, or nobody to do it
                raise
            except BaseException:
                await asyncio.shield(kill(process))
                raise
        finally:
            for flow in self._flows.values():
                flow.close()

    async def _attend(self, process: Process) -> bytes:
        if self._request.streams.tty:
            self._take_terminal(await process.started())
        exit = await process.wait()
        for flow in self._flows.values():
            await flow.finish(self._node.config.limits.exec_drain_s)
        return self.exit(exit.code, " ".join(self._request.command))

    def _pipe(self, name: str, theirs: ExitStack) -> int:
        """The command's end of a new pipe, or /dev/null, closed with `theirs`; ours goes to a flow."""
        if name not in self._ids:
            end = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            theirs.callback(os.close, end)
            return end
        reading, writing = os.pipe2(os.O_CLOEXEC)
        ours, end = (writing, reading) if name == STDIN else (reading, writing)
        theirs.callback(os.close, end)
        os.set_blocking(ours, False)
        if name == STDIN:
            assert self._stdin
            self._stdin.open(ours)
        else:
            self._flows[name] = Outflow(self._link, self._ids[name], ours)
        return end

    def _take_terminal(self, master: int) -> None:
        os.set_blocking(master, False)
        self._terminal = master
        if self._size:
            self.resize(*self._size)
        if self._stdin:
            self._stdin.open(fcntl.fcntl(master, fcntl.F_DUPFD_CLOEXEC, 3))
        self._flows[STDOUT] = Outflow(self._link, self._ids.get(STDOUT, self._ids[ERROR]), master)

    def unwanted(self, name: str) -> None:
        if flow := self._flows.get(name):
            flow.close()

    def resize(self, rows: int, columns: int) -> None:
        self._size = rows, columns
        flow = self._flows.get(STDOUT)
        if self._terminal >= 0 and not (flow and flow.ended.is_set()):
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

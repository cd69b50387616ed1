"""Attach: a client shares a container's streams, which its monitor serves, with whoever else is attached."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING

from cri.streaming.command import STDERR, STDIN, STDOUT, Command
from cri.streaming.flow import Inflow
from cri.streaming.spdy import Spdy
from runtime.errors import CribError
from runtime.zygote import packets

if TYPE_CHECKING:
    from cri.node import Node
    from cri.streaming.link import Link
    from cri.streaming.request import Attach

_logger = logging.getLogger(__name__)


class AttachSession(Command):
    """One attachment. It ends with the container, or with the client, which leaves the container alone."""

    def __init__(self, node: Node, link: Link, request: Attach, version: int, wire: Spdy | None) -> None:
        super().__init__(node, link, request.streams, version, wire)
        self._request = request
        self._sock: socket.socket | None = None
        self._size: tuple[int, int] | None = None
        self._resizing: asyncio.Task[None] | None = None

    def make_stdin(self, stream: int) -> Inflow:
        return Inflow(self._link, stream, self._put, self._end_input)

    async def run(self) -> bytes:
        request = self._request
        self._sock = await request.container.pod.monitor.attach(request.container.id, STDIN in self._ids)
        try:
            if self._stdin:
                self._stdin.open(self._sock.fileno())
            output = _Output(self._link, self._ids, self._sock, request.streams.tty)
            await output.ended.wait()
            if not (output.complete or request.streams.tty):
                return self.failure("detached: output came faster than the client took it, and some is lost")
            return self.success()
        finally:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            if self._stdin:
                self._stdin.close()
            self._sock.close()

    def _put(self, fd: int, data: bytes) -> int:
        assert self._sock is not None
        part = data[: packets.DATA_BYTES]
        self._sock.sendmsg((packets.STDIN, part))
        return len(part)

    def _end_input(self, fd: int) -> None:
        assert self._sock is not None
        self._sock.send(packets.STDIN)

    def unwanted(self, name: str) -> None:
        self._link.break_off()

    def resize(self, rows: int, columns: int) -> None:
        self._size = rows, columns
        if self._resizing is None:
            self._resizing = asyncio.get_running_loop().create_task(self._resize())

    async def _resize(self) -> None:
        """Pass sizes on, the latest only where they come faster than the monitor takes them."""
        container = self._request.container
        try:
            while self._size:
                (rows, columns), self._size = self._size, None
                await container.pod.monitor.resize(container.id, rows, columns)
        except CribError as error:
            _logger.debug("resize failed", extra={"fields": {"container": container.id, "error": str(error)}})
        finally:
            self._resizing = None


class _Output:
    """The monitor's packets, to the streams that the client has of them.

    `ended` is set at their end; `complete` when the container has ended and none is lost.
    """

    def __init__(self, link: Link, ids: dict[str, int], sock: socket.socket, tty: bool) -> None:
        self._link = link
        self._sock = sock
        self._tty = tty
        self._streams = {packets.STDOUT: ids.get(STDOUT), packets.STDERR: ids.get(STDERR)}
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self.complete = False
        self.ended = asyncio.Event()
        self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        if any(stream is not None and self._link.room(stream) <= 0 for stream in self._streams.values()):
            self._loop.remove_reader(self._sock.fileno())
            self._paused = True
            self._link.need_room(self)
            return
        try:
            packet = self._sock.recv(packets.DATA_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet == packets.END:
            self.complete = True
        elif packet[:1] == packets.LOST and not self._tty:
            packet = b""  # a screen can be drawn again, other output has a hole now
        if not packet:
            self._loop.remove_reader(self._sock.fileno())
            self.ended.set()
        elif (stream := self._streams.get(packet[:1])) is not None:
            self._link.send(stream, packet[1:])

    def resume(self) -> None:
        if self._paused and not self.ended.is_set():
            self._paused = False
            self._loop.add_reader(self._sock.fileno(), self._readable)

"""Bytes between a descriptor and a stream of a client, in the event loop and no faster than the slower side."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import termios
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

READ_BYTES: Final = 128 << 10
_PIECE_BYTES: Final = 4 << 10
"""Up to this length what waits is put together: each piece costs as much again as it is long, or more."""


class Hungry(Protocol):
    """Who waits for a stream's room."""

    def resume(self) -> None: ...


class Link(Protocol):
    """The connection to a client, as flows see it."""

    def room(self, stream: int) -> int: ...
    def send(self, stream: int, data: bytes) -> None: ...
    def consumed(self, stream: int, size: int) -> None: ...
    def waiting(self, size: int) -> None: ...
    def need_room(self, flow: Hungry) -> None: ...


class Outflow:
    """From the non-blocking descriptor `fd`, which it owns, to a stream. `ended` is set at the descriptor's end."""

    def __init__(self, link: Link, stream: int, fd: int) -> None:
        self._link = link
        self._stream = stream
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self.moved_bytes = 0
        self.ended = asyncio.Event()
        self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        room = self._link.room(self._stream)
        if room <= 0:
            self._loop.remove_reader(self._fd)
            self._paused = True
            self._link.need_room(self)
            return
        try:
            data = os.read(self._fd, min(room, READ_BYTES))
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody holds the terminal any more; ECONNRESET
            data = b""
        if data:
            self.moved_bytes += len(data)
            self._link.send(self._stream, data)
        else:
            self.close()

    def resume(self) -> None:
        """There may be room again."""
        if self._paused and not self.ended.is_set():
            self._paused = False
            self._loop.add_reader(self._fd, self._readable)

    async def finish(self, drain_s: float) -> None:
        """Wait for the end, when the process that writes has ended.

        What it wrote itself is in the pipe by now, and is waited for however slow the client is. Something that it left
        behind may hold the pipe open: that is given `drain_s`.
        """
        if self.ended.is_set():
            return
        left = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, left)
        due = self.moved_bytes + left[0]
        while not self.ended.is_set():
            try:
                async with asyncio.timeout(drain_s):
                    await self.ended.wait()
            except TimeoutError:
                if self.moved_bytes >= due:
                    self.close()

    def close(self) -> None:
        """Let go of the descriptor."""
        if not self.ended.is_set():
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self.ended.set()


class Inflow:
    """From a stream to a non-blocking descriptor, which it owns from `open` on; what comes before that waits.

    `put` writes some of the bytes and says how many; `release` lets the descriptor go at the end. Once nobody reads at
    the other end everything goes nowhere, and the client isn't held up.
    """

    def __init__(
        self,
        link: Link,
        stream: int,
        put: Callable[[int, bytes], int] = os.write,
        release: Callable[[int], None] = os.close,
    ) -> None:
        self._link = link
        self._stream = stream
        self._put = put
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        self._waiting: deque[bytes] = deque()
        self._writing = False
        self._ending = False
        self._over = False
        self.ended = asyncio.Event()

    def open(self, fd: int) -> None:
        self._fd = fd
        if self._over:
            self._close()
        elif self._waiting or self._ending:
            self._write()

    def feed(self, data: bytes) -> None:
        """Take bytes that came on the stream."""
        if self._over:
            self._link.consumed(self._stream, len(data))
            return
        self._link.waiting(len(data))
        if self._waiting and len(self._waiting[-1]) + len(data) <= _PIECE_BYTES:
            self._waiting[-1] += data
        else:
            self._waiting.append(data)
        if self._fd >= 0 and not self._writing:
            self._write()

    def end(self) -> None:
        """The stream has ended: so does the descriptor, once it has taken everything."""
        self._ending = True
        if self._fd >= 0 and not self._writing:
            self._write()

    def _write(self) -> None:
        try:
            while self._waiting:
                data = self._waiting[0]
                size = self._put(self._fd, data)
                self._taken(size)
                if size < len(data):
                    self._waiting[0] = data[size:]
                else:
                    self._waiting.popleft()
            if self._ending:
                self._close()
            elif self._writing:
                self._writing = False
                self._loop.remove_writer(self._fd)
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._write)
        except OSError:  # EPIPE, ECONNRESET, EIO
            self.close()

    def _taken(self, size: int) -> None:
        self._link.waiting(-size)
        self._link.consumed(self._stream, size)

    def close(self) -> None:
        """Drop what waits, and let go of the descriptor."""
        self._over = True
        size = sum(map(len, self._waiting))
        self._waiting.clear()
        if size:
            self._taken(size)
        try:
            self._close()
        except OSError:
            pass

    def _close(self) -> None:
        if self._writing:  # first: a duplicate would keep the closed one's watch, for whoever gets its number
            self._writing = False
            self._loop.remove_writer(self._fd)
        if self._fd >= 0:
            self._release(self._fd)
            self._fd = -1
        self._over = True
        self.ended.set()

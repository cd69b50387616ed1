"""A client's session with a command or with a container: the streams it opened, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from cri.streaming import result
from cri.streaming.flow import Inflow
from cri.streaming.spdy import Spdy
from cri.streaming.wire import Closed, Data, Ended, Event, Opened, Reset
from runtime.errors import CribError

if TYPE_CHECKING:
    from cri.node import Node
    from cri.streaming.link import Link
    from cri.streaming.request import Streams

STDIN, STDOUT, STDERR, ERROR, RESIZE = "stdin", "stdout", "stderr", "error", "resize"
_CHANNELS: Final = {STDIN: 0, STDOUT: 1, STDERR: 2, ERROR: 3, RESIZE: 4}
_RESIZE_LIMIT_BYTES: Final = 1024
"""Of sizes that come at once: those before them are none any more."""
_MAX_SIZE: Final = 0xFFFF
_RESIZE_VERSION: Final = 3
_STATUS_VERSION: Final = 4
_logger = logging.getLogger(__name__)


class Command(ABC):
    """Waits until the client has opened its streams, then is `run`; the end of either side ends the other.

    `wire` None: WebSocket channels, which are there from the start.
    """

    def __init__(self, node: Node, link: Link, streams: Streams, version: int, wire: Spdy | None) -> None:
        self._node = node
        self._link = link
        self._version = version
        self._wire = wire
        wanted = {STDIN: streams.stdin, STDOUT: streams.stdout, STDERR: streams.stderr, ERROR: True}
        self._wanted = {name for name, on in wanted.items() if on}
        if streams.tty and version >= _RESIZE_VERSION:
            self._wanted.add(RESIZE)
        self._ids: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._sizes = b""
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stdin: Inflow | None = None

    def begin(self) -> None:
        """The connection stands."""
        if self._wire is not None:
            self._timer = asyncio.get_running_loop().call_later(self._link.creation_s, self._late)
            return
        for name in self._wanted:
            self._join(name, _CHANNELS[name])
        first = next((name for name in (STDOUT, STDERR) if name in self._ids), ERROR)
        self._link.send(self._ids[first], b"")  # what a client waits for before it believes in the connection
        self._start()

    def _join(self, name: str, stream: int) -> None:
        self._ids[name] = stream
        self._names[stream] = name
        if name == STDIN:
            self._stdin = self.make_stdin(stream)

    def _late(self) -> None:
        self._link.break_off()

    def event(self, event: Event) -> None:
        if isinstance(event, Data):
            name = self._names.get(event.stream)
            if name == STDIN and self._stdin:
                self._stdin.feed(event.data)
            else:
                if name == RESIZE:
                    self._resized(event.data)
                self._link.consumed(event.stream, len(event.data))
        elif isinstance(event, Opened):
            self._opened(event)
        elif isinstance(event, Ended | Reset):
            name = self._names.get(event.stream)
            if name == STDIN and self._stdin:
                self._stdin.end()
            elif isinstance(event, Reset) and name in (STDOUT, STDERR):
                self.unwanted(name)
        elif isinstance(event, Closed):
            self._link.break_off()

    def _opened(self, event: Opened) -> None:
        assert self._wire is not None
        name = event.headers.get("streamtype", "")
        if name not in self._wanted or name in self._ids:
            self._link.reset(event.stream)
            return
        self._wire.reply(event.stream)
        self._join(name, event.stream)
        if event.ended and name == STDIN and self._stdin:
            self._stdin.end()
        if len(self._ids) == len(self._wanted):
            self._start()

    def _start(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._task = asyncio.get_running_loop().create_task(self._session())

    async def _session(self) -> None:
        try:
            ended = await self.run()
        except CribError as error:
            ended = self.failure(str(error))
        except Exception as error:
            _logger.exception("streaming session failed")
            ended = self.failure(f"{type(error).__name__}: {error}")
        for name in (STDOUT, STDERR):
            if name in self._ids:
                self._link.end(self._ids[name])
        if ended:
            self._link.send(self._ids[ERROR], ended)
        for stream in self._ids.values():
            self._link.end(stream)
        if self._stdin:
            self._stdin.close()
        self._link.finish(say=self._wire is None)

    def gone(self) -> None:
        """The client is gone."""
        if self._timer:
            self._timer.cancel()
        if self._stdin:
            self._stdin.close()
        if self._task:
            self._task.cancel()

    def success(self) -> bytes:
        """The error stream's words for a good end."""
        return result.success() if self._version >= _STATUS_VERSION else b""

    def failure(self, why: str) -> bytes:
        """And for one that is a failure of crib's."""
        return result.failed(why) if self._version >= _STATUS_VERSION else why.encode()

    def exit(self, code: int, command: str) -> bytes:
        """And for a command's exit code."""
        if code == 0:
            return self.success()
        return (result.exited if self._version >= _STATUS_VERSION else result.plain)(code, command)

    def _resized(self, data: bytes) -> None:
        """Take sizes, {"Width":80,"Height":24} each, from a stream of them; what is no size is passed over."""
        *documents, self._sizes = (self._sizes + data)[-_RESIZE_LIMIT_BYTES:].split(b"}")
        for document in documents:
            try:
                size = json.loads(document + b"}")
                rows, columns = int(size["Height"]), int(size["Width"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                continue
            if 0 <= rows <= _MAX_SIZE and 0 <= columns <= _MAX_SIZE:
                self.resize(rows, columns)

    @abstractmethod
    async def run(self) -> bytes:
        """Do it, until the end; what the error stream is to say. Cancelled when the client goes."""

    @abstractmethod
    def make_stdin(self, stream: int) -> Inflow: ...

    @abstractmethod
    def unwanted(self, name: str) -> None:
        """The client takes no more of this stream."""

    @abstractmethod
    def resize(self, rows: int, columns: int) -> None: ...

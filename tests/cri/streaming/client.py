"""Clients of the streaming server: SPDY as Kubernetes' Go library speaks it, or strictly, and WebSocket channels."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from typing import Any
from urllib.parse import urlsplit

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

from tests.cri.streaming import frames
from tests.limits import scaled

TIMEOUT_S = scaled(30)


class Refusal(Exception):
    """The server answered with something other than 101."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status


async def upgrade(url: str, headers: dict[str, str], method: str = "POST", tls: Any = None) -> Any:
    """The reader, the writer and the answer's headers. Raises Refusal."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=tls)
    lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: Upgrade"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if method == "POST":
        lines.append("Content-Length: 0")
    writer.write("\r\n".join([*lines, "", ""]).encode())
    async with asyncio.timeout(TIMEOUT_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    status = int(head[0].split()[1])
    fields = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in head[1:] if line)}
    if status != 101:
        body = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        raise Refusal(status, body)
    return reader, writer, fields


class Stream:
    """One SPDY stream. `read` takes what there is, b"" at the end; `got` is all until then."""

    def __init__(self, client: Spdy, number: int) -> None:
        self.client = client
        self.number = number
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.replied = asyncio.Event()
        self.reset = False
        self.window = client.initial_window
        self.more = asyncio.Event()

    async def read(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            got = await self.queue.get()
        if got and self.client.windows:
            self.client.send(frames.window_update(self.number, len(got)))
        return got

    async def got(self) -> bytes:
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    async def until(self, mark: bytes) -> bytes:
        """Read on until `mark` has been seen."""
        seen = b""
        while mark not in seen:
            part = await self.read()
            assert part, seen
            seen += part
        return seen

    async def write(self, body: bytes) -> None:
        view = memoryview(body)
        while view:
            size = 32 << 10
            if self.client.windows:
                async with asyncio.timeout(TIMEOUT_S):
                    while self.window <= 0:
                        self.more.clear()
                        await self.more.wait()
                size = min(size, self.window)
            part, view = bytes(view[:size]), view[size:]
            self.window -= len(part)
            self.client.send(frames.data(self.number, part))
            await self.client.writer.drain()

    def end(self) -> None:
        self.client.send(frames.data(self.number, b"", frames.FIN))

    def give_up(self) -> None:
        self.client.send(frames.rst(self.number))


class Spdy:
    """`windows`: whether it keeps windows, as the draft wants and spdystream doesn't."""

    def __init__(self, windows: bool = False) -> None:
        self.windows = windows
        self.compressor = frames.Compressor()
        self.streams: dict[int, Stream] = {}
        self.last = -1
        self.initial_window = 64 << 10
        self.goaway = False

    async def connect(
        self, url: str, protocols: tuple[str, ...] = ("v4.channel.k8s.io",), method: str = "POST", tls: Any = None
    ) -> Spdy:
        headers = {"Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": ", ".join(protocols)}
        self.reader, self.writer, self.fields = await upgrade(url, headers, method, tls)
        if self.windows:
            self.send(frames.settings(64 << 10))
        self.task = asyncio.create_task(self._read())
        return self

    def send(self, frame: bytes) -> None:
        self.writer.write(frame)

    async def _read(self) -> None:
        reader = frames.Reader()
        try:
            while got := await self.reader.read(1 << 18):
                for frame in reader.feed(self.received(got)):
                    self._frame(frame)
        except ConnectionError:
            pass
        for stream in self.streams.values():
            stream.queue.put_nowait(b"")

    def received(self, got: bytes) -> bytes:
        return got

    def _frame(self, frame: frames.Frame) -> None:
        stream = self.streams.get(frame.stream)
        if frame.kind == 0 and stream:
            if frame.body:
                stream.queue.put_nowait(frame.body)
                if self.windows:
                    self.send(frames.window_update(0, len(frame.body)))
            if frame.flags & frames.FIN:
                stream.queue.put_nowait(b"")
        elif frame.kind == frames.SYN_REPLY and stream:
            stream.replied.set()
        elif frame.kind == frames.RST_STREAM and stream:
            stream.reset = True
            stream.replied.set()
            stream.queue.put_nowait(b"")
        elif frame.kind == frames.SETTINGS:
            change, self.initial_window = frame.word(2) - self.initial_window, frame.word(2)
            for each in self.streams.values():
                each.window += change
                each.more.set()
        elif frame.kind == frames.WINDOW_UPDATE and stream:
            stream.window += frame.word(1)
            stream.more.set()
        elif frame.kind == frames.PING and frame.word(0) % 2 == 0:
            self.send(frames.ping(frame.word(0)))
        elif frame.kind == frames.GOAWAY:
            self.goaway = True

    def open(self, **headers: str) -> Stream:
        self.last += 2
        stream = self.streams[self.last] = Stream(self, self.last)
        self.send(self.compressor.syn_stream(self.last, headers))
        return stream

    async def command(self, *names: str) -> dict[str, Stream]:
        """The streams of an exec or attach, the error stream among them."""
        streams = {name: self.open(streamtype=name) for name in ("error", *names)}
        for stream in streams.values():
            async with asyncio.timeout(TIMEOUT_S):
                await stream.replied.wait()
        return streams

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass
        await self.task

    async def closed(self) -> None:
        """Wait for the server to close the connection."""
        async with asyncio.timeout(TIMEOUT_S):
            await self.task


class TunnelSpdy(Spdy):
    """SPDY in a WebSocket's binary messages, as kubectl does it."""

    async def connect(
        self, url: str, protocols: tuple[str, ...] = (), method: str = "GET", tls: Any = None
    ) -> TunnelSpdy:
        self.messages = Connection(ConnectionType.CLIENT)
        key = base64.b64encode(os.urandom(16)).decode()
        headers = {"Upgrade": "websocket", "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13"}
        headers["Sec-WebSocket-Protocol"] = ", ".join(f"SPDY/3.1+{protocol}" for protocol in protocols)
        self.reader, self.writer, self.fields = await upgrade(url, headers, method, tls)
        if self.windows:
            self.send(frames.settings(64 << 10))
        self.task = asyncio.create_task(self._read())
        return self

    def send(self, frame: bytes) -> None:
        for at in range(0, len(frame), 1000):  # where messages end means nothing
            self.writer.write(self.messages.send(BytesMessage(data=frame[at : at + 1000])))

    def received(self, got: bytes) -> bytes:
        self.messages.receive_data(got)
        parts = [bytes(event.data) for event in self.messages.events() if isinstance(event, BytesMessage)]
        return b"".join(parts)


class Channels:
    """A WebSocket client of the channel protocols."""

    def __init__(self, protocol: str = "v5.channel.k8s.io") -> None:
        self.protocol = protocol
        self.frames = Connection(ConnectionType.CLIENT)
        self.queues: dict[int, asyncio.Queue[bytes]] = {}
        self.closed_with: int | None = None

    async def connect(self, url: str, method: str = "GET") -> Channels:
        key = base64.b64encode(os.urandom(16)).decode()
        headers = {"Upgrade": "websocket", "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13"}
        if self.protocol:
            headers["Sec-WebSocket-Protocol"] = self.protocol
        self.reader, self.writer, self.fields = await upgrade(url, headers, method)
        assert self.fields.get("sec-websocket-protocol", "") == self.protocol
        self.task = asyncio.create_task(self._read())
        return self

    @property
    def text(self) -> bool:
        return "base64" in self.protocol

    async def _read(self) -> None:
        message = b""
        while got := await self.reader.read(1 << 18):
            self.frames.receive_data(got)
            for event in self.frames.events():
                if isinstance(event, BytesMessage | TextMessage):
                    message += event.data.encode() if isinstance(event.data, str) else bytes(event.data)
                    if event.message_finished:
                        self._message(message)
                        message = b""
                elif isinstance(event, Ping):
                    self.writer.write(self.frames.send(event.response()))
                elif isinstance(event, CloseConnection):
                    self.closed_with = int(event.code)
        for queue in self.queues.values():
            queue.put_nowait(b"")

    def _message(self, message: bytes) -> None:
        channel = message[0] - ord("0") if self.text else message[0]
        body = base64.b64decode(message[1:]) if self.text else message[1:]
        if body:
            self.queue(channel).put_nowait(body)

    def queue(self, channel: int) -> asyncio.Queue[bytes]:
        return self.queues.setdefault(channel, asyncio.Queue())

    async def read(self, channel: int) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.queue(channel).get()

    async def until(self, channel: int, mark: bytes) -> bytes:
        seen = b""
        while mark not in seen:
            part = await self.read(channel)
            assert part, seen
            seen += part
        return seen

    async def got(self, channel: int) -> bytes:
        parts = []
        while part := await self.read(channel):
            parts.append(part)
        return b"".join(parts)

    def send(self, channel: int, body: bytes) -> None:
        if self.text:
            self.writer.write(self.frames.send(TextMessage(data=f"{channel}{base64.b64encode(body).decode()}")))
        else:
            self.writer.write(self.frames.send(BytesMessage(data=bytes((channel,)) + body)))

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass
        await self.task


def code(document: bytes) -> int:
    """The exit code that an error stream tells."""
    status = json.loads(document)
    if status["status"] == "Success":
        return 0
    assert status["reason"] == "NonZeroExitCode", status
    return int(next(cause["message"] for cause in status["details"]["causes"] if cause["reason"] == "ExitCode"))

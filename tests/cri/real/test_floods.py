"""Clients that send much that means little, and never read: cribd's memory stands still, and other calls don't wait."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import TypeAlias
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from cri.streaming.link import CONNECTIONS_LIMIT
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.streams import exec_url, forward_url
from tests.cri.real.test_cycles import kept
from tests.cri.streaming import frames
from tests.limits import scaled
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "overlay"), pytest.mark.timeout(scaled(300))]

_FLOOD_S = 1.0
_PART_BYTES = 1 << 20
_GROWTH_BYTES = 24 << 20
_ANSWER_S = 1.0


@pytest_asyncio.fixture
async def pod(real: Real) -> str:
    return await real.pod(real.pod_config())


@pytest_asyncio.fixture
async def container(real: Real, pod: str) -> str:
    return await real.run(pod, "sleep", "1000")


@asynccontextmanager
async def others_go_on(real: Real, what: str) -> AsyncIterator[None]:
    """Other calls are answered meanwhile, and cribd holds what it held in the end."""
    assert real.daemon.process
    pid = real.daemon.process.pid
    before = kept(pid)
    latency_s: list[float] = []
    peak_bytes = 0
    done = asyncio.Event()

    async def ask() -> None:
        nonlocal peak_bytes
        while not done.is_set():
            begin = time.monotonic()
            await real.client.ListContainers(pb.ListContainersRequest())
            latency_s.append(time.monotonic() - begin)
            peak_bytes = max(peak_bytes, kept(pid).memory_bytes[0])
            await asyncio.sleep(0.005)

    asking = asyncio.create_task(ask())
    yield
    done.set()
    await asking
    await until(lambda: kept(pid).files <= before.files)
    grown, worst_s = peak_bytes - before.memory_bytes[0], max(latency_s)
    median_s = sorted(latency_s)[len(latency_s) // 2]
    logging.getLogger(__name__).warning(
        "%s: memory grew by %d KiB at most, calls took %.4f s, at most %.4f s", what, grown >> 10, median_s, worst_s
    )
    assert grown < _GROWTH_BYTES, what
    assert worst_s < scaled(_ANSWER_S), what


def _request(url: str, *fields: str) -> bytes:
    return "\r\n".join(
        [f"GET {urlsplit(url).path} HTTP/1.1", "Host: x", "Connection: Upgrade", *fields, "", ""]
    ).encode()


def _connect(url: str, *fields: str) -> socket.socket:
    """Raises OSError."""
    address = urlsplit(url)
    sock = socket.create_connection((address.hostname, address.port or 0), scaled(20))
    sock.sendall(_request(url, *fields))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 101 "), head
    return sock


def _spdy(url: str, version: str) -> socket.socket:
    return _connect(url, "Upgrade: SPDY/3.1", f"X-Stream-Protocol-Version: {version}")


def _websocket(url: str, protocol: str) -> socket.socket:
    key = base64.b64encode(bytes(16)).decode()
    fields = f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Protocol: {protocol}"
    return _connect(url, "Upgrade: websocket", *fields)


def _flood(sock: socket.socket, parts: Callable[[], bytes]) -> None:
    """Send again and again what `parts` makes, reading nothing, until the time is over or the server has had enough."""
    end = time.monotonic() + _FLOOD_S
    sock.settimeout(0.2)
    part = parts()
    while time.monotonic() < end:
        view = memoryview(part)
        while view and time.monotonic() < end:
            try:
                size = sock.send(view)
            except TimeoutError:
                continue
            except OSError:
                return
            view = view[size:]
        part = parts()


def _again(frame: bytes) -> Callable[[], bytes]:
    part = frame * (_PART_BYTES // len(frame))
    return lambda: part


def _opening(*headers: dict[str, str], windows: bool = True) -> tuple[bytes, frames.Compressor]:
    compressor = frames.Compressor()
    streams = [compressor.syn_stream(2 * number + 1, each) for number, each in enumerate(headers)]
    return (frames.settings(65536) if windows else b"") + b"".join(streams), compressor


def _message(kind: int, body: bytes, finished: bool = True) -> bytes:
    return bytes((finished << 7 | kind, 0x80 | len(body), 0, 0, 0, 0)) + body


_COMMAND = [{"streamtype": kind} for kind in ("error", "stdin", "stdout", "stderr")]
_TERMINAL = [{"streamtype": kind} for kind in ("error", "stdin", "stdout", "resize")]


def _blocks(compressor: frames.Compressor, block: bytes) -> Callable[[], bytes]:
    numbers = iter(range(101, 1 << 30, 2))

    def parts() -> bytes:
        return b"".join(compressor.syn_stream_of(next(numbers), block) for _ in range(2000))

    return parts


def _many(count: int) -> list[dict[str, str]]:
    return [{"streamtype": "data", "port": "9", "requestid": str(number)} for number in range(count)]


async def _exec(real: Real, container: str, *, tty: bool = False) -> str:
    return await exec_url(real, container, "sleep", "4321", tty=tty, stdin=True)


_Parts: TypeAlias = Callable[[frames.Compressor], Callable[[], bytes]]
_SPDY: dict[str, tuple[list[dict[str, str]], _Parts]] = {
    "pings": (_COMMAND, lambda _: _again(frames.ping(1))),
    "data without any": (_COMMAND, lambda _: _again(frames.data(3))),
    "data in pieces": (_COMMAND, lambda _: _again(frames.data(3, b"xy"))),
    "data past a window": (_COMMAND, lambda _: _again(frames.data(3, bytes(60_000)))),
    "windows": (_COMMAND, lambda _: _again(frames.window_update(5, 1))),
    "settings": (_COMMAND, lambda _: _again(frames.settings(7))),
    "streams of no known kind": (_COMMAND, lambda c: _blocks(c, frames.headers_block({"streamtype": "?"}))),
    "headers of many names": (_COMMAND, lambda c: _blocks(c, struct.pack(">I", 7000) + bytes(4 * 14_000))),
    "long headers": (_COMMAND, lambda c: _blocks(c, frames.headers_block({"streamtype": "x" * 60_000}))),
    "sizes of a terminal": (_TERMINAL, lambda _: _again(frames.data(7, b'{"Width":80,"Height":24}' * 1000))),
    "no sizes of a terminal": (_TERMINAL, lambda _: _again(frames.data(7, b"}" * 60_000))),
    "sizes in sizes": (_TERMINAL, lambda _: _again(frames.data(7, b'{"Width":' + b"[" * 50_000 + b"}"))),
    "infinite sizes": (_TERMINAL, lambda _: _again(frames.data(7, b'{"Width":1e999,"Height":1}'))),
}


@pytest.mark.parametrize("windows", [True, False])
async def test_spdy(real: Real, container: str, windows: bool) -> None:
    for what, (streams, parts) in _SPDY.items():
        async with others_go_on(real, what):
            url = await _exec(real, container, tty=streams is _TERMINAL)
            with await asyncio.to_thread(_spdy, url, "v4.channel.k8s.io") as sock:
                opening, compressor = _opening(*streams, windows=windows)
                sock.sendall(opening)
                await asyncio.to_thread(_flood, sock, parts(compressor))
    assert (await real.sh(container, "echo here")).stdout == b"here\n"
    assert "Traceback" not in real.daemon.log()


async def test_settings_of_many_streams(real: Real, pod: str, container: str) -> None:
    async with others_go_on(real, "settings"):
        with await asyncio.to_thread(_spdy, await forward_url(real, pod), "portforward.k8s.io") as sock:
            sock.sendall(_opening(*_many(1990))[0])
            await asyncio.to_thread(_flood, sock, _again(frames.settings(7)))


_MESSAGES = {
    "empty": ("v5.channel.k8s.io", b"", _message(2, b"")),
    "short": ("v5.channel.k8s.io", b"", _message(2, b"\0x")),
    "pings": ("v5.channel.k8s.io", b"", _message(9, b"")),
    "pongs": ("v5.channel.k8s.io", b"", _message(10, b"")),
    "sizes": ("v5.channel.k8s.io", b"", _message(2, b"\4" + b"}" * 100)),
    "closed channels": ("v5.channel.k8s.io", b"", _message(2, b"\xff\0")),
    "no end": ("base64.channel.k8s.io", _message(1, b"0", False), _message(0, b"", False)),
    "text": ("base64.channel.k8s.io", b"", _message(1, b"0eA==")),
}


async def test_websocket(real: Real, container: str) -> None:
    for what, (protocol, opening, part) in _MESSAGES.items():
        async with others_go_on(real, what):
            url = await _exec(real, container, tty=True)
            with await asyncio.to_thread(_websocket, url, protocol) as sock:
                sock.sendall(opening)
                await asyncio.to_thread(_flood, sock, _again(part))
    assert (await real.sh(container, "echo here")).stdout == b"here\n"
    assert "Traceback" not in real.daemon.log()


async def test_connections_that_say_nothing(real: Real, container: str) -> None:
    """There may be so many, and they cost cribd no more descriptors than that."""
    address = urlsplit(await _exec(real, container))
    assert real.daemon.process
    before = kept(real.daemon.process.pid).files[0]
    async with others_go_on(real, "connections"):
        with ExitStack() as stack:
            for _ in range(CONNECTIONS_LIMIT + 500):
                to = address.hostname, address.port or 0
                stack.enter_context(await asyncio.to_thread(socket.create_connection, to, scaled(20)))
            assert kept(real.daemon.process.pid).files[0] <= before + CONNECTIONS_LIMIT + 50
            assert (await real.sh(container, "echo here")).stdout == b"here\n"
    assert await exec_url(real, container, "true")
    assert "Traceback" not in real.daemon.log()

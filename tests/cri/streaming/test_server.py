"""The server itself: tokens, time-outs, certificates, and clients that break off or break the rules.

What is forwarded to are ports of this test's own, in its own network namespace.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio

from cri.config import StreamingSection
from cri.container.container import Container
from cri.node import Node
from cri.sandbox.pod import Pod
from cri.streaming import link, tokens
from cri.streaming.request import Exec, Forward, Streams
from cri.streaming.server import StreamingServer
from cri.streaming.tokens import Tokens
from runtime.errors import Exhausted
from tests.cri.client import until
from tests.cri.streaming import frames
from tests.cri.streaming.client import Channels, Refusal, Spdy, Stream, TunnelSpdy
from tests.limits import scaled

pytestmark = pytest.mark.asyncio

_PROTOCOL = ("portforward.k8s.io",)


class Monitor:
    """A pod's, as far as port-forward asks: the namespace is this process's own."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def tcp_socket(self, family: int) -> socket.socket:
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        return made


@dataclass
class Served:
    server: StreamingServer
    port: int
    now: list[float]
    taken: list[bytes] = field(default_factory=list)

    def url(self, *ports: int) -> str:
        return self.server.url(Forward(cast(Pod, SimpleNamespace(monitor=Monitor())), ports))


@asynccontextmanager
async def serving(**config: Any) -> AsyncIterator[Served]:
    """A streaming server, and a port that answers with what it is sent."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    node = SimpleNamespace(config=SimpleNamespace(streaming=StreamingSection(**config)))
    server = StreamingServer(cast(Node, node))
    now = [0.0]
    server._tokens = Tokens(lambda: now[0])
    await server.start()
    echoing = await asyncio.start_server(echo, "127.0.0.1", 0)
    try:
        yield Served(server, echoing.sockets[0].getsockname()[1], now)
    finally:
        await server.close()
        await until(lambda: not server._links)
        echoing.close()
        await echoing.wait_closed()


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as made:
        yield made


class Forwarded:
    """One connection through a client."""

    def __init__(self, client: Spdy, port: int, request: str = "0") -> None:
        self.error: Stream = client.open(streamtype="error", port=str(port), requestid=request)
        self.error.end()
        self.data: Stream = client.open(streamtype="data", port=str(port), requestid=request)

    async def echoes(self, body: bytes) -> bool:
        async def give() -> None:
            await self.data.write(body)
            self.data.end()

        giving = asyncio.create_task(give())
        got = await self.data.got()
        await giving
        return got == body and await self.error.got() == b""


# Tokens


async def test_a_token_that_is_late(served: Served) -> None:
    intime, late = served.url(), served.url()
    served.now[0] += tokens.LIFETIME_S - 1
    await (await Spdy().connect(intime, _PROTOCOL)).close()
    served.now[0] += 2
    with pytest.raises(Refusal) as refused:
        await Spdy().connect(late, _PROTOCOL)
    assert refused.value.status == 404


async def test_so_many_tokens_and_no_more(served: Served) -> None:
    urls = {served.url() for _ in range(tokens.PENDING_LIMIT)}
    assert len(urls) == tokens.PENDING_LIMIT
    with pytest.raises(Exhausted):
        served.url()
    await (await Spdy().connect(urls.pop(), _PROTOCOL)).close()
    served.url()
    with pytest.raises(Exhausted):
        served.url()
    served.now[0] += tokens.LIFETIME_S + 1
    for _ in range(tokens.PENDING_LIMIT):
        served.url()


async def test_tokens_that_are_guessed(served: Served) -> None:
    url = served.url()
    base, _, token = url.rpartition("/")
    for guess in ("", "x", token[:-1], token + "x", token.swapcase(), "%2e", "../exec"):
        with pytest.raises(Refusal) as refused:
            await Spdy().connect(f"{base}/{guess}", _PROTOCOL)
        assert refused.value.status in (400, 404)
    await (await Spdy().connect(url, _PROTOCOL)).close()


# Every way in


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("windows", [False, True])
async def test_spdy(served: Served, method: str, windows: bool) -> None:
    client = await Spdy(windows).connect(served.url(), _PROTOCOL, method)
    bodies = [os.urandom(size) for size in (0, 1, 70_000, 3 << 20)]
    connections = [Forwarded(client, served.port, str(number)) for number in range(len(bodies))]
    done = await asyncio.gather(*(one.echoes(body) for one, body in zip(connections, bodies, strict=True)))
    assert done == [True] * len(bodies)
    await client.close()


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("windows", [False, True])
async def test_spdy_in_a_websocket(served: Served, method: str, windows: bool) -> None:
    client = await TunnelSpdy(windows).connect(served.url(), _PROTOCOL, method)
    connections = [Forwarded(client, served.port, str(number)) for number in range(5)]
    done = await asyncio.gather(*(one.echoes(os.urandom(300_000 * n)) for n, one in enumerate(connections)))
    assert done == [True] * 5
    broken = Forwarded(client, 1, "broken")
    assert b"port 1" in await broken.error.got()
    assert await Forwarded(client, served.port, "after").echoes(b"still here")
    await client.close()


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v4.base64.channel.k8s.io"])
async def test_channels(served: Served, protocol: str) -> None:
    client = await Channels(protocol).connect(served.url(served.port, served.port))
    for channel in range(4):
        assert await client.read(channel) == served.port.to_bytes(2, "little")
    body = os.urandom(40_000)
    for channel in (0, 2):
        client.send(channel, body)
    for channel in (0, 2):
        got = b""
        while len(got) < len(body):
            got += await client.read(channel)
        assert got == body
    await client.close()


async def test_ipv6_when_ipv4_has_nobody(served: Served) -> None:
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with listening:
        listening.settimeout(scaled(10))
        client = await Spdy().connect(served.url(), _PROTOCOL)
        connection = Forwarded(client, listening.getsockname()[1])
        accepted, _ = await asyncio.to_thread(listening.accept)
        with accepted:
            accepted.sendall(b"six")
        assert await connection.data.until(b"six") == b"six"
        await client.close()


# Time


async def test_a_client_that_asks_for_nothing() -> None:
    async with serving(creation_timeout_s=0.3) as served:
        port = int(served.url().split(":")[2].split("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /exec")
        async with asyncio.timeout(scaled(10)):
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_that_is_never_complete() -> None:
    async with serving(creation_timeout_s=0.3) as served:
        client = await Spdy().connect(served.url(), _PROTOCOL)
        half = client.open(streamtype="data", port=str(served.port), requestid="half")
        await half.got()
        assert half.reset
        assert await Forwarded(client, served.port, "whole").echoes(b"fine")
        await client.close()


async def test_a_command_whose_streams_never_come() -> None:
    """One of no known kind, and a second one of a kind, are refused; nothing runs before all are there."""
    async with serving(creation_timeout_s=0.5) as served:
        request = Exec(cast(Container, None), ("true",), Streams(stdin=False, stdout=True, stderr=True, tty=False))
        client = await Spdy().connect(served.server.url(request))
        error, again, unknown, unasked = (client.open(streamtype=kind) for kind in ("error", "error", "?", "stdin"))
        for stream in (error, again, unknown, unasked):
            await stream.replied.wait()
        assert [stream.reset for stream in (error, again, unknown, unasked)] == [False, True, True, True]
        await client.closed()
        assert client.goaway
        await client.close()


async def test_an_idle_connection_ends_and_a_busy_one_does_not() -> None:
    async with serving(idle_timeout_s=0.6) as served:
        idle = await Spdy().connect(served.url(), _PROTOCOL)
        Forwarded(idle, served.port)
        busy = await Spdy().connect(served.url(), _PROTOCOL)
        connection = Forwarded(busy, served.port)
        ended = asyncio.create_task(idle.closed())
        while not ended.done():
            await connection.data.write(b"tick")
            await connection.data.until(b"tick")
            await asyncio.sleep(0.05)
        connection.data.end()
        await connection.data.got()
        assert idle.goaway
        assert not busy.goaway
        await idle.close()
        await busy.close()


def _send_on(sock: socket.socket) -> None:
    while True:
        sock.send(bytes(1 << 20))


@pytest.mark.parametrize("how", ["idle", "bad"])
async def test_a_client_that_never_reads_ends_too(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What it was to be told is never sent, and must not keep its connection and all that is behind that."""
    monkeypatch.setattr(link, "LINGER_S", 0.3)
    async with serving(idle_timeout_s=1 if how == "idle" else 60) as served:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(scaled(10))
            client = await Spdy().connect(served.url(), _PROTOCOL)
            client.writer.transport.pause_reading()
            client.send(frames.settings(1 << 30) + frames.window_update(0, 1 << 30))
            Forwarded(client, listening.getsockname()[1])
            accepted, _ = await asyncio.to_thread(listening.accept)
            with accepted:
                accepted.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    await asyncio.to_thread(_send_on, accepted)
                assert served.server._links
                if how == "bad":
                    client.send(frames.data(77, b"x"))
                await until(lambda: not served.server._links)
        client.writer.transport.resume_reading()
        await client.close()


async def test_what_comes_after_the_end_is_not_kept() -> None:
    async with serving() as served:
        client = await Spdy().connect(served.url(), _PROTOCOL)
        (ending,) = served.server._links
        ending.finish(say=False)
        for _ in range(8):
            client.send(bytes(1 << 20))
            await client.writer.drain()
        assert ending._left == b""
        await client.close()


# TLS


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]  # type: ignore[list-item]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def trusting(cert: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(cert))


async def test_a_replaced_certificate(tmp_path: Path) -> None:
    """New connections get the new one; those that stand go on; a bad one changes nothing."""
    first, second = certificate(tmp_path, "first"), certificate(tmp_path, "second")
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def install(file: Path, content: bytes) -> None:
        fresh = file.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.rename(file)

    install(cert, first[0].read_bytes())
    install(key, first[1].read_bytes())
    async with serving(tls_cert=str(cert), tls_key=str(key)) as served:
        assert served.url().startswith("https://")
        old = await Spdy().connect(served.url(), _PROTOCOL, tls=trusting(first[0]))
        install(cert, second[0].read_bytes())  # and the key is that of the first
        half = await Spdy().connect(served.url(), _PROTOCOL, tls=trusting(first[0]))
        await half.close()
        install(key, second[1].read_bytes())
        new = await Spdy().connect(served.url(), _PROTOCOL, tls=trusting(second[0]))
        with pytest.raises(ssl.SSLCertVerificationError):
            await Spdy().connect(served.url(), _PROTOCOL, tls=trusting(first[0]))
        install(cert, b"garbage")
        kept = await Spdy().connect(served.url(), _PROTOCOL, tls=trusting(second[0]))
        for client in (old, new, kept):
            assert await Forwarded(client, served.port).echoes(os.urandom(300_000))
            await client.close()


# Clients that break off, and those that break the rules


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_vanishes_at_each_step(served: Served, step: int, how: str) -> None:
    """After so many bytes of a whole conversation's beginning; nothing of it is left."""
    url = served.url()
    before = len(os.listdir("/proc/self/fd"))
    compressor = frames.Compressor()
    fields = {"port": str(served.port), "requestid": "0"}
    closing = compressor.syn_stream(1, {"streamtype": "error"} | fields, frames.FIN)
    opening = compressor.syn_stream(3, {"streamtype": "data"} | fields)
    head = f"POST /{url.split('/', 3)[3]} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    parts = [
        head.encode(),
        b"X-Stream-Protocol-Version: portforward.k8s.io\r\nContent-Length: 0\r\n\r\n",
        frames.settings(65536),
        closing,
        opening[:20],
        opening[20:],
        frames.data(3, bytes(50_000)),
        frames.data(3, b"", frames.FIN),
    ]
    port = int(url.split(":")[2].split("/")[0])
    sock = socket.create_connection(("127.0.0.1", port), scaled(10))
    for part in parts[: step + 1]:
        await asyncio.to_thread(sock.sendall, part)
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    await until(lambda: not served.server._links and len(os.listdir("/proc/self/fd")) <= before)


async def test_a_slow_reader_stops_the_writer_and_not_the_server(served: Served) -> None:
    client = await Spdy().connect(served.url(), _PROTOCOL)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(scaled(10))
        connection = Forwarded(client, listening.getsockname()[1])
        accepted, _ = await asyncio.to_thread(listening.accept)
        with accepted:
            accepted.setblocking(False)
            client.writer.transport.pause_reading()
            sent = 0
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(3):
                    while sent < 1 << 30:
                        await loop.sock_sendall(accepted, bytes(1 << 20))
                        sent += 1 << 20
            except TimeoutError:
                pass
            assert sent < 64 << 20, "stopped"
            other = await Spdy().connect(served.url(), _PROTOCOL)
            assert await Forwarded(other, served.port).echoes(os.urandom(100_000))
            await other.close()
        client.writer.transport.resume_reading()
        assert len(await connection.data.got()) >= sent
    await client.close()


@pytest.mark.parametrize("how", ["spdy", "websocket"])
async def test_a_client_that_closes_while_it_is_stopped(served: Served, how: str) -> None:
    """Its end waits behind data that nobody takes; it is noticed all the same."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(scaled(10))
        port = listening.getsockname()[1]
        made: Any
        if how == "spdy":
            made = await Spdy().connect(served.url(), _PROTOCOL)
            stream = Forwarded(made, port).data
            part = frames.data(stream.number, bytes(60_000))
        else:
            made = await Channels("v4.channel.k8s.io").connect(served.url(port))
            part = b""
        accepted, _ = await asyncio.to_thread(listening.accept)
        with accepted:
            sock = made.writer.get_extra_info("socket")
            stuck = False
            while not stuck:
                if how == "spdy":
                    made.writer.write(part)
                else:
                    made.send(0, bytes(60_000))
                try:
                    async with asyncio.timeout(1):
                        await made.writer.drain()
                except TimeoutError:
                    stuck = True
            duplicate = socket.socket(fileno=os.dup(sock.fileno()))
            made.writer.transport.abort()  # asyncio's buffer goes; the kernel's is full
            await made.task
            duplicate.close()
            await until(lambda: not served.server._links)


def _bombs() -> dict[str, bytes]:
    """What a client sends once it is connected, and must not."""
    compressor = frames.Compressor()
    blown = frames.Compressor().syn_stream(1, {"streamtype": "x" * (1 << 20)})
    twice = [compressor.syn_stream(1, {"streamtype": "error", "port": "1"}) for _ in range(2)]
    # Each block alone is small: the third is made of what the shared dictionary remembers of the first two.
    shared = frames.Compressor()
    remembered = [shared.syn_stream(2 * n + 1, {f"h{n}": "y" * 60_000, "z": "w" * 9_000}) for n in range(3)]
    return {
        "a control frame without an end": frames.control(frames.SYN_STREAM, b"")[:5] + b"\xff\xff\xff",
        "an oversized control frame": frames.control(frames.SETTINGS, bytes(40_000)),
        "headers that blow up": blown,
        "headers that blow up by what was before": b"".join(remembered),
        "headers that are no zlib": frames.control(frames.SYN_STREAM, bytes(10) + b"garbage"),
        "data on a stream that never was": frames.data(77, b"x"),
        "a stream twice": b"".join(twice),
        "settings that lie": frames.control(frames.SETTINGS, b"\0\0\0\x09" + bytes(8)),
        "a window without an end": frames.window_update(0, 0x7FFFFFFF) * 2,
        "a stream with an even number": frames.Compressor().syn_stream(2, {}),
        "a reply to nothing": frames.control(frames.SYN_REPLY, bytes(8)),
        "version 2": b"\x80\x02" + frames.ping(1)[2:],
        "a request again": b"GET / HTTP/1.1\r\n\r\n" * 10_000,
    }


@pytest.mark.parametrize("what", list(_bombs()))
async def test_a_client_that_breaks_the_rules_breaks_its_own_connection(served: Served, what: str) -> None:
    good = await Spdy().connect(served.url(), _PROTOCOL)
    bad = await Spdy().connect(served.url(), _PROTOCOL)
    bad.send(_bombs()[what])
    bad.send(frames.ping(99))
    if what == "a stream twice":
        stream = bad.streams[1] = Stream(bad, 1)
        await stream.got()
        assert stream.reset
    else:
        await bad.closed()
    assert await Forwarded(good, served.port).echoes(os.urandom(100_000))
    await bad.close()
    await good.close()


@pytest.mark.parametrize(
    "message", [b"\x82\x7f" + b"\xff" * 8, b"\xf2\x85mask", b"\x82\x01x", b"\x89\xfe\x10\x00" + bytes(5000)]
)
async def test_websocket_frames_that_are_none(served: Served, message: bytes) -> None:
    bad = await Channels("v4.channel.k8s.io").connect(served.url(served.port))
    bad.writer.write(message)
    async with asyncio.timeout(scaled(10)):
        await bad.task
    await bad.close()

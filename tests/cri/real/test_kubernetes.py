"""The Kubernetes Python client's streams, which nobody here wrote, at cribd's addresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from kubernetes.client import Configuration
from kubernetes.stream import ws_client

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.streams import attach_url, exec_url, forward_url
from tests.limits import scaled
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "overlay")]


@pytest_asyncio.fixture
async def container(real: Real) -> str:
    pod = await real.pod(real.pod_config(network=False))
    script = 'while read -r word; do echo "got $word"; done'
    return await real.run(pod, "sh", "-c", script, stdin=True)


@asynccontextmanager
async def connect(url: str, **options: Any) -> AsyncIterator[Any]:
    """The client's stream. What an API server is told by path and query, cribd knows by the token."""
    configuration = Configuration()
    configuration.verify_ssl = False
    call: Callable[..., Any] = ws_client.websocket_call
    stream = await asyncio.to_thread(call, configuration, "GET", url, _preload_content=False, **options)
    try:
        yield stream
    finally:
        await asyncio.to_thread(stream.close)
        stream.sock.shutdown()


async def test_exec(real: Real, container: str) -> None:
    script = "read -r line; echo got $line; read -r _; echo err >&2; exit 7"
    async with connect(await exec_url(real, container, "sh", "-c", script, stdin=True)) as stream:

        def talk() -> tuple[str, str, int]:
            stream.write_stdin("it\n")
            out = stream.readline_stdout(timeout=scaled(20))  # of a connection that is closed already it tells none
            stream.write_stdin("and\n")
            stream.run_forever(timeout=scaled(20))
            return out, stream.read_stderr(), stream.returncode

        assert await asyncio.to_thread(talk) == ("got it", "err\n", 7)


async def test_exec_binary_and_much(real: Real, container: str) -> None:
    async with connect(await exec_url(real, container, "cat", "/bin/busybox"), binary=True) as stream:

        def read() -> tuple[bytes, int]:
            parts = []
            while stream.is_open():
                stream.update(timeout=1)
                parts.append(stream.read_stdout() if stream.peek_stdout() else b"")
            return b"".join(parts), stream.returncode

        got, code = await asyncio.to_thread(read)
        size = int((await real.sh(container, "stat -c %s /bin/busybox")).stdout)
        assert (len(got), code) == (size, 0)


async def test_a_terminal(real: Real, container: str) -> None:
    async with connect(await exec_url(real, container, "sh", tty=True, stdin=True)) as stream:

        def talk() -> str:
            stream.write_channel(ws_client.RESIZE_CHANNEL, '{"Width": 99, "Height": 11}')
            stream.write_stdin("stty size; exit 3\n")
            stream.run_forever(timeout=scaled(20))
            return str(stream.read_stdout())

        assert "11 99" in await asyncio.to_thread(talk)
        assert stream.returncode == 3


async def test_attach(real: Real, container: str) -> None:
    async with connect(await attach_url(real, container, stdin=True)) as stream:
        await real.sh(container, "true")

        def talk() -> str:
            stream.write_stdin("this\n")
            return str(stream.readline_stdout(timeout=scaled(20)))

        assert await asyncio.to_thread(talk) == "got this"
    assert (await real.status(container)).state == pb.CONTAINER_RUNNING


async def test_port_forward(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data.upper())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    configuration = Configuration()
    url = await forward_url(real, pod, port)
    ports = [("ports", str(port))]
    call = await asyncio.to_thread(ws_client.portforward_call, configuration, "GET", url, query_params=ports)

    def talk() -> bytes:
        sock = call.socket(port)
        sock.setblocking(True)
        sock.settimeout(scaled(20))
        sock.sendall(b"shout")
        got = b""
        while len(got) < 5:
            got += sock.recv(100)
        sock.close()
        return got

    assert await asyncio.to_thread(talk) == b"SHOUT"
    assert call.error(port) is None
    server.close()

"""Port-forward into a pod's network namespace, over SPDY, a tunnel of it, and channels."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import TypeAlias

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.streams import channels, forward_url, spdy
from tests.cri.streaming.client import Spdy, Stream
from tests.limits import scaled
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]

Servers: TypeAlias = list[subprocess.Popen[bytes]]
_PROTOCOL = "portforward.k8s.io"
_SERVER = """
import asyncio

async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def bye(reader, writer):
    writer.write(b"bye")
    writer.write_eof()
    print((await reader.read()).decode(), flush=True)
    writer.close()

async def main():
    await asyncio.start_server(echo, "127.0.0.1", 8080)
    await asyncio.start_server(echo, "::1", 8081)
    await asyncio.start_server(bye, "127.0.0.1", 8082)
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def servers() -> Iterator[Servers]:
    made: Servers = []
    yield made
    for server in made:
        server.kill()
        server.communicate()


async def serving(real: Real, servers: Servers) -> str:
    """A pod whose ports answer with what they are sent: 8080, and 8081 by IPv6 alone; 8082 says bye, and listens."""
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    pid = json.loads((await real.client.ContainerStatus(request)).info["info"])["pid"]
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", _SERVER]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    servers.append(server)
    assert server.stdout
    assert await asyncio.to_thread(server.stdout.readline) == b"ready\n"
    return pod


class Forwarded:
    """One connection through a client, as kubectl makes it."""

    def __init__(self, client: Spdy, port: int, request: str = "") -> None:
        fields = {"port": str(port)} | ({"requestid": request} if request else {})
        self.error: Stream = client.open(streamtype="error", **fields)
        self.error.end()
        self.data: Stream = client.open(streamtype="data", **fields)


@pytest.mark.parametrize("port", [8080, 8081])
async def test_every_byte_and_each_end(real: Real, servers: Servers, port: int) -> None:
    pod = await serving(real, servers)
    body = os.urandom(4 << 20)
    async with spdy(await forward_url(real, pod), _PROTOCOL) as client:
        connection = Forwarded(client, port, "0")

        async def give() -> None:
            await connection.data.write(body)
            connection.data.end()

        giving = asyncio.create_task(give())
        assert await connection.data.got() == body
        assert await connection.error.got() == b""
        await giving


async def test_a_client_that_never_ends_its_half_hears_of_the_end(real: Real, servers: Servers) -> None:
    pod = await serving(real, servers)
    async with spdy(await forward_url(real, pod), _PROTOCOL) as client:
        connection = Forwarded(client, 8082)
        assert await connection.data.got() == b"bye"
        assert await connection.error.got() == b""
        await connection.data.write(b"what is said now")
        connection.data.end()
        heard = servers[0].stdout
        assert heard
        assert await asyncio.to_thread(heard.readline) == b"what is said now\n"


async def test_many_at_once_and_one_that_breaks(real: Real, servers: Servers) -> None:
    pod = await serving(real, servers)
    async with spdy(await forward_url(real, pod), _PROTOCOL) as client:
        good = [Forwarded(client, 8080, str(number)) for number in range(40)]
        bad = Forwarded(client, 9, "bad")
        for number, connection in enumerate(good):
            await connection.data.write(f"hello {number}".encode())
        told = await bad.error.got()
        assert b"port 9" in told
        assert b"refused" in told
        await bad.data.got()
        good[0].data.give_up()
        for number, connection in enumerate(good[1:], 1):
            connection.data.end()
            assert await connection.data.got() == f"hello {number}".encode()
        again = Forwarded(client, 8080)  # as clients before requestid did
        await again.data.write(b"x")
        again.data.end()
        assert await again.data.got() == b"x"
        for fields in ({"port": "0"}, {"port": "x" * 100}, {"port": "80", "streamtype": "what"}):
            stream = client.open(**({"streamtype": "data"} | fields))
            await stream.replied.wait()
            assert stream.reset


async def test_a_reader_that_stops_stops_its_own_connection_alone(real: Real, servers: Servers) -> None:
    pod = await serving(real, servers)
    async with spdy(await forward_url(real, pod), _PROTOCOL, windows=True) as client:
        slow, quick = Forwarded(client, 8080, "1"), Forwarded(client, 8080, "2")
        giving = asyncio.create_task(slow.data.write(bytes(2 << 20)))
        await quick.data.write(b"hello")
        quick.data.end()
        assert await quick.data.got() == b"hello"
        giving.cancel()


async def test_a_pod_that_is_gone(real: Real) -> None:
    """Its connections end with it, though their clients have not ended them: each held its network namespace."""
    pod = await real.pod()
    await real.run(pod, "sh", "-c", "while :; do nc -l -p 7000 -e sh -c 'echo up; exec sleep 4321'; done")
    async with spdy(await forward_url(real, pod), _PROTOCOL) as client:
        number = 0
        while True:  # until it listens
            connection = Forwarded(client, 7000, str(number := number + 1))
            if await connection.data.read() == b"up\n":
                break
        await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
        assert await connection.data.got() == b""
        assert await connection.error.got() == b""
        refused = Forwarded(client, 7000, "after")
        assert b"error forwarding port 7000" in await refused.error.got()


async def test_host_network(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(scaled(20))
        async with spdy(await forward_url(real, pod), _PROTOCOL) as client:
            connection = Forwarded(client, server.getsockname()[1], "0")
            await connection.data.write(b"hello")
            accepted, _ = await asyncio.to_thread(server.accept)
            with accepted:
                assert await asyncio.to_thread(accepted.recv, 5) == b"hello"
                accepted.sendall(b"bye")
            assert await connection.data.until(b"bye") == b"bye"


async def test_channels(real: Real, servers: Servers) -> None:
    pod = await serving(real, servers)
    async with channels(await forward_url(real, pod, 8080, 9), "v4.channel.k8s.io") as client:
        for channel, port in enumerate((8080, 8080, 9, 9)):
            assert await client.read(channel) == port.to_bytes(2, "little")
        client.send(0, b"hello")
        assert await client.until(0, b"hello") == b"hello"
        assert b"refused" in await client.read(3)


async def test_refusals(real: Real) -> None:
    for request, status in (
        (pb.PortForwardRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.PortForwardRequest(pod_sandbox_id="none"), grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await real.client.PortForward(request)
        assert caught.value.code() == status
    pod = await real.pod(real.pod_config(network=False))
    await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.client.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION

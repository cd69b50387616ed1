"""What cribd offers, asked by who has no right to it: ports of another network, events and figures."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import REPOSITORY
from tests.cri.real.streams import forward_url, spdy
from tests.requires import requires
from tests.runtime.conftest import TIMEOUT_S
from tests.security import weak
from tests.security.conftest import WeakCribd
from tests.security.defects import attack

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "overlay", "bridge", "nft")]


async def reached(real: Real) -> set[int]:
    """Ask for ports by way of a pod where nobody listens: which were answered by the host, which by another pod."""
    other = await real.run(await real.pod(real.pod_config("other")), "nc", "-l", "-p", "8082", "-e", "echo", "other")
    ports = Path(f"/proc/{await real.pid(other)}/net/tcp6"), Path(f"/proc/{await real.pid(other)}/net/tcp")
    async with asyncio.timeout(TIMEOUT_S):
        while not any(":1F92 " in path.read_text() for path in ports):  # noqa: ASYNC110 - 8082 isn't listened on yet
            await asyncio.sleep(0.01)
    pod = await real.pod()
    answered = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered.add(writer.get_extra_info("sockname")[1])
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, family=socket.AF_INET)
    host = server.sockets[0].getsockname()[1]
    async with server, spdy(await forward_url(real, pod, host, 8082), "portforward.k8s.io") as client:
        for number, port in enumerate((str(host), "8082", f"127.0.0.1:{host}", f"localhost:{host}", f"-{host}")):
            fields = {"port": port, "requestid": str(number)}
            error, data = (client.open(streamtype=kind, **fields) for kind in ("error", "data"))
            error.end()
            data.end()
            await data.replied.wait()
            if not data.reset and await data.got():
                answered.add(8082)
    return {0 if port == host else port for port in answered}  # 0: the host's


@attack(
    "port-forward into another network",
    sentence="A port-forward to a pod asks for a port that is open on the host's loopback address, or in another pod, "
    "also with an address in the port's place",
    guard="the connection's socket is made by the pod's monitor in the pod's network namespace; a port is a number",
    control="test_forward_control_a_socket_of_the_hosts",
)
async def test_port_forward_stays_in_its_pod(real: Real) -> None:
    assert await reached(real) == set()


async def test_forward_control_a_socket_of_the_hosts(weak_cribd: WeakCribd) -> None:
    made = "socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)"
    edits: weak.Edits = (("/cri/streaming/forward.py", "await self._request.pod.monitor.tcp_socket(family)", made),)
    assert await reached(await weak_cribd(edits)) == {0}


ASK = """
import asyncio, os, sys
import grpc
from cri.api import cri_pb2 as pb
from tests.cri.client import Client
os.setgroups([]); os.setgid(65534); os.setuid(65534)

async def ask():
    client = Client(sys.argv[1])
    calls = {
        "events": lambda: client.GetContainerEvents(pb.GetEventsRequest(), timeout=60).read(),
        "metrics": lambda: client.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest()),
        "descriptors": lambda: client.ListMetricDescriptors(pb.ListMetricDescriptorsRequest()),
        "stats": lambda: client.ListContainerStats(pb.ListContainerStatsRequest()),
    }
    print("asking", flush=True)
    for name, call in calls.items():
        try:
            await call()
            print(name, flush=True)
        except grpc.aio.AioRpcError as error:
            print(error.code().name, flush=True)

asyncio.run(ask())
"""


async def told(real: Real) -> list[str]:
    """What an ordinary user who calls cribd is told, while containers come and go."""
    pod = await real.pod()
    command = [sys.executable, "-c", ASK, real.daemon.listen]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True) as asking:
        answers = asyncio.create_task(asyncio.to_thread(asking.communicate, None, TIMEOUT_S))
        number = 0
        while not answers.done():  # an event for as long as it waits for one
            number += 1
            made = await real.run(pod, "true", name=f"c{number}")
            await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=made))
        return (await answers)[0].split()


@attack(
    "events and metrics as an ordinary user",
    sentence="A user without rights on the node asks for the containers' events, metrics and stats",
    guard="the socket is 0600 and its directory root's: there is no connection",
    control="test_events_control_wider_modes",
)
async def test_events_and_metrics_are_not_for_ordinary_users(real: Real) -> None:
    assert await told(real) == ["asking", *["UNAVAILABLE"] * 4]


async def test_events_control_wider_modes(real: Real) -> None:
    real.daemon.directory.chmod(0o755)
    os.chmod(real.daemon.listen.removeprefix("unix://"), 0o666)
    assert await told(real) == ["asking", "events", "metrics", "descriptors", "stats"]

"""Clients that come and go, many times over, and probes: nothing of them stays, and other calls are answered meanwhile.

`CRIB_CYCLES` (default 40) says how often; before a release 1000 is right.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.streams import attach_url, exec_url
from tests.cri.streaming import frames
from tests.cri.streaming.client import Channels, Spdy, code
from tests.limits import scaled
from tests.requires import requires

CYCLES = int(os.environ.get("CRIB_CYCLES", "40"))
_AT_ONCE = 8
_STEPS = 5

pytestmark = [
    pytest.mark.asyncio,
    requires("root", "busybox", "overlay"),
    pytest.mark.timeout(scaled(120 + CYCLES)),
]


@dataclass(frozen=True)
class Kept:
    """What cribd and a pod's monitor hold. Of memory what is their own: the pages of programs' files are everybody's.

    They are mapped when they are first used: those that a log's first line needs are a MiB.
    """

    files: tuple[int, ...]
    memory_bytes: tuple[int, ...]


def kept(*pids: int) -> Kept:
    return Kept(tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids), tuple(map(_memory, pids)))


def _memory(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon", "RssShmem")))


@pytest_asyncio.fixture
async def container(real: Real) -> str:
    pod = await real.pod(real.pod_config(network=False))
    return await real.run(pod, "sh", "-c", 'while read -r word; do echo "got $word"; done', stdin=True)


async def _repeat(real: Real, container: str, once: Callable[[int], Awaitable[None]]) -> None:
    """So many times, some at once; memory and descriptors are as after the first ones, and calls don't wait."""
    assert real.daemon.process
    monitor = _parent(await real.pid(container))
    pids = real.daemon.process.pid, monitor
    for number in range(2 * _STEPS):
        await once(number)
    await until(lambda: not _connected(pids))
    before = kept(*pids)
    latency_s: list[float] = []
    done = asyncio.Event()

    async def ask() -> None:
        while not done.is_set():
            begin = time.monotonic()
            await real.client.ListContainers(pb.ListContainersRequest())
            latency_s.append(time.monotonic() - begin)
            await asyncio.sleep(0.02)

    asking = asyncio.create_task(ask())
    for begin in range(0, CYCLES, _AT_ONCE):
        await asyncio.gather(*(once(number) for number in range(begin, min(begin + _AT_ONCE, CYCLES))))
    done.set()
    await asking
    await until(lambda: kept(*pids).files <= before.files)
    after = kept(*pids)
    growth = [a - b for a, b in zip(after.memory_bytes, before.memory_bytes, strict=True)]
    median_s = sorted(latency_s)[len(latency_s) // 2]
    logging.getLogger(__name__).warning(
        "%d cycles: memory grew by %s, calls took %.4f s, at most %.4f s", CYCLES, growth, median_s, max(latency_s)
    )
    assert growth[0] < (8 << 20) and growth[1] < (256 << 10), growth
    assert max(latency_s) < scaled(2)


def _connected(pids: tuple[int, ...]) -> bool:
    """Whether a connection is open still."""
    with open(f"/proc/{pids[0]}/net/tcp") as file:
        inodes = {f"socket:[{line.split()[9]}]" for line in file if line.split()[3] == "01"}
    links = set()
    for entry in os.listdir(f"/proc/{pids[0]}/fd"):
        try:
            links.add(os.readlink(f"/proc/{pids[0]}/fd/{entry}"))
        except FileNotFoundError:
            continue
    return bool(inodes & links)


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


async def test_attach_and_detach(real: Real, container: str) -> None:
    async def once(number: int) -> None:
        """Vanishes after another step of the protocol each time, by a close or an abort."""
        url = await attach_url(real, container, stdin=True)
        if number % 2:
            socket = await Channels().connect(url)
            socket.send(0, b"x\n")
            if number % 3:
                socket.writer.transport.abort()
            await socket.close()
            return
        client = await Spdy().connect(url)
        names = ("stdin", "stdout", "stderr")[: number % _STEPS]
        for name in ("error", *names):
            client.open(streamtype=name)
        if number % _STEPS > 3:
            for stream in client.streams.values():
                await stream.replied.wait()
            await client.streams[3].write(b"word\n")
        if number % 4:
            client.writer.transport.abort()
        await client.close()

    await _repeat(real, container, once)
    assert (await real.status(container)).state == pb.CONTAINER_RUNNING
    assert (await real.sh(container, "echo here")).stdout == b"here\n"


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("what", ["exec", "attach"])
async def test_a_client_that_vanishes_at_each_step(real: Real, container: str, what: str, how: str) -> None:
    """After so many bytes of a whole conversation's beginning; nothing of it is left, and the container goes on."""
    assert real.daemon.process
    pids = real.daemon.process.pid, _parent(await real.pid(container))
    await real.sh(container, "true")
    before = kept(*pids).files
    for step in range(len(_conversation("/"))):
        if what == "exec":
            url = await exec_url(real, container, "sh", "-c", "sleep 4321 & cat", stdin=True)
        else:
            url = await attach_url(real, container, stdin=True)
        address = urlsplit(url)
        sock = socket.create_connection((address.hostname, address.port or 0), scaled(10))
        for part in _conversation(url)[: step + 1]:
            await asyncio.to_thread(sock.sendall, part)
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        if step % 2:  # else the next one comes while it goes
            await until(lambda: kept(*pids).files <= before and not _sleeping())
    await until(lambda: kept(*pids).files <= before and not _sleeping())
    assert (await real.status(container)).state == pb.CONTAINER_RUNNING
    assert (await real.sh(container, "echo here")).stdout == b"here\n"


def _conversation(url: str) -> list[bytes]:
    """All that a client with three streams sends, cut where it matters."""
    compressor = frames.Compressor()
    kinds = ("error", "stdin", "stdout", "stderr")
    opening = [compressor.syn_stream(2 * n + 1, {"streamtype": kind}) for n, kind in enumerate(kinds)]
    head = f"POST {urlsplit(url).path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    return [
        head[:9].encode(),
        head[9:].encode(),
        b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\nContent-Length: 0\r\n\r\n",
        frames.settings(65536),
        *(part for frame in opening for part in (frame[:20], frame[20:])),
        frames.data(3, b"word\n"),
        frames.data(3, bytes(100_000))[:50_000],
        frames.data(3, bytes(100_000))[50_000:],
        frames.data(3, b"", frames.FIN),
        frames.rst(5),
    ]


async def test_probes(real: Real, container: str) -> None:
    """ExecSync in numbers, as a node full of probes makes them."""

    async def once(_: int) -> None:
        request = pb.ExecSyncRequest(container_id=container, cmd=["echo", "well"], timeout=20)
        for answer in await asyncio.gather(*(real.client.ExecSync(request) for _ in range(_STEPS))):
            assert (answer.stdout, answer.exit_code) == (b"well\n", 0)

    await _repeat(real, container, once)


async def test_exec_and_kill(real: Real, container: str) -> None:
    async def once(number: int) -> None:
        url = await exec_url(real, container, "sh", "-c", "echo up; exec sleep 4321", stdin=True)
        step = number % _STEPS
        if number % 2:
            socket = await Channels().connect(url)
            if step > 1:
                await socket.until(1, b"up")
            socket.writer.transport.abort()
            await socket.close()
            return
        client = await Spdy().connect(url)
        for name in ("error", "stdin", "stdout", "stderr")[: step + 1]:
            client.open(streamtype=name)
        if step >= 3:
            await client.streams[5].until(b"up")
        client.writer.transport.abort()
        await client.close()

    await _repeat(real, container, once)
    await until(lambda: not _sleeping())
    async with asyncio.timeout(scaled(20)):
        client = await Spdy().connect(await exec_url(real, container, "sh", "-c", "exit 3"))
        streams = await client.command("stdout", "stderr")
        assert code(await streams["error"].got()) == 3
        await client.close()


def _sleeping() -> bool:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    if file.read() == b"sleep\x004321\x00":
                        return True
            except OSError:
                continue
    return False

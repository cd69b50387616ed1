"""Output and attached clients that are to use up the node."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest

from cri.container import exec as exec_module
from cri.container.exec import KEPT_BYTES, Output
from runtime.engine import Pod
from tests.requires import requires
from tests.runtime.conftest import TIMEOUT_S, Bench, container
from tests.security.conftest import execute
from tests.security.defects import attack

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]
FLOOD_MIB = 48


@pytest.fixture
def devnull() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)


async def kept(bench: Bench, null: int) -> int:
    """How much of a command's flood cribd holds in memory."""
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "1000"))
    output = Output()
    try:
        flood = f"i=0; while [ $i -lt {FLOOD_MIB} ]; do cat /chunk; i=$((i+1)); done"
        (bench.directory / f"upper{bench.count}/chunk").write_bytes(b"y\n" * (1 << 19))
        running = execute(bench, pod, 1, (null, *output.write_ends), "sh", "-c", flood)  # type: ignore[arg-type]
        output.release_write_ends()
        await asyncio.wait_for(running.wait(), TIMEOUT_S)
        return sum(map(len, await output.finish(TIMEOUT_S)))
    finally:
        output.close()


@attack(
    "CVE-2022-31030", "CVE-2022-1708",
    sentence="A command run by ExecSync writes without end",
    guard="the first 16 MiB, less a little, are kept, and the rest is read and dropped",
    control="test_31030_control_all_is_kept",
)  # fmt: skip
async def test_cve_2022_31030_and_2022_1708(bench: Bench, devnull: int) -> None:
    assert await kept(bench, devnull) <= KEPT_BYTES < 16 << 20


async def test_31030_control_all_is_kept(bench: Bench, devnull: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_module, "KEPT_BYTES", 1 << 40)
    assert await kept(bench, devnull) == FLOOD_MIB << 20


async def drained(bench: Bench, null: int, drain_s: float) -> bool:
    """Whether a command's output counts as complete while a child that it left behind holds it open."""
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "1000"))
    output = Output()
    try:
        script = "sleep 1000 & echo done"
        running = execute(bench, pod, 1, (null, *output.write_ends), "sh", "-c", script)  # type: ignore[arg-type]
        output.release_write_ends()
        await asyncio.wait_for(running.wait(), TIMEOUT_S)
        finishing = asyncio.ensure_future(output.finish(drain_s))
        bound = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.5, bound.set_result, None)
        await bound  # what is not complete by now waits for the child
        ended = finishing.done()
        assert not ended or (await finishing)[0] == b"done\n"
        finishing.cancel()
        return ended
    finally:
        output.close()


@attack(
    "CVE-2026-53495",
    sentence="A command run by ExecSync, such as a probe, leaves a child behind that holds its output open",
    guard="after the command has ended its output is waited for at most a second (limits.exec_drain_s)",
    control="test_53495_control_no_bound",
)
async def test_cve_2026_53495(bench: Bench, devnull: int) -> None:
    assert await drained(bench, devnull, 0.1)


async def test_53495_control_no_bound(bench: Bench, devnull: int) -> None:
    assert not await drained(bench, devnull, 10.0**6)


def descriptors(pod: Pod) -> int:
    return len(os.listdir(f"/proc/{pod.monitor_pid}/fd"))


async def attached(bench: Bench, *, hang_up: bool, times: int = 100) -> int:
    """By how many descriptors a monitor grows with so many attached clients."""
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "1000"))
    before = descriptors(pod)
    held: list[Any] = []
    for _ in range(times):
        client = await pod.attach("c", stdin=False)
        if hang_up:
            client.close()
        else:
            held.append(client)
    await pod.containers()  # answered after all that came before
    async with asyncio.timeout(TIMEOUT_S):
        while hang_up and descriptors(pod) > before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    grown = descriptors(pod) - before
    for client in held:
        client.close()
    return grown


@attack(
    "CVE-2025-64329",
    sentence="Clients attach and go away again and again, and each leaves something behind",
    guard="a monitor lets go of a client that has hung up",
    control="test_64329_control_clients_stay",
)
async def test_cve_2025_64329(bench: Bench) -> None:
    assert await attached(bench, hang_up=True) == 0


async def test_64329_control_clients_stay(bench: Bench) -> None:
    assert await attached(bench, hang_up=False) >= 100

"""The spare monitor: which pods get it, and what becomes of it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from runtime.engine import PodStart
from runtime.zygote.launch import Zygote, launch
from tests.requires import requires
from tests.runtime.conftest import POD_ID, TIMEOUT_S, Bench

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]


async def spare(zygote: int) -> int:
    """The pid of the zygote's spare monitor, once its namespaces are made."""
    host = os.readlink("/proc/self/ns/net")
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            for pid in Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split():
                try:
                    if (
                        Path(f"/proc/{pid}/comm").read_text() == "crib-spare\n"
                        and os.readlink(f"/proc/{pid}/ns/net") != host
                    ):
                        return int(pid)
                except OSError:  # replaced
                    continue
            await asyncio.sleep(0.005)


def zygote_of(bench: Bench) -> int:
    zygote: Zygote = bench.engine._zygote
    return zygote.process.pid


async def test_a_usual_pod_gets_it_with_namespaces_of_its_own(bench: Bench) -> None:
    waiting = await spare(zygote_of(bench))
    namespaces = {kind: os.readlink(f"/proc/{waiting}/ns/{kind}") for kind in ("net", "ipc", "uts")}
    pod = await bench.pod()
    assert pod.monitor_pid == waiting
    for kind, name in namespaces.items():
        assert os.readlink(f"/proc/{waiting}/ns/{kind}") == name != os.readlink(f"/proc/self/ns/{kind}")
    assert "crib-monitor" in Path(f"/proc/{waiting}/cmdline").read_text()
    next_one = await spare(zygote_of(bench))
    for kind, name in namespaces.items():
        assert os.readlink(f"/proc/{next_one}/ns/{kind}") != name


async def test_an_unusual_pod_does_not(bench: Bench) -> None:
    waiting = await spare(zygote_of(bench))
    pod = await bench.pod(PodStart(id=POD_ID, hostname=None, net=False))
    assert pod.monitor_pid != waiting
    for kind in ("net", "uts"):
        assert os.readlink(f"/proc/{pod.monitor_pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")
    assert await spare(zygote_of(bench)) == waiting


async def test_one_that_was_killed_is_done_without(bench: Bench) -> None:
    waiting = await spare(zygote_of(bench))
    pidfd = os.pidfd_open(waiting)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        async with asyncio.timeout(TIMEOUT_S):
            while Path(f"/proc/{waiting}").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    finally:
        os.close(pidfd)
    pod = await bench.pod()
    assert pod.monitor_pid != waiting
    assert await pod.containers() == []


async def test_it_ends_with_the_zygote() -> None:
    zygote = launch()
    waiting = await spare(zygote.process.pid)
    zygote.close()
    assert not Path(f"/proc/{waiting}").exists()


async def test_it_ends_with_a_zygote_that_is_killed() -> None:
    zygote = launch()
    pidfd = os.pidfd_open(await spare(zygote.process.pid))
    try:
        zygote.process.kill()
        zygote.process.wait()
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        async with asyncio.timeout(TIMEOUT_S):
            await ended.wait()
        asyncio.get_running_loop().remove_reader(pidfd)
    finally:
        zygote.control.close()
        os.close(pidfd)

"""Containers whose process is cloned before the start: what it is then, and what becomes of it without one."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.engine import Engine, Pod, PodStart, Started
from runtime.errors import StepFailed
from runtime.linux.probe import probe
from runtime.zygote.launch import launch
from tests.requires import requires
from tests.runtime.conftest import MAPS, POD_ID, TIMEOUT_S, Bench, container

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]
KINDS = pytest.mark.parametrize("maps", [(), MAPS], ids=["plain", "user namespace"])


def children(pod: Pod) -> set[int]:
    path = Path(f"/proc/{pod.monitor_pid}/task/{pod.monitor_pid}/children")
    return set(map(int, path.read_text().split()))


async def waiting(pod: Pod) -> int:
    """The one child of the monitor, once there is one."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (found := children(pod)):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return found.pop()


async def none_left(pod: Pod) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while children(pod):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def made(bench: Bench, maps: tuple[tuple[int, int, int], ...] = ()) -> Pod:
    return await bench.pod(PodStart(id=POD_ID, hostname="pod", uids=maps, gids=maps))


@KINDS
async def test_it_becomes_the_container(bench: Bench, maps: tuple[tuple[int, int, int], ...]) -> None:
    pod = await made(bench, maps)
    request = bench.request("c", container(pod, "sh", "-c", "echo out; echo err >&2; sleep 0.1; echo $$; exit 3"))
    pod.prepare(request)
    before = await waiting(pod)
    assert [fact.id for fact in await pod.containers()] == []
    started = await bench.begin(pod, request)
    assert maps or started.pid == before
    exited = await asyncio.wait_for(bench.exited("c"), TIMEOUT_S)
    assert exited.code == 3
    assert set(bench.log("c").split()) == {"out", "err", "1"}
    assert all(step.duration_ns >= 0 for step in started.timeline)


async def test_it_holds_nothing_of_its_monitors(bench: Bench) -> None:
    pod = await made(bench)
    pod.prepare(bench.request("c", container(pod, "sleep", "100")))
    child = await waiting(pod)
    async with asyncio.timeout(TIMEOUT_S):
        while len(found := os.listdir(f"/proc/{child}/fd")) > 8:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    links = {os.readlink(f"/proc/{child}/fd/{fd}") for fd in found}
    assert not [link for link in links if "eventpoll" in link or "netlink" in link], links
    await pod.forget("c")
    await none_left(pod)


@KINDS
async def test_one_that_is_not_wanted_any_more_is_gone(bench: Bench, maps: tuple[tuple[int, int, int], ...]) -> None:
    pod = await made(bench, maps)
    request = bench.request("c", container(pod, "true"))
    pod.prepare(request)
    await waiting(pod)
    await pod.forget("c")
    await none_left(pod)
    await bench.begin(pod, request)
    assert (await asyncio.wait_for(bench.exited("c"), TIMEOUT_S)).code == 0


@pytest.mark.parametrize("reaped", [True, False])
async def test_one_that_was_killed_is_another_or_a_failed_start(bench: Bench, reaped: bool) -> None:
    pod = await made(bench)
    request = bench.request("c", container(pod, "true"))
    pod.prepare(request)
    os.kill(await waiting(pod), signal.SIGKILL)
    if reaped:
        await none_left(pod)
    (outcome,) = await asyncio.gather(bench.begin(pod, request), return_exceptions=True)
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, StepFailed) and "died" in str(outcome) and not reaped
        await none_left(pod)
        await bench.begin(pod, request)
    assert (await asyncio.wait_for(bench.exited("c"), TIMEOUT_S)).code == 0


async def test_it_ends_with_the_cribd_that_asked_for_it(bench: Bench) -> None:
    pod = await made(bench)
    request = bench.request("c", container(pod, "true"))
    pod.prepare(request)
    await waiting(pod)
    state = bench.engine.directory(POD_ID).parent.parent
    bench.engine.close()
    await none_left(pod)
    bench.engine = Engine(state, launch(), probe())
    found = await bench.engine.connect(POD_ID)
    assert found is not None
    bench.watch(found)
    await bench.begin(found, request)
    assert (await asyncio.wait_for(bench.exited("c"), TIMEOUT_S)).code == 0


async def test_it_ends_with_its_pod(bench: Bench) -> None:
    pod = await made(bench)
    pod.prepare(bench.request("c", container(pod, "true")))
    child = await waiting(pod)
    await bench.engine.stop_pod(POD_ID)
    assert not Path(f"/proc/{child}").exists()


async def test_what_joins_others_is_not_made_ahead(bench: Bench) -> None:
    pod = await made(bench)
    await bench.start(pod, "a", container(pod, "sleep", "100"))
    running = children(pod)
    pod.prepare(bench.request("b", container(pod, "true", namespaces={"pid": None})))
    pod.prepare(bench.request("c", container(pod, "true"), pid_target="a"))
    await pod.containers()
    assert children(pod) == running


def descriptors(pod: Pod) -> dict[int, str]:
    directory = f"/proc/{pod.monitor_pid}/fd"
    return {int(name): os.readlink(f"{directory}/{name}") for name in os.listdir(directory)}


@contextmanager
def room_for(pod: Pod, count: int) -> Iterator[None]:
    """Its monitor can open so many descriptors more meanwhile."""
    used = descriptors(pod)
    limit = next(number for number in range(4096) if number - sum(fd < number for fd in used) == count)
    before = resource.prlimit(pod.monitor_pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pod.monitor_pid, resource.RLIMIT_NOFILE, (max(limit, max(used) + 1), before[1]))
    try:
        yield
    finally:
        resource.prlimit(pod.monitor_pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_monitor_out_of_descriptors_leaves_neither_a_child_nor_descriptors(bench: Bench, ahead: bool) -> None:
    pod = await made(bench)
    request = bench.request("c", container(pod, "true"))
    await pod.containers()  # it has closed what the pod's start gave to cribd
    before, refused = descriptors(pod), 0
    for count in range(2, 30):  # of which the plan takes one, and the log another
        with room_for(pod, count):
            if ahead:
                pod.prepare(request)
                assert await pod.containers() == []
                done = bool(children(pod))
            else:
                (outcome,) = await asyncio.gather(bench.begin(pod, request), return_exceptions=True)
                done = isinstance(outcome, Started)
                assert done or "too many open files" in str(outcome)
        if done:
            break
        await pod.forget("c")
        assert children(pod) == set()
        assert descriptors(pod) == before
        refused += 1
    assert refused > 3
    if ahead:
        await bench.begin(pod, request)
    assert (await asyncio.wait_for(bench.exited("c"), TIMEOUT_S)).code == 0

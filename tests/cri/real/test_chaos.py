"""Random calls, and cribd killed at random moments: what it answered stays true, and what it never answered for is
either there in full or not at all.

`CRIB_CHAOS` is the number of runs, each of a seed of its own (default 3), `CRIB_CHAOS_SEED` the first of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests import enclosure
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.limits import scaled
from tests.requires import requires

RUNS = int(os.environ.get("CRIB_CHAOS", "3"))
FIRST = int(os.environ.get("CRIB_CHAOS_SEED", "0"))
_ROUNDS = 4
_CALLERS = 5
_PODS = 4
_CONTAINERS = 2

pytestmark = [
    pytest.mark.asyncio,
    requires("root", "busybox", "bridge", "overlay"),
    pytest.mark.timeout(scaled(240)),
]


@dataclass
class Thing:
    """A pod or a container. `may` are the states it can be in; "" is not being listed.

    `ending`: it may have been sent a signal, and end whenever it likes.
    """

    name: str
    id: str = ""
    may: set[str] = field(default_factory=lambda: {""})
    ending: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class Told(Thing):
    """A pod, and what is known of its containers."""

    containers: dict[str, Thing] = field(default_factory=dict)
    network: bool = True


class Caller:
    """What a kubelet does, in no order: each call's effect is known from the answer, or open without one."""

    def __init__(self, real: Real, pods: list[Told], dice: random.Random) -> None:
        self._real, self._pods, self._dice = real, pods, dice

    async def once(self) -> None:
        pod = self._dice.choice(self._pods)
        async with pod.lock:
            await self._pod(pod)

    async def _pod(self, pod: Told) -> None:
        states, dice = pod.may, self._dice
        if states != {"ready"} or dice.random() < 0.15:
            if "" in states or ("ready" in states and dice.random() < 0.5):
                await self._run(pod)
            elif dice.random() < 0.3:
                await self._end(pod, "notready", "StopPodSandbox")
            else:
                await self._end(pod, "", "RemovePodSandbox")
            return
        name = f"c{dice.randrange(_CONTAINERS)}"
        await self._container(pod, pod.containers.setdefault(name, Thing(name)))

    async def _run(self, pod: Told) -> None:
        before = set(pod.may)
        pod.may |= {"ready"}
        config = self._real.pod_config(pod.name, network=pod.network)
        answer = await self._call("RunPodSandbox", config=config)
        if answer is not None:
            assert "ready" in before or "" in before, f"{pod} was made anew"
            if pod.id != answer.pod_sandbox_id:
                pod.containers.clear()
            pod.id, pod.may = answer.pod_sandbox_id, {"ready"}

    async def _container(self, pod: Told, one: Thing) -> None:
        dice = self._dice
        if one.may == {""} or not one.id:
            one.may |= {"created"}
            config = pb.ContainerConfig(
                metadata=pb.ContainerMetadata(name=one.name),
                image=pb.ImageSpec(image="localhost/crib/busybox:latest"),
                command=["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 1; done"],
                log_path=f"{pod.id}-{one.name}.log",
                linux=pb.LinuxContainerConfig(),
            )
            answer = await self._call("CreateContainer", pod_sandbox_id=pod.id, config=config)
            if answer is not None:
                one.id, one.may, one.ending = answer.container_id, {"created"}, False
            return
        choice = dice.random()
        if one.may <= {"created"}:
            await self._change(one, "running", "StartContainer", container_id=one.id)
        elif choice < 0.3:
            await self._call("ExecSync", container_id=one.id, cmd=["true"], timeout=5)
        elif choice < 0.4:
            resources = pb.LinuxContainerResources(cpu_shares=dice.choice([100, 200, 300]))
            await self._call("UpdateContainerResources", container_id=one.id, linux=resources)
        elif choice < 0.6:
            await self._change(one, "exited", "StopContainer", container_id=one.id, timeout=dice.choice([0, 0, 30]))
        elif choice < 0.8:
            await self._change(one, "", "RemoveContainer", container_id=one.id)
            if one.may == {""}:
                one.id = ""
        else:
            await self._call("ListContainers")
            await self._call("ListPodSandboxStats")

    async def _end(self, pod: Told, then: str, method: str) -> None:
        """Stop or remove a pod: none of its containers runs on once that is answered."""
        for one in pod.containers.values():
            one.ending = True
            one.may |= {"exited"} if then else {"exited", ""}
        await self._change(pod, then, method, pod_sandbox_id=pod.id)
        if "ready" not in pod.may:
            for one in pod.containers.values():
                one.may -= {"running"}

    async def _change(self, thing: Thing, then: str, method: str, **fields: Any) -> None:
        on_the_way = {"RemovePodSandbox": "notready", "RemoveContainer": "exited", "StartContainer": "exited"}
        thing.may = thing.may | {then, on_the_way.get(method, then)}
        thing.ending |= method in ("StopContainer", "RemoveContainer")
        stays = thing.may & {"created"} if method == "StopContainer" else set()  # one that never ran stays what it is
        answer = await self._call(method, **fields)
        if answer is None and method.startswith(("Stop", "Remove")):  # given up: it goes on, and can be joined
            answer = await self._call(method, None, **fields)
        if answer is not None:
            thing.may = {then} | stays

    async def _call(self, method: str, patience_s: float | None = -1, **fields: Any) -> Any:
        """The answer; None when there was none, for cribd was killed, the caller gave up, or the state was not so."""
        request = getattr(pb, f"{method}Request")(**fields)
        if patience_s == -1:
            patience_s = self._dice.choice([None, None, None, None, 0.001, self._dice.uniform(0.001, 0.05)])
        calling = getattr(self._real.client, method)(request, timeout=patience_s)
        code, text = (await calling.code()).name, await calling.details() or ""
        if code == "OK":
            return await calling
        expected = {"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "FAILED_PRECONDITION", "NOT_FOUND"}
        killed = method == "ExecSync" and "the process died before it could start" in text
        assert code in expected | {"ALREADY_EXISTS"} or killed, f"{method}: {code}: {text}"
        return None


async def _holds(real: Real, pods: list[Told]) -> None:
    """The lists say what the answers said, and the machine has what the lists say."""
    client = real.client
    shown = {one.id: one for one in (await client.ListPodSandbox(pb.ListPodSandboxRequest())).items}
    by_name = {one.metadata.name: one for one in shown.values()}
    assert len(by_name) == len(shown)
    containers = {one.id: one for one in (await client.ListContainers(pb.ListContainersRequest())).containers}
    for pod in pods:
        found = by_name.get(pod.name)
        state = pb.PodSandboxState.Name(found.state).removeprefix("SANDBOX_").lower() if found else ""
        assert state in pod.may, (pod, state)
        if found and found.id != pod.id:
            pod.id = found.id
            pod.containers.clear()
        pod.may = {state}
        mine = {one.metadata.name: one for one in containers.values() if found and one.pod_sandbox_id == found.id}
        for name, one in pod.containers.items():
            is_there = mine.pop(name, None) or pb.Container()
            now = pb.ContainerState.Name(is_there.state).removeprefix("CONTAINER_").lower() if is_there.id else ""
            if one.ending:
                one.may |= {"exited"}
            assert now in one.may, (pod, one, now)
            if now == "running" and not await _answers(real, is_there.id):
                now = "exited"
                assert now in one.may, (pod, one, now)
            one.id, one.may = is_there.id, {now}
        for name, other in mine.items():
            assert not pod.containers, (pod, other)
            pod.containers[name] = Thing(name, other.id, {"created", "running", "exited"})
    live = [pod for pod in pods if pod.may == {"ready"}]
    await until(lambda: len(os.listdir("/run/netns")) == sum(pod.network for pod in live))
    await until(lambda: len(_processes("crib-monitor")) == len(live))
    directories = set(os.listdir(real.daemon.state / "pods"))
    assert {pod.id for pod in live} <= directories <= shown.keys()
    assert set(os.listdir(real.daemon.root / "rootfs")) <= containers.keys()


async def _answers(real: Real, container: str) -> bool:
    """Whether it runs. What an earlier cribd killed may be ending just now: then it is told to have ended."""
    try:
        await real.sh(container, "true")
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
            raise
        await real.ended(container)
        return False
    return True


def _processes(name: str) -> list[int]:
    found = []
    for pid in enclosure.descendants():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if re.match(name, Path(f"/proc/{pid}/comm").read_text()):
                found.append(pid)
    return found


@pytest.mark.parametrize("seed", range(FIRST, FIRST + RUNS))
async def test_killed_at_any_moment(real: Real, seed: int) -> None:
    dice = random.Random(seed)
    pods = [Told(f"pod{number}", network=number % 4 != 3) for number in range(_PODS)]
    for _ in range(_ROUNDS):
        caller = Caller(real, pods, dice)

        async def call_on(caller: Caller = caller) -> None:
            while True:
                await caller.once()

        callers = [asyncio.create_task(call_on()) for _ in range(_CALLERS)]
        done, _ = await asyncio.wait(callers, timeout=dice.uniform(0.1, 1.5), return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            one.result()
        real.daemon.kill()
        for one in callers:
            one.cancel()
        await asyncio.wait(callers)
        for one in callers:
            if not one.cancelled():
                one.result()
        await real.client.close()
        real.daemon.start()
        real.client = real.daemon.client()
        await _holds(real, pods)

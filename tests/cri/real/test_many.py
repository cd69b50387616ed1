"""Many pods: at once, and none of them leaves anything."""

from __future__ import annotations

import asyncio
import os

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.limits import scaled
from tests.requires import requires

pytestmark = [
    pytest.mark.asyncio,
    requires("root", "busybox", "bridge", "overlay"),
    pytest.mark.timeout(scaled(240)),
]
PODS = 100


async def test_a_hundred_pods(real: Real) -> None:
    at_once = asyncio.Semaphore(8)

    async def one(number: int) -> str:
        async with at_once:
            config = real.pod_config(f"pod{number}")
            pod = await real.pod(config)
            container = await real.run(pod, "sleep", "1000", name=f"c{number}")
            assert (await real.sh(container, "hostname")).stdout.decode().strip() == f"pod{number}"
            return pod

    pods = await asyncio.gather(*(one(number) for number in range(PODS)))
    items = (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    assert {item.id for item in items} == set(pods)
    assert len((await real.client.ListContainers(pb.ListContainersRequest())).containers) == PODS
    addresses = set()
    for pod in pods:
        answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
        addresses.add(answer.status.network.ip)
    assert len(addresses) == PODS

    real.daemon.kill()
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    items = (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    assert sum(item.state == pb.SANDBOX_READY for item in items) == PODS

    async def gone(pod: str) -> None:
        async with at_once:
            await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
            await real.remove(pod)

    await asyncio.gather(*map(gone, pods))
    assert not os.listdir(real.daemon.root / "rootfs")
    assert not os.listdir(real.daemon.state / "pods")
    assert not os.listdir("/run/netns")


async def test_the_same_pod_from_many_callers(real: Real) -> None:
    pods = await asyncio.gather(*(real.pod() for _ in range(10)))
    assert len(set(pods)) == 1
    containers = await asyncio.gather(*(real.create(pods[0], "sleep", "1000") for _ in range(10)))
    assert len(set(containers)) == 1
    starts = await asyncio.gather(*(real.start(containers[0]) for _ in range(10)), return_exceptions=True)
    late = [answer for answer in starts if answer is not None]
    assert len(late) < len(starts)
    for answer in late:  # it came when the others' start was over
        assert isinstance(answer, grpc.aio.AioRpcError)
        assert answer.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "is running, not created" in str(answer.details())
    await asyncio.gather(*(real.remove(pods[0]) for _ in range(10)))
    assert not (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items

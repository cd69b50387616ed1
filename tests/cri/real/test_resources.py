"""Figures that the kernel counts, and limits changed while a container runs."""

from __future__ import annotations

import asyncio
import subprocess

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.requires import requires

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]
MIB = 1 << 20


async def stats_of(real: Real, container: str) -> pb.ContainerStats:
    answer = await real.client.ContainerStats(pb.ContainerStatsRequest(container_id=container))
    found: pb.ContainerStats = answer.stats
    return found


async def test_stats_follow_what_a_container_does(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000", labels={"who": "me"})
    before = await stats_of(real, container)
    assert before.attributes.id == container
    assert before.attributes.labels == {"who": "me"}
    await real.sh(container, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; head -c 8388608 /dev/zero > /file")
    after = await stats_of(real, container)
    assert after.cpu.timestamp > before.cpu.timestamp > 0
    assert after.memory.timestamp > 0
    used_ns = after.cpu.usage_core_nano_seconds.value - before.cpu.usage_core_nano_seconds.value
    assert used_ns > 10_000_000
    assert after.cpu.usage_nano_cores.value > 0
    assert after.memory.usage_bytes.value >= after.memory.working_set_bytes.value > 0
    assert after.writable_layer.used_bytes.value - before.writable_layer.used_bytes.value >= 8 * MIB
    assert after.writable_layer.inodes_used.value > before.writable_layer.inodes_used.value


async def test_lists_are_filtered_and_leave_out_what_does_not_run(real: Real) -> None:
    pod = await real.pod()
    one = await real.run(pod, "sleep", "1000", name="one", labels={"app": "a"})
    two = await real.run(pod, "sleep", "1000", name="two", labels={"app": "b"})
    await real.create(pod, "true", name="created")

    async def listed(**fields: object) -> set[str]:
        request = pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(**fields))  # type: ignore[arg-type]
        return {item.attributes.id for item in (await real.client.ListContainerStats(request)).stats}

    everything = await real.client.ListContainerStats(pb.ListContainerStatsRequest())
    assert {item.attributes.id for item in everything.stats} == {one, two}
    assert await listed(pod_sandbox_id=pod) == {one, two}
    assert await listed(id=one[:13]) == {one}
    assert await listed(label_selector={"app": "b"}) == {two}
    assert await listed(id=one, pod_sandbox_id="f" * 64) == set()


async def test_a_pod_has_the_sum_of_its_containers(real: Real) -> None:
    pod = await real.pod()
    for name in ("one", "two"):
        await real.run(pod, "sleep", "1000", name=name)
    answer = await real.client.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod))
    linux = answer.stats.linux
    assert answer.stats.attributes.metadata.name == "pod"
    assert len(linux.containers) == 2
    assert linux.process.process_count.value == 2
    parts = [item.cpu.usage_core_nano_seconds.value for item in linux.containers]
    assert linux.cpu.usage_core_nano_seconds.value == sum(parts) > 0
    listed = await real.client.ListPodSandboxStats(pb.ListPodSandboxStatsRequest())
    assert [item.attributes.id for item in listed.stats] == [pod]


async def test_a_pod_has_the_counters_of_its_interfaces(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    host = await real.pod(real.pod_config("host", network=False))
    await real.run(host, "sleep", "1000")

    async def network(of: str) -> pb.NetworkUsage:
        answer = await real.client.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=of))
        found: pb.NetworkUsage = answer.stats.linux.network
        return found

    before = await network(pod)
    assert before.timestamp > 0
    assert before.default_interface.name == "eth0"
    assert list(before.interfaces) == []
    done = await real.sh(container, "ping -c 3 -i 0.2 -s 1000 $(ip route | awk '/default/ {print $3}')")
    assert done.exit_code == 0, done
    after = await network(pod)
    for field in ("rx_bytes", "tx_bytes"):
        assert getattr(after.default_interface, field).value - getattr(before.default_interface, field).value >= 3000
    subprocess.run(["ip", "-n", f"crib-{pod[:32]}", "link", "add", "extra0", "type", "bridge"], check=True)
    assert [one.name for one in (await network(pod)).interfaces] == ["extra0"]
    assert not (await network(host)).HasField("default_interface"), "those are not the pod's"


async def test_an_update_is_in_force_and_in_status(real: Real) -> None:
    pod = await real.pod()
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB, cpu_shares=512)
    container = await real.run(pod, "sleep", "1000", linux=pb.LinuxContainerConfig(resources=limits))
    wanted = pb.LinuxContainerResources(memory_limit_in_bytes=32 * MIB, cpu_quota=90_000, cpu_period=100_000)
    request = pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
    await real.client.UpdateContainerResources(request)
    shown = (await real.status(container)).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_quota, shown.cpu_shares) == (32 * MIB, 90_000, 512)
    stats = await stats_of(real, container)
    assert 0 < stats.memory.available_bytes.value < 32 * MIB
    answer = await real.sh(container, "head -c 41943040 /dev/zero | tail -c 40000000 | wc -c")
    assert answer.exit_code == 137 or b"40000000" not in answer.stdout


async def test_an_update_that_cannot_be_changes_nothing(real: Real) -> None:
    pod = await real.pod()
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    container = await real.run(pod, "sleep", "1000", linux=pb.LinuxContainerConfig(resources=limits))
    for wanted in (
        pb.LinuxContainerResources(memory_limit_in_bytes=128 * MIB, cpuset_cpus="4000"),
        pb.LinuxContainerResources(cpu_quota=5),
        pb.LinuxContainerResources(memory_limit_in_bytes=1),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await real.client.UpdateContainerResources(
                pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
            )
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    shown = (await real.status(container)).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_quota, shown.cpuset_cpus) == (64 * MIB, 0, "")


async def test_updates_and_stops_race(real: Real) -> None:
    """Whoever wins, an update is in force and shown, or refused."""
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")

    async def change(shares: int) -> grpc.StatusCode:
        wanted = pb.LinuxContainerResources(cpu_shares=shares)
        request = pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
        try:
            await real.client.UpdateContainerResources(request)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    stop = real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
    codes = await asyncio.gather(*(change(100 + n) for n in range(20)), stop, *(change(200 + n) for n in range(20)))
    del codes[20]  # the stop's answer
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND}
    assert (await real.status(container)).state == pb.CONTAINER_EXITED


async def test_pod_resources_are_noted(real: Real) -> None:
    pod = await real.pod()
    wanted = pb.LinuxContainerResources(cpu_shares=512, memory_limit_in_bytes=64 * MIB)
    await real.client.UpdatePodSandboxResources(
        pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, resources=wanted)
    )
    status = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    assert '"cpu_shares": "512"' in status.info["info"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.client.UpdatePodSandboxResources(pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id="f" * 64))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND

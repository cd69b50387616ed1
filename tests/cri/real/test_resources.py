"""Figures that the kernel counts, and limits changed while a container runs."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from runtime.cgroup.weights import cpu_weight
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.requires import requires

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]
MIB = 1 << 20
INVALID = grpc.StatusCode.INVALID_ARGUMENT
UPDATES = int(os.environ.get("CRIB_UPDATES", "1000"))
OOM_KILLS = int(os.environ.get("CRIB_OOM_KILLS", "20"))
V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()


def limits(**fields: object) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]


def cgroup_path(pid: int) -> str:
    """Where a process is, below every hierarchy."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return next(path for _, controllers, path in lines if controllers == ("" if V2 else "memory"))


def held(path: str, v1: str, v2: str) -> str:
    """What the kernel holds: v1's file ("memory.limit_in_bytes") or v2's."""
    base = "/sys/fs/cgroup" if V2 else f"/sys/fs/cgroup/{v1.partition('.')[0]}"
    return Path(f"{base}{path}/{v2 if V2 else v1}").read_text().strip()


def in_force(path: str) -> tuple[int, int, int, str]:
    """Memory limit, CPU quota and period, weight, by the kernel's files."""
    if V2:
        quota, period = held(path, "", "cpu.max").split()
    else:
        quota, period = held(path, "cpu.cfs_quota_us", ""), held(path, "cpu.cfs_period_us", "")
    quota = "-1" if quota == "max" else quota
    memory = held(path, "memory.limit_in_bytes", "memory.max")
    return int(memory), int(quota), int(period), held(path, "cpu.shares", "cpu.weight")


def shown(status: pb.ContainerStatus) -> tuple[int, int, int, str]:
    """The same, by ContainerStatus."""
    linux = status.resources.linux
    weight = str(cpu_weight(linux.cpu_shares) if V2 else linux.cpu_shares)
    return linux.memory_limit_in_bytes, linux.cpu_quota, linux.cpu_period, weight


async def update(real: Real, container: str, wanted: pb.LinuxContainerResources) -> grpc.StatusCode:
    request = pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
    try:
        await real.client.UpdateContainerResources(request)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


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
    container = await real.run(pod, "sleep", "1000", linux=limits(memory_limit_in_bytes=64 * MIB, cpu_shares=512))
    wanted = pb.LinuxContainerResources(memory_limit_in_bytes=32 * MIB, cpu_quota=90_000, cpu_period=100_000)
    request = pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
    await real.client.UpdateContainerResources(request)
    now = (await real.status(container)).resources.linux
    assert (now.memory_limit_in_bytes, now.cpu_quota, now.cpu_shares) == (32 * MIB, 90_000, 512)
    stats = await stats_of(real, container)
    assert 0 < stats.memory.available_bytes.value < 32 * MIB
    answer = await real.sh(container, "head -c 41943040 /dev/zero | tail -c 40000000 | wc -c")
    assert answer.exit_code == 137 or b"40000000" not in answer.stdout


async def test_what_an_update_leaves_is_shown_as_it_is(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    start = limits(memory_limit_in_bytes=64 * MIB, memory_swap_limit_in_bytes=128 * MIB, oom_score_adj=300)
    container = await real.run(pod, "sleep", "1000", linux=start)
    path = cgroup_path(await real.pid(container))
    wanted = pb.LinuxContainerResources(memory_limit_in_bytes=96 * MIB, oom_score_adj=500)
    assert await update(real, container, wanted) == grpc.StatusCode.OK
    now = (await real.status(container)).resources.linux
    together = held(path, "memory.memsw.limit_in_bytes", "memory.swap.max")
    assert int(together) == (now.memory_swap_limit_in_bytes - now.memory_limit_in_bytes if V2 else 128 * MIB)
    assert (now.memory_limit_in_bytes, now.memory_swap_limit_in_bytes) == (96 * MIB, 128 * MIB)
    assert str(now.oom_score_adj) == Path(f"/proc/{await real.pid(container)}/oom_score_adj").read_text().strip()
    assert await update(real, container, pb.LinuxContainerResources(memory_limit_in_bytes=200 * MIB)) == INVALID
    assert (await real.status(container)).resources.linux == now


async def test_an_update_that_cannot_be_changes_nothing(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000", linux=limits(memory_limit_in_bytes=64 * MIB))
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
    now = (await real.status(container)).resources.linux
    assert (now.memory_limit_in_bytes, now.cpu_quota, now.cpuset_cpus) == (64 * MIB, 0, "")


async def test_updates_and_stops_race(real: Real) -> None:
    """Whoever wins, an update is in force and shown, or refused, and the last one of a container that lives is both."""
    pods = [await real.pod(real.pod_config(f"pod{n}", network=False)) for n in range(2)]
    start = limits(memory_limit_in_bytes=64 * MIB, cpu_quota=50_000, cpu_period=100_000, cpu_shares=512)
    alive = [await real.run(pod, "sleep", "1000", name=f"c{n}", linux=start) for pod in pods for n in range(3)]
    stopped = [await real.run(pod, "sleep", "1000", name=f"s{n}", linux=start) for pod in pods for n in range(3)]
    taken = {container: {(64 * MIB, 50_000, 512)} for container in (*alive, *stopped)}
    chance = random.Random(UPDATES)

    async def change(number: int) -> grpc.StatusCode:
        container = chance.choice((*alive, *stopped))
        wanted = pb.LinuxContainerResources(
            memory_limit_in_bytes=(32 + number) * MIB, cpu_quota=20_000 + number, cpu_shares=100 + number
        )
        if number % 10 == 0:
            wanted.cpuset_cpus = "4000"
        code = await update(real, container, wanted)
        if code == grpc.StatusCode.OK:
            taken[container].add((wanted.memory_limit_in_bytes, wanted.cpu_quota, wanted.cpu_shares))
        return code

    async def stop(container: str) -> None:
        await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))

    calls: list[object] = [change(number) for number in range(UPDATES)]
    for container in stopped:
        calls.insert(chance.randrange(len(calls)), stop(container))
    codes = set(await asyncio.gather(*calls)) - {None}  # type: ignore[call-overload]
    assert grpc.StatusCode.OK in codes
    # NOT_FOUND: it has ended, and its cgroup gone, while the update was made.
    refusals = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND}
    assert codes <= {grpc.StatusCode.OK, *refusals}
    for container in alive:
        status = await real.status(container)
        assert status.state == pb.CONTAINER_RUNNING
        assert shown(status) == in_force(cgroup_path(await real.pid(container)))
    for container in (*alive, *stopped):
        linux = (await real.status(container)).resources.linux
        assert (linux.memory_limit_in_bytes, linux.cpu_quota, linux.cpu_shares) in taken[container]
        assert linux.cpuset_cpus == ""
    for container in stopped:
        assert (await real.status(container)).state == pb.CONTAINER_EXITED


async def test_updates_that_nobody_waits_for(real: Real) -> None:
    """Callers give up, and cribd is killed in the middle: what is told is in force all the same."""
    pod = await real.pod(real.pod_config(network=False))
    start = limits(memory_limit_in_bytes=64 * MIB, cpu_quota=50_000, cpu_period=100_000, cpu_shares=512)
    containers = [await real.run(pod, "sleep", "1000", name=f"c{n}", linux=start) for n in range(4)]
    bystander = await real.run(pod, "sleep", "1000", name="bystander", linux=start)
    paths = {container: cgroup_path(await real.pid(container)) for container in containers}
    chance = random.Random(1)

    async def change(number: int, patience_s: float) -> None:
        container = containers[number % 4]
        wanted = pb.LinuxContainerResources(
            memory_limit_in_bytes=(32 + number) * MIB, cpu_quota=20_000 + number, cpu_shares=100 + number
        )
        try:
            async with asyncio.timeout(patience_s):
                await update(real, container, wanted)
        except TimeoutError:
            pass

    await asyncio.gather(*(change(number, chance.random() / 5) for number in range(200)))
    # Changes of a pod take turns: when the bystander's is made, those that were given up on are.
    assert await update(real, bystander, pb.LinuxContainerResources(cpu_shares=100)) == grpc.StatusCode.OK
    for container in containers:
        assert shown(await real.status(container)) == in_force(paths[container])
    for turn in range(6):
        calls = [asyncio.create_task(change(number, 10)) for number in range(200 * turn, 200 * turn + 200)]
        await asyncio.sleep(chance.random() / 5)
        real.daemon.kill()
        await asyncio.gather(*calls)
        real.daemon.start()
        for container in containers:
            assert shown(await real.status(container)) == in_force(paths[container])


async def test_every_oom_kill_is_reported(real: Real) -> None:
    """Ten at a time, each in a cgroup that is gone as soon as its figures are read."""
    pod = await real.pod(real.pod_config(network=False))

    async def overeat(number: int) -> tuple[int, str]:
        linux = limits(memory_limit_in_bytes=16 * MIB)
        container = await real.run(pod, "tail", "/dev/zero", name=f"hog{number}", linux=linux)
        found = await real.ended(container)
        await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
        return found.exit_code, found.reason

    ends: list[tuple[int, str]] = []
    for first in range(0, OOM_KILLS, 10):
        ends += await asyncio.gather(*(overeat(n) for n in range(first, min(first + 10, OOM_KILLS))))
    assert ends == [(137, "OOMKilled")] * OOM_KILLS


BAD: list[tuple[str, dict[str, object]]] = [
    ("cpu_shares", {"cpu_shares": -1}),
    ("cpu_shares", {"cpu_shares": 1 << 40}),
    ("cpu_quota", {"cpu_quota": 5}),
    ("cpu_quota", {"cpu_quota": -7}),
    ("cpu.quota", {"cpu_quota": (1 << 63) - 1, "cpu_period": 100_000}),
    ("cpu_period", {"cpu_period": 10}),
    ("cpu_period", {"cpu_period": 1 << 40}),
    ("cpus 4000", {"cpuset_cpus": "4000"}),
    ("cpus 0-4000", {"cpuset_cpus": "0-4000"}),
    ("cpuset_cpus", {"cpuset_cpus": "zero"}),
    ("cpuset_cpus", {"cpuset_cpus": "0\n1"}),
    ("mems 63", {"cpuset_mems": "63"}),
    ("memory_limit_in_bytes", {"memory_limit_in_bytes": -7}),
    ("memory", {"memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": MIB}),
    ("3MB", {"hugepage_limits": [pb.HugepageLimit(page_size="3MB", limit=1 << 30)]}),
    ("2MB/../", {"hugepage_limits": [pb.HugepageLimit(page_size="2MB/../x", limit=0)]}),
    ("hugepage", {"hugepage_limits": [pb.HugepageLimit(page_size="2MB", limit=(1 << 64) - 1)]}),
    ("unified", {"unified": {"memory/max": "1"}}),
    ("unified", {"unified": {"../memory.max": "1"}}),
    ("unified", {"unified": {"memory.nonsense": "1"}}),
    ("unified", {"unified": {"cgroup.procs": "1"}}),
    ("unified", {"unified": {"memory.high": "many"}}),
    ("unified", {"unified": {"cpu.max": "5"}}),
]


async def test_bad_limits_are_named_and_change_nothing(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    start = limits(memory_limit_in_bytes=64 * MIB, cpu_quota=50_000, cpu_period=100_000, cpu_shares=512)
    container = await real.run(pod, "sleep", "1000", linux=start)
    path = cgroup_path(await real.pid(container))
    before = in_force(path)
    neighbours = set(Path(f"/sys/fs/cgroup{'' if V2 else '/memory'}{path}").parent.iterdir())
    for named, fields in BAD:
        wanted = pb.LinuxContainerResources(**({"cpu_shares": 700, "cpu_quota": 60_000} | fields))  # type: ignore[arg-type]
        request = pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await real.client.UpdateContainerResources(request)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (fields, caught.value.details())
        assert named in (caught.value.details() or ""), (fields, caught.value.details())
        assert in_force(path) == before == shown(await real.status(container)), fields
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await real.create(pod, "true", name="bad", linux=pb.LinuxContainerConfig(resources=wanted))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (fields, caught.value.details())
        assert named in (caught.value.details() or ""), (fields, caught.value.details())
    await until(lambda: set(Path(f"/sys/fs/cgroup{'' if V2 else '/memory'}{path}").parent.iterdir()) == neighbours)


@pytest.mark.parametrize("limit", [1, 4096, 65536])
async def test_memory_that_nothing_can_start_in(real: Real, limit: int) -> None:
    """A user's "100m" of memory is a tenth of a byte."""
    pod = await real.pod(real.pod_config(network=False))
    container = await real.create(pod, "sleep", "1000", linux=limits(memory_limit_in_bytes=limit))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.start(container)
    assert re.search(r"memory.* limit .*too low", caught.value.details() or "")
    found = await real.status(container)
    assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 128, "StartError")


async def test_the_figures_are_the_kernels(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    container = await real.run(pod, "sleep", "1000", linux=limits(memory_limit_in_bytes=64 * MIB))
    await real.sh(container, "head -c 4194304 /dev/zero > /dev/null")
    path = cgroup_path(await real.pid(container))

    def figures() -> tuple[int, int, int]:
        if V2:
            cpu = int(dict(line.split() for line in held(path, "", "cpu.stat").splitlines())["usage_usec"]) * 1000
        else:
            cpu = int(held(path, "cpuacct.usage", ""))
        stat = dict(line.split() for line in held(path, "memory.stat", "memory.stat").splitlines())
        anonymous = int(stat["anon" if V2 else "total_rss"])
        faults = int(stat["pgfault" if V2 else "total_pgfault"])
        return cpu, anonymous, faults

    before = figures()
    stats = await stats_of(real, container)
    after = figures()
    told = (stats.cpu.usage_core_nano_seconds.value, stats.memory.rss_bytes.value, stats.memory.page_faults.value)
    assert all(low <= figure <= high for low, figure, high in zip(before, told, after, strict=True)), (
        before,
        told,
        after,
    )
    inactive = "inactive_file" if V2 else "total_inactive_file"
    stat = dict(line.split() for line in held(path, "memory.stat", "memory.stat").splitlines())
    assert stats.memory.working_set_bytes.value == stats.memory.usage_bytes.value - int(stat[inactive])
    assert stats.memory.available_bytes.value == 64 * MIB - stats.memory.working_set_bytes.value

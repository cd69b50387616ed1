"""What CreateContainer begins for the start to come: what becomes of it where that comes late, fails or never comes."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import RUNTIME
from tests.cri.real.test_resources import cgroup_path, held
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "overlay")]


def logs_open(real: Real) -> list[str]:
    """The logs that cribd has open."""
    assert real.daemon.process is not None
    directory = f"/proc/{real.daemon.process.pid}/fd"
    links = []
    for name in os.listdir(directory):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"{directory}/{name}"))
    return [link for link in links if link.startswith(str(real.logs))]


async def monitor(real: Real, name: str = "pod") -> tuple[str, int]:
    """A pod, and its monitor's pid."""
    pod = await real.pod(real.pod_config(name, network=False))
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    return pod, int(json.loads((await real.client.PodSandboxStatus(request)).info["info"])["pid"])


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def test_a_start_that_never_comes_is_prepared_for_a_while(real: Real) -> None:
    pod, parent = await monitor(real)
    container = await real.create(pod, "sh", "-c", "echo out; exit 3")
    await until(lambda: logs_open(real) and (RUNTIME or children(parent)))
    await until(lambda: not logs_open(real) and not children(parent))
    log = real.logs / "c.log"
    log.rename(real.logs / "before")
    await real.start(container)
    assert (await real.ended(container)).exit_code == 3
    assert "out" in log.read_text()
    assert (real.logs / "before").read_text() == ""


async def test_who_joins_a_create_prepares_nothing_more(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    containers = await asyncio.gather(*(real.create(pod, "sleep", "1000") for _ in range(4)))
    assert len(set(containers)) == 1
    await until(lambda: logs_open(real))
    await real.start(containers[0])
    await until(lambda: not logs_open(real))


async def test_no_more_than_a_few_of_a_node_are_prepared(real: Real) -> None:
    pods = [await monitor(real, "a"), await monitor(real, "b")]
    made = []
    for number in range(40):
        pod, _ = pods[number % 2]
        made.append(await real.create(pod, "sh", "-c", f"exit {number}", name=f"c{number}"))
        assert len(logs_open(real)) <= 16
        assert sum(len(children(parent)) for _, parent in pods) <= 16
    for number, container in enumerate(made):
        await real.start(container)
        assert (await real.ended(container)).exit_code == number
    assert not logs_open(real)


async def test_a_start_without_its_log_leaves_no_process(real: Real) -> None:
    pod, parent = await monitor(real)
    real.logs.mkdir(exist_ok=True)
    (real.logs / "c.log").symlink_to("/dev/null")
    container = await real.create(pod, "sleep", "1000")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.start(container)
    assert f"log {real.logs}/c.log" in (caught.value.details() or "")
    assert (await real.status(container)).reason == "StartError"
    await until(lambda: not children(parent))


async def test_limits_that_change_before_the_start_are_its(real: Real) -> None:
    linux = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20))
    pod = await real.pod(real.pod_config(network=False))
    container = await real.create(pod, "sleep", "1000", linux=linux)
    await real.client.UpdateContainerResources(
        pb.UpdateContainerResourcesRequest(
            container_id=container, linux=pb.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
        )
    )
    await real.start(container)
    assert (await real.status(container)).resources.linux.memory_limit_in_bytes == 96 << 20
    path = cgroup_path(await real.pid(container))
    assert held(path, "memory.limit_in_bytes", "memory.max") == str(96 << 20)


@pytest.mark.parametrize("removed", ["container", "pod"])
async def test_what_was_prepared_goes_with_its_container(real: Real, removed: str) -> None:
    pod, parent = await monitor(real)
    container = await real.create(pod, "sleep", "1000")
    await until(lambda: logs_open(real) and (RUNTIME or children(parent)))
    before = children(parent)
    if removed == "container":
        await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
        await until(lambda: not children(parent))
    else:
        await real.remove(pod)
        assert not [pid for pid in before if Path(f"/proc/{pid}").exists()]
    await until(lambda: not logs_open(real))


async def test_a_stopped_pod_keeps_no_log_open(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    await real.create(pod, "sleep", "1000")
    await until(lambda: logs_open(real))
    await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    await until(lambda: not logs_open(real))


@pytest.mark.skipif(bool(RUNTIME), reason="nothing is made ahead with a runtime of the host's")
@requires("cgroup2")
async def test_one_in_a_frozen_cgroup_can_be_removed(real: Real) -> None:
    pod, parent = await monitor(real)
    container = await real.create(pod, "sleep", "1000")
    await until(lambda: children(parent))
    (child,) = children(parent)
    cgroup = Path(f"/sys/fs/cgroup{cgroup_path(int(child))}")
    assert cgroup.name == container
    (cgroup / "cgroup.freeze").write_text("1")
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    assert not cgroup.exists()
    assert not Path(f"/proc/{child}").exists()

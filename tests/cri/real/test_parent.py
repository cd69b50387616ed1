"""A pod's cgroup is the kubelet's, and others meddle with a container's: what crib makes of it."""

from __future__ import annotations

import asyncio
import os
import random
import re
import secrets
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from runtime.cgroup import detect
from runtime.cgroup.dbus import PRIVATE_SOCKET, SYSTEM_SOCKET
from runtime.errors import NotFound, WrongState
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import RUNTIME
from tests.cri.real.test_prepared import children, monitor
from tests.cri.real.test_resources import MIB, V2, cgroup_path, held, limits, update
from tests.limits import scaled
from tests.requires import requires

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]
TURNS = int(os.environ.get("CRIB_MEDDLING", "40"))


async def test_a_parent_of_the_other_driver_is_refused(real: Real) -> None:
    runtime = (await real.client.RuntimeConfig(pb.RuntimeConfigRequest())).linux
    parents = ["/kubepods/pod1"] if runtime.cgroup_driver == pb.SYSTEMD else ["kubepods-pod1.slice", "/a/b.slice"]
    for parent in parents:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await real.pod(real.pod_config(linux=pb.LinuxPodSandboxConfig(cgroup_parent=parent)))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "slice" in (caught.value.details() or "")
        assert parent in (caught.value.details() or "")


@requires("systemd")
async def test_without_systemd_for_a_while(real: Real, run_dir: Path) -> None:
    """A pod in a slice that isn't there yet is refused and leaves nothing; what runs can be changed and ended."""
    pod = await real.pod(real.pod_config("there", network=False))
    container = await real.run(pod, "sleep", "1000", linux=limits(memory_limit_in_bytes=64 * MIB))
    name = f"cribtest{secrets.token_hex(4)}"
    config = real.pod_config("new", network=False, linux=pb.LinuxPodSandboxConfig(cgroup_parent=f"{name}-pod.slice"))
    with socket.socket(socket.AF_UNIX) as deaf, ExitStack() as hidden:
        deaf.bind(str(run_dir / "deaf"))
        for path in (PRIVATE_SOCKET, SYSTEM_SOCKET):
            subprocess.run(["mount", "--bind", run_dir / "deaf", path], check=True)
            hidden.callback(subprocess.run, ["umount", path], check=True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await real.create(await real.pod(config), "true")
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "systemd can't be reached" in (caught.value.details() or "")
        assert not Path(f"/sys/fs/cgroup/{name}.slice").exists()
        wanted = pb.LinuxContainerResources(memory_limit_in_bytes=32 * MIB)
        assert await update(real, container, wanted) == grpc.StatusCode.OK
        assert (await real.sh(container, "cat /sys/fs/cgroup/memory.max")).stdout == b"%d\n" % (32 * MIB)
        await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
    config.metadata.attempt = 1
    again = await real.pod(config)
    assert (await real.sh(await real.run(again, "sleep", "1000"), "echo fine")).stdout == b"fine\n"
    await real.remove(again)
    subprocess.run(["systemctl", "stop", f"{name}.slice"], check=True, timeout=scaled(60))


async def test_one_that_somebody_froze_can_be_changed_and_ended(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    container = await real.run(pod, "sleep", "1000", linux=limits(memory_limit_in_bytes=64 * MIB))
    path = cgroup_path(await real.pid(container))
    cgroups = detect()
    cgroups.freeze(path)
    assert await update(real, container, pb.LinuxContainerResources(cpu_shares=700)) == grpc.StatusCode.OK
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.sh(container, "true", limit_s=1)
    refused = RUNTIME and "paused" in (caught.value.details() or "")
    assert refused or caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "killing a command failed" not in real.daemon.log(), "on v1 what is killed stays frozen"
    assert await real.pid(container) in cgroups.procs(path), "nobody thawed the rest"
    assert len(cgroups.procs(path)) == 1
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=1))
    assert (await real.status(container)).exit_code == 137
    await until(lambda: not cgroups.exists(path))


async def test_the_pods_cgroup_is_the_kubelets(real: Real) -> None:
    """It limits it, changes that, kills into it and removes it, and asks nobody."""
    cgroups = detect()
    name = f"cribtest{secrets.token_hex(4)}"
    parent = f"{name}-pod.slice" if cgroups.driver == "systemd" else f"/{name}/pod"
    top = cgroups.join_path(f"{name}.slice" if cgroups.driver == "systemd" else f"/{name}")
    path = cgroups.join_path(parent)
    cgroups.create(path, None)
    config = real.pod_config(network=False)
    config.linux.cgroup_parent = parent
    pod = await real.pod(config)
    try:
        roomy = limits(memory_limit_in_bytes=256 * MIB)
        containers = [await real.run(pod, "sleep", "1000", name=f"c{n}", linux=roomy) for n in range(2)]
        assert cgroup_path(await real.pid(containers[0])) == f"{path}/{containers[0]}"
        file = "memory.max" if V2 else "memory.limit_in_bytes"
        Path(f"/sys/fs/cgroup{'' if V2 else '/memory'}{path}/{file}").write_text(str(24 * MIB))
        hog = await real.run(pod, "tail", "/dev/zero", name="hog", linux=roomy)
        found = await real.ended(hog)
        assert (found.exit_code, found.reason) == (137, "OOMKilled")
        Path(f"/sys/fs/cgroup{'' if V2 else '/memory'}{path}/{file}").write_text(str(128 * MIB))
        assert await update(real, containers[0], roomy.resources) == grpc.StatusCode.OK
        cgroups.kill(path)
        for container in containers:
            assert (await real.ended(container)).exit_code == 137
        await until(lambda: cgroups.remove(path))
        again = await real.run(pod, "sleep", "1000", name="again", linux=roomy)  # where the kubelet was too early
        assert cgroup_path(await real.pid(again)) == f"{path}/{again}"
    finally:
        await real.remove(pod)
        await until(lambda: cgroups.remove(top))


async def test_a_kubelet_that_asks_nobody(real: Real) -> None:
    """It limits, kills into and removes the pod's cgroup while containers are made, started and ended in it.

    A container runs or is refused with a reason that names its cgroup, and nothing is left.
    """
    cgroups = detect()
    name = f"cribtest{secrets.token_hex(4)}"
    parent = f"{name}-pod.slice" if cgroups.driver == "systemd" else f"/{name}/pod"
    top = cgroups.join_path(f"{name}.slice" if cgroups.driver == "systemd" else f"/{name}")
    path = cgroups.join_path(parent)
    config = real.pod_config(network=False)
    config.linux.cgroup_parent = parent
    pod = await real.pod(config)
    chance = random.Random(TURNS)
    file = Path(f"/sys/fs/cgroup{'' if V2 else '/memory'}{path}", "memory.max" if V2 else "memory.limit_in_bytes")
    over = asyncio.Event()

    def meddle() -> None:
        action = chance.choice((cgroups.kill, cgroups.remove, lambda path: cgroups.create(path, None), None))
        try:
            if action:
                action(path)
            else:
                file.write_text(str(chance.choice((64, 128, 512)) * MIB))
        except (OSError, NotFound, WrongState):  # it is gone, or made just now, or in use
            pass

    async def kubelet() -> None:
        while not over.is_set():
            await asyncio.to_thread(meddle)
            await asyncio.sleep(chance.random() / 50)

    async def client(number: int) -> None:
        for turn in range(TURNS // 4):
            reasons: list[grpc.aio.AioRpcError] = []
            container = ""
            try:
                container = await real.create(pod, "sleep", "1000", name=f"c{number}-{turn}")
                await real.start(container)
            except grpc.aio.AioRpcError as error:
                reasons.append(error)
            for reason in reasons:  # another runtime doesn't say what its process died of
                told = "cgroup|slice|killed|died before it could start" + ("|runtime handler" if RUNTIME else "")
                assert re.search(told, reason.details() or ""), reason
            if container:
                await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
                found = await real.status(container)
                assert found.state == pb.CONTAINER_EXITED
                assert not reasons or found.reason in ("StartError", "Error")
                await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))

    meddling = asyncio.create_task(kubelet())
    try:
        await asyncio.gather(*(client(number) for number in range(4)))
        over.set()
        await meddling
        container = await real.run(pod, "sleep", "1000", name="at-last")
        assert (await real.sh(container, "echo fine")).stdout == b"fine\n"
    finally:
        over.set()
        await meddling
        await real.remove(pod)
        await until(lambda: cgroups.remove(top))


async def test_a_cgroup_that_is_removed_before_the_start(real: Real) -> None:
    cgroups = detect()
    pod, parent = await monitor(real)
    first = await real.run(pod, "sleep", "1000", name="first")
    container = await real.create(pod, "sleep", "1000")
    path = cgroup_path(await real.pid(first)).replace(first, container)

    def removed() -> bool:
        cgroups.kill(path)  # on v2 its process may be waiting there
        return cgroups.remove(path)

    await until(removed)
    await until(lambda: not V2 or len(children(parent)) == 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.client.UpdateContainerResources(
            pb.UpdateContainerResourcesRequest(container_id=container, linux=pb.LinuxContainerResources(cpu_shares=7))
        )
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.start(container)
    assert "cgroup" in (caught.value.details() or "")
    found = await real.status(container)
    assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert (await real.sh(first, "echo fine")).stdout == b"fine\n"


async def test_a_pod_that_is_full_of_processes(real: Real) -> None:
    """One more container or command is refused with the reason; what runs, runs on, and can be ended."""
    cgroups = detect()
    pod = await real.pod(real.pod_config(network=False))
    first = await real.run(pod, "sleep", "1000", name="first")
    path = cgroup_path(await real.pid(first))
    limit = Path(f"/sys/fs/cgroup{'' if V2 else '/pids'}{path}").parent / "pids.max"
    limit.write_text(held(path, "pids.current", "pids.current"))
    second = await real.create(pod, "sleep", "1000", name="second")
    if V2:  # on v1 a process may enter, and only not fork
        for call in (real.sh(first, "echo full"), real.start(second)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert "resource temporarily unavailable" in (caught.value.details() or "").lower()
    else:
        assert (await real.sh(first, "true & wait")).stderr == b"sh: can't fork: Resource temporarily unavailable\n"
    limit.write_text("max")
    assert (await real.sh(first, "echo fine")).stdout == b"fine\n"
    limit.write_text("1")
    await real.client.StopContainer(pb.StopContainerRequest(container_id=first, timeout=0))
    await until(lambda: not cgroups.exists(path))


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

"""Pods and containers end to end: cribd's socket, a real kernel, a busybox image."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import cri_pb2 as pb
from cri.api import crib_pb2
from cri.container.exec import KEPT_BYTES
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.requires import need, requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]


async def refused(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


def logged(real: Real, name: str = "c") -> list[str]:
    return (real.logs / f"{name}.log").read_text().splitlines()


async def test_a_pod_with_a_network(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sh", "-c", "echo out; echo err >&2; exec sleep 1000")
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
    ip = answer.status.network.ip
    said = await real.sh(container, "hostname; hostname -i; cat /etc/hosts; ip -o -4 addr show eth0; cat /etc/hostname")
    assert said.exit_code == 0
    out = said.stdout.decode()
    assert out.splitlines()[0] == "pod"
    assert out.count(ip) >= 2
    found = await real.status(container)
    assert found.state == pb.CONTAINER_RUNNING
    assert found.started_at >= found.created_at > 1e18
    assert found.image_id.startswith("sha256:")
    assert found.image.image == "localhost/crib/busybox:latest"
    assert found.user.linux.uid == 0
    await until(lambda: len(logged(real)) == 2)
    lines = logged(real)
    assert {line.split(" ", 1)[1] for line in lines} == {"stdout F out", "stderr F err"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z .*", lines[0])
    # from the host to the pod, and between two pods
    other = await real.pod(real.pod_config("other"))
    server = await real.run(other, "sh", "-c", "echo hello | nc -l -p 7000", name="server")
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=other))
    said = await real.sh(container, f"until nc {answer.status.network.ip} 7000 </dev/null; do :; done")
    assert said.stdout == b"hello\n"
    assert (await real.ended(server)).reason == "Completed"


async def test_the_host_network(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert answer.status.network.ip == ""
    container = await real.run(pod, "sleep", "1000")
    said = await real.sh(container, "readlink /proc/self/ns/net; readlink /proc/self/ns/uts; hostname")
    expected = [os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/uts"), os.uname().nodename]
    assert said.stdout.decode().splitlines() == expected


SYSCTLS = ("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range", "kernel.shmmni")


@pytest.mark.parametrize("kind", ["own", "mapped", "host"])
async def test_kernel_parameters(real: Real, kind: str) -> None:
    """The defaults are a network namespace's that nobody else has: neither the host's nor a user namespace's."""
    files = [Path("/proc/sys", *name.split(".")) for name in SYSCTLS]
    before = [path.read_text().split() for path in files]
    if kind == "mapped":
        need("userns")
    config = real.pod_config(network=kind != "host", mapped=kind == "mapped")
    config.linux.sysctls["kernel.shmmni"] = "777"
    linux = pb.LinuxContainerConfig()
    linux.security_context.namespace_options.CopyFrom(config.linux.security_context.namespace_options)
    container = await real.run(await real.pod(config), "sleep", "1000", linux=linux)
    lines = (await real.sh(container, f"cat {' '.join(map(str, files))}")).stdout.decode().splitlines()
    port, ping, shm = (line.split() for line in lines)
    assert shm == ["777"]
    if kind == "own":
        assert (port, ping) == (["0"], ["0", "2147483647"])
    elif kind == "host":
        assert [port, ping] == before[:2]
    else:
        assert port == ["1024"]
        assert ping != ["0", "2147483647"]
    assert [path.read_text().split() for path in files] == before


@pytest.mark.parametrize("mapped", [False, True])
async def test_kernel_parameters_of_the_pods_interface(real: Real, mapped: bool) -> None:
    """Which is there only when the pod has its address."""
    if mapped:
        need("userns")
    config = real.pod_config(mapped=mapped)
    config.linux.sysctls["net.ipv4.conf.eth0.arp_ignore"] = "2"
    config.linux.sysctls["net/ipv4/conf/default/arp_announce"] = "1"
    container = await real.run(await real.pod(config), "sleep", "1000")
    said = await real.sh(container, "cd /proc/sys/net/ipv4/conf/eth0; cat arp_ignore arp_announce")
    assert said.stdout.split() == [b"2", b"1"]
    other = real.pod_config("other")
    other.linux.sysctls["net.ipv4.conf.eth7.arp_ignore"] = "2"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.pod(other)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "net.ipv4.conf.eth7.arp_ignore '2': no such file" in (caught.value.details() or "")
    assert len((await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items) == 1


@pytest.mark.parametrize("mode", [pb.POD, pb.CONTAINER, pb.NODE])
async def test_pid_namespaces(real: Real, mode: pb.NamespaceMode) -> None:
    config = real.pod_config()
    config.linux.security_context.namespace_options.pid = mode
    pod = await real.pod(config)
    one = await real.run(pod, "sh", "-c", "echo $$; exec sleep 1001", name="one")
    await real.run(pod, "sleep", "1002", name="two")
    seen = (await real.sh(one, "ps -o args")).stdout.decode()
    assert ("sleep 1002" in seen) == (mode != pb.CONTAINER)
    await until(lambda: logged(real, "one"))
    assert (logged(real, "one")[0].split()[-1] == "1") == (mode == pb.CONTAINER)


async def test_exit_codes_and_reasons(real: Real) -> None:
    pod = await real.pod()
    for command, code, reason in (("exit 0", 0, "Completed"), ("exit 7", 7, "Error")):
        container = await real.run(pod, "sh", "-c", command, name=f"c{code}")
        found = await real.ended(container)
        assert (found.exit_code, found.reason) == (code, reason)
        assert found.finished_at >= found.started_at >= found.created_at
    told = [line for line in real.daemon.log().splitlines() if 'msg="container exited"' in line]
    assert len(told) == 2 and not any("rpc=" in line for line in told)  # no call's doing


async def test_out_of_memory(real: Real) -> None:
    pod = await real.pod()
    linux = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=16 << 20))
    script = "dd if=/dev/zero of=/dev/null bs=200M count=1"
    container = await real.run(pod, "sh", "-c", f"{script}; exec {script}", linux=linux)
    found = await real.ended(container)
    assert (found.exit_code, found.reason) == (137, "OOMKilled")
    assert found.resources.linux.memory_limit_in_bytes == 16 << 20


async def test_a_command_that_is_not_there(real: Real) -> None:
    pod = await real.pod()
    container = await real.create(pod, "/no/such/command")
    code, text = await refused(real.start(container))
    assert code == grpc.StatusCode.UNKNOWN
    assert "/no/such/command" in text
    found = await real.status(container)
    assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 128, "StartError")


async def test_a_stop_that_is_heard(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sh", "-c", 'trap "echo bye; exit 5" TERM; echo up; while :; do sleep 0.02; done')
    await until(lambda: logged(real))
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=20))
    assert (await real.status(container)).exit_code == 5
    assert logged(real)[-1].endswith("stdout F bye")


async def test_a_stop_that_is_not_heard(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")  # the first process of a pid namespace: SIGTERM does nothing
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=1))
    found = await real.status(container)
    assert (found.state, found.exit_code) == (pb.CONTAINER_EXITED, 137)


async def test_exec(real: Real) -> None:
    pod = await real.pod()
    variables = [pb.KeyValue(key="NAME", value=b"value")]
    container = await real.run(pod, "sleep", "1000", envs=variables, working_dir="/tmp")
    said = await real.sh(container, "echo out; echo err >&2; echo $NAME; pwd; exit 3")
    assert (said.stdout, said.stderr, said.exit_code) == (b"out\nvalue\n/tmp\n", b"err\n", 3)
    code, text = await refused(real.sh(container, "sleep 1000 & sleep 1000", limit_s=1))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "timed out" in text
    assert (
        "sleep"
        not in (await real.sh(container, "ps -o args | grep -v grep | grep 'sleep 1000' | tail -n +2")).stdout.decode()
    )
    said = await real.sh(container, "sleep 1000 & echo started")
    assert said.stdout == b"started\n"
    said = await real.sh(container, "yes 0123456789 | head -c 20000000; yes x | head -c 20000000 >&2")
    assert len(said.stdout) + len(said.stderr) <= 16 << 20
    assert len(said.stdout) > 7 << 20
    assert len(said.stderr) > 7 << 20
    said = await real.sh(container, "yes 0123456789 | head -c 20000000; echo why >&2")
    assert (len(said.stdout), said.stderr) == (KEPT_BYTES - 4, b"why\n")
    request = pb.ExecSyncRequest(container_id=container, cmd=["/no/such/command"])
    code, text = await refused(real.client.ExecSync(request))
    assert code == grpc.StatusCode.UNKNOWN
    assert "/no/such/command" in text


async def test_exec_goes_with_its_caller(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    request = pb.ExecSyncRequest(container_id=container, cmd=["sleep", "2000"])
    code, _ = await refused(real.client.ExecSync(request, timeout=0.5))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    await real.sh(container, "while ps -o args | grep -v grep | grep -q 'sleep 2000'; do :; done")


async def test_mounts_and_a_read_only_root(real: Real, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("from the host\n")
    pod = await real.pod()
    mounts = [
        pb.Mount(container_path="/data", host_path=str(tmp_path / "data"), readonly=True),
        pb.Mount(container_path="/made/below", host_path=str(tmp_path / "of/the/new")),
    ]
    linux = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(readonly_rootfs=True))
    container = await real.run(pod, "sleep", "1000", mounts=mounts, linux=linux)
    script = (
        "cat /data/file; touch /data/x || echo ro; touch /x || echo ro; echo there > /made/below/x; cat /made/below/x"
    )
    said = await real.sh(container, script)
    assert said.stdout.decode().splitlines() == ["from the host", "ro", "ro", "there"]
    assert (tmp_path / "of/the/new/x").read_text() == "there\n"
    assert {(tmp_path / name).stat().st_mode & 0o7777 for name in ("of", "of/the", "of/the/new")} == {0o755}
    assert len((await real.status(container)).mounts) == 2


@pytest.mark.parametrize(("user", "mapped"), [(1234, False), (0, True), (1234, True)])
async def test_its_output_can_be_opened(real: Real, user: int, mapped: bool) -> None:
    """As images do whose log files are links to /dev/stdout."""
    if mapped:
        need("userns")
    config = real.pod_config(mapped=mapped)
    linux = pb.LinuxContainerConfig()
    linux.security_context.run_as_user.value = user
    script = "echo out > /dev/stdout && echo err > /dev/stderr"
    pod = await real.pod(config)
    container = await real.run(pod, "sh", "-c", f"{script} && exec sleep 1000", linux=linux, stdin=True)
    said = await real.sh(container, f"{script} && test -r /proc/1/fd/0 && echo in > /proc/1/fd/1")
    assert (said.stdout, said.stderr, said.exit_code) == (b"out\n", b"err\n", 0)
    log = real.logs / "c.log"
    await until(lambda: len(log.read_text().splitlines()) == 3)
    lines = [line.partition(" ")[2] for line in log.read_text().splitlines()]
    assert sorted(lines) == ["stderr F err", "stdout F in", "stdout F out"]
    assert Path("/dev/null").stat().st_uid == 0


async def test_the_working_directory_is_made_in_a_read_only_root_too(real: Real) -> None:
    linux = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(readonly_rootfs=True))
    container = await real.run(await real.pod(), "sleep", "1000", working_dir="/no/such", linux=linux)
    said = await real.sh(container, "pwd; touch here || echo ro")
    assert said.stdout.decode().splitlines() == ["/no/such", "ro"]


async def test_who_a_container_runs_as(real: Real) -> None:
    pod = await real.pod()
    context = pb.LinuxContainerSecurityContext(
        run_as_user=pb.Int64Value(value=1234), run_as_group=pb.Int64Value(value=5678), supplemental_groups=[99]
    )
    linux = pb.LinuxContainerConfig(security_context=context)
    container = await real.run(pod, "sleep", "1000", linux=linux)
    assert (await real.sh(container, "id -u; id -g; id -G")).stdout.decode().split() == ["1234", "5678", "5678", "99"]
    user = (await real.status(container)).user.linux
    assert (user.uid, user.gid, 99 in user.supplemental_groups) == (1234, 5678, True)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"image": pb.ImageSpec(image="localhost/no/such:image")}, "localhost/no/such:image"),
        ({"image": pb.ImageSpec()}, "image"),
        ({"mounts": [pb.Mount(container_path="data", host_path="/tmp")]}, "data"),
        ({"linux": pb.LinuxContainerConfig(security_context={"run_as_username": "nobody-here"})}, "nobody-here"),
        ({"log_path": "../../x"}, ".."),
    ],
)
async def test_a_bad_request_leaves_nothing(real: Real, fields: dict[str, Any], word: str) -> None:
    pod = await real.pod()
    code, text = await refused(real.create(pod, "true", **fields))
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert word in text
    assert not (await real.client.ListContainers(pb.ListContainersRequest())).containers
    assert not os.listdir(real.daemon.root / "rootfs")
    await real.run(pod, "true")


async def test_a_cgroup_parent(real: Real) -> None:
    runtime = (await real.client.RuntimeConfig(pb.RuntimeConfigRequest())).linux
    name = f"cribtest{os.getpid()}"
    systemd = runtime.cgroup_driver == pb.SYSTEMD
    config = real.pod_config(
        linux=pb.LinuxPodSandboxConfig(cgroup_parent=f"{name}-pod.slice" if systemd else f"/{name}/pod")
    )
    pod = await real.pod(config)
    container = await real.run(pod, "sleep", "1000")
    cgroups = Path(f"/proc/{await real.pid(container)}/cgroup").read_text()
    assert (f"{name}-pod.slice" if systemd else f"/{name}/pod/{container}") in cgroups
    await real.remove(pod)
    assert not [*Path("/sys/fs/cgroup").glob(f"*/{name}*"), *Path("/sys/fs/cgroup").glob(f"{name}*")]


@pytest.mark.parametrize("parent", ["/a/../../b", "/crib-test/" + "x" * 300, "/"])
async def test_a_cgroup_parent_that_can_not_be(real: Real, parent: str) -> None:
    config = real.pod_config(linux=pb.LinuxPodSandboxConfig(cgroup_parent=parent))
    code, text = await refused(real.pod(config))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert parent[:20] in text
    assert not (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    assert not list(real.daemon.state.glob("pods/*"))


async def test_the_plan_of_a_pod_and_of_a_container(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000", envs=[pb.KeyValue(key="PASSWORD", value=b"hunter2")])
    for id, kind in ((pod, "pod"), (container, "container")):
        plan = await real.client.Plan(crib_pb2.PlanRequest(id=id[:16]))
        assert (plan.id, plan.kind) == (id, kind)
        assert len(plan.steps) > 2
        assert plan.total_ns > 0
    answer = await real.client.ContainerStatus(pb.ContainerStatusRequest(container_id=container, verbose=True))
    spec = json.loads(answer.info["info"])["runtimeSpec"]
    assert {"mount", "pid", "network"} <= {one["type"] for one in spec["linux"]["namespaces"]}
    assert json.loads(answer.info["info"])["pid"] > 0
    assert "hunter2" not in str(plan) + str(answer) + real.daemon.log()

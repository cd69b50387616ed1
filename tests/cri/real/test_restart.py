"""cribd dies, and is started again: pods notice nothing, and it knows them all."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from runtime import selinux
from runtime.cgroup import detect
from runtime.zygote.messages import VERSION
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN, REPOSITORY, Daemon
from tests.limits import scaled
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]


async def again(real: Real) -> None:
    """Start cribd and connect anew."""
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()


async def test_an_upgrade_that_changes_the_messages(real: Real, tmp_path: Path) -> None:
    """Pods of before run on, and can be removed; what their monitors can't be asked for says why."""
    older = tmp_path / "older"
    for name in ("cri", "net", "runtime"):
        shutil.copytree(REPOSITORY / name, older / name, ignore=shutil.ignore_patterns("__pycache__"))
    messages = older / "runtime/zygote/messages.py"
    messages.write_text(messages.read_text().replace(f"Final = {VERSION}\n", f"Final = {VERSION - 1}\n"))
    real.daemon.kill()
    real.daemon.code = older
    await again(real)
    pod = await real.pod()
    runs = await real.run(pod, "sleep", "1000", name="runs")
    ends = await real.run(pod, "sleep", "1000", name="ends")
    pids = [await real.pid(each) for each in (runs, ends)]

    real.daemon.kill()
    real.daemon.code = REPOSITORY
    await again(real)
    assert (await real.status(runs)).state == pb.CONTAINER_RUNNING
    why = rf"it speaks version {VERSION - 1} of the messages, this process version {VERSION}"
    for asked in (real.sh(runs, "true"), real.create(pod, "true", name="new")):
        with pytest.raises(grpc.aio.AioRpcError, match=why) as caught:
            await asked
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    await real.client.StopContainer(pb.StopContainerRequest(container_id=ends, timeout=0))
    assert (await real.status(ends)).exit_code == 137
    await real.remove(pod)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    pod = await real.pod()
    assert (await real.sh(await real.run(pod, "sleep", "1000"), "echo well")).stdout == b"well\n"


async def test_a_crash(real: Real) -> None:
    pod = await real.pod()
    ticking = await real.run(pod, "sh", "-c", "while :; do echo tick; sleep 0.05; done", name="ticking")
    waiting = await real.run(pod, "sh", "-c", "while [ ! -e /go ]; do sleep 0.02; done; exit 9", name="waiting")
    created = await real.create(pod, "sleep", "1000", name="created")
    pid = await real.pid(ticking)
    ip = (await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))).status.network.ip
    waiting_pid = await real.pid(waiting)
    real.daemon.kill()

    Path(f"/proc/{waiting_pid}/root/go").touch()
    with open(os.pidfd_open(waiting_pid), "rb") as pidfd:
        await asyncio.to_thread(select.select, [pidfd], [], [], 20)
    lines = (real.logs / "ticking.log").read_text().count("\n")
    await until(lambda: (real.logs / "ticking.log").read_text().count("\n") > lines)

    await again(real)
    assert (await real.status(ticking)).state == pb.CONTAINER_RUNNING
    assert await real.pid(ticking) == pid
    found = await real.status(waiting)
    assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 9, "Error")
    assert 0 < found.started_at <= found.finished_at
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert answer.status.state == pb.SANDBOX_READY
    assert answer.status.network.ip == ip
    assert (await real.sh(ticking, "echo still here")).stdout == b"still here\n"
    await real.start(created)
    assert (await real.sh(created, "echo and here")).stdout == b"and here\n"
    assert await real.pod(real.pod_config("other"))
    await real.client.StopContainer(pb.StopContainerRequest(container_id=ticking, timeout=0))
    assert (await real.status(ticking)).exit_code == 137


async def test_a_clean_stop_leaves_pods_running(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    pid = await real.pid(container)
    assert real.daemon.stop() == 0
    assert Path(f"/proc/{pid}").exists()
    assert not (real.daemon.directory / "s").exists()
    await again(real)
    assert (await real.status(container)).state == pb.CONTAINER_RUNNING


async def test_a_lost_monitor(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    pid = await real.pid(container)
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    os.kill(json.loads(answer.info["info"])["pid"], signal.SIGKILL)
    found = await real.ended(container)
    assert (found.exit_code, found.reason) == (255, "Unknown")
    await until(lambda: not Path(f"/proc/{pid}").exists())
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert answer.status.state == pb.SANDBOX_NOTREADY


async def test_a_stop_goes_on_over_a_crash(real: Real) -> None:
    pod = await real.pod()
    script = 'trap "echo TERM" TERM; echo up; while :; do sleep 0.02; done'
    container = await real.run(pod, "sh", "-c", script)
    await until(lambda: "up" in (real.logs / "c.log").read_text())  # before, a namespace's init ignores the signal
    call = asyncio.ensure_future(
        real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=1000))
    )
    await until(lambda: "TERM" in (real.logs / "c.log").read_text())
    real.daemon.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    await again(real)
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=1))
    assert (await real.status(container)).exit_code == 137
    assert (real.logs / "c.log").read_text().count("TERM") == 1


async def test_a_kill_that_a_crash_cut_short(real: Real) -> None:
    """On cgroup v1 killing begins with freezing."""
    container = await real.run(await real.pod(), "sleep", "1000")
    entries = [line.split(":", 2) for line in Path(f"/proc/{await real.pid(container)}/cgroup").read_text().split()]
    (path,) = (path for _, kind, path in entries if kind == ("freezer" if detect().version == 1 else ""))
    detect().freeze(path)
    real.daemon.kill()
    await again(real)
    assert (await real.sh(container, "echo goes on")).stdout == b"goes on\n"


async def test_a_pod_whose_record_is_lost(real: Real) -> None:
    """It is ended: a kubelet that isn't shown it starts another in its place."""
    pod = await real.pod()
    pid = await real.pid(await real.run(pod, "sleep", "1000"))
    real.daemon.kill()
    (real.daemon.root / "state.db").write_bytes(b"no database at all" * 1000)
    (real.daemon.root / "state.db-wal").unlink()
    await again(real)
    assert not Path(f"/proc/{pid}").exists()
    assert not os.listdir(real.daemon.state / "pods") and not os.listdir("/run/netns")
    assert await real.pod() != pod


async def test_one_cribd_per_directory(real: Real) -> None:
    second = await asyncio.create_subprocess_exec(
        *real.daemon.arguments, cwd=REPOSITORY, stderr=asyncio.subprocess.PIPE
    )
    _, text = await asyncio.wait_for(second.communicate(), scaled(20))
    assert second.returncode == 1
    assert b"another cribd" in text
    assert (await real.client.Version(pb.VersionRequest())).runtime_name == "crib"


@pytest.mark.parametrize(
    ("config", "named"), [(f'{BUILTIN}subnet = "300.0.0.0/16"\n', b"300.0.0.0/16"), ("selinux = true\n", b"SELinux")]
)
async def test_a_cribd_that_can_not_start_leaves_nothing(run_dir: Path, config: str, named: bytes) -> None:
    if named == b"SELinux" and selinux.enabled():
        pytest.skip("this kernel has SELinux on")
    daemon = Daemon(run_dir, config)
    process = await asyncio.create_subprocess_exec(*daemon.arguments, cwd=REPOSITORY, stderr=asyncio.subprocess.PIPE)
    _, text = await asyncio.wait_for(process.communicate(), scaled(20))
    assert process.returncode == 1
    assert named in text


async def test_its_files_are_for_root_alone(real: Real) -> None:
    for path, mode in ((real.daemon.root, 0o700), (real.daemon.state, 0o700), (real.daemon.directory / "s", 0o600)):
        assert path.stat().st_mode & 0o777 == mode


async def monitor_of(real: Real, pod: str) -> int:
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    return int(json.loads(answer.info["info"])["pid"])


async def test_a_monitor_that_hangs(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    os.kill(await monitor_of(real, pod), signal.SIGSTOP)
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
    found = await real.status(container)
    assert (found.state, found.exit_code) == (pb.CONTAINER_EXITED, 137)
    await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))


async def test_a_monitor_that_hangs_over_a_restart(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    monitor = await monitor_of(real, pod)
    os.kill(monitor, signal.SIGSTOP)
    real.daemon.kill()
    await again(real)
    assert (await real.status(container)).state == pb.CONTAINER_RUNNING
    request = pb.ExecSyncRequest(container_id=container, cmd=["true"])
    with pytest.raises(grpc.aio.AioRpcError, match="does not answer"):
        await real.client.ExecSync(request)
    await real.remove(pod)
    await until(lambda: not Path(f"/proc/{monitor}").exists())


async def test_a_zygote_that_dies_is_started_again(real: Real) -> None:
    async def ready() -> bool:
        conditions = (await real.client.Status(pb.StatusRequest())).status.conditions
        return bool(next(one.status for one in conditions if one.type == "RuntimeReady"))

    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    assert real.daemon.process is not None
    for _ in range(2):
        threads = Path(f"/proc/{real.daemon.process.pid}/task").glob("*/children")
        children = [pid for thread in threads for pid in thread.read_text().split()]
        (zygote,) = (pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "crib-zygote\n")
        os.kill(int(zygote), signal.SIGKILL)
        await until(lambda zygote=zygote: not Path(f"/proc/{zygote}").exists())  # type: ignore[misc]
        other = await real.pod(real.pod_config("other"))  # waits for the next one
        assert await ready()
        assert (await real.sh(await real.run(other, "sleep", "1000"), "echo new")).stdout == b"new\n"
        await real.remove(other)
    assert (await real.sh(container, "echo still here")).stdout == b"still here\n"
    assert real.daemon.log().count("a new zygote is there") == 2

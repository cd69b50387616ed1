"""Pods and containers on the real kernel, through the engine alone."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from runtime.cgroup import detect
from runtime.engine import Cgroup, ContainerStart, Engine, Exec, ExecStart, Pod, PodStart
from runtime.errors import DeadlineExceeded, StepFailed, Unavailable, WrongState
from runtime.images import RootFs
from runtime.linux.probe import probe
from runtime.spec import Capabilities, Device, Hook, Hooks, Linux, Mount, Process, User
from runtime.zygote.launch import interpreter, launch
from runtime.zygote.messages import Kind, receive
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.conftest import POD_ID, TIMEOUT_S, Bench, container

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]


def execute(bench: Bench, pod: Pod, number: int, null: int, *args: str, stdout: int = -1) -> Exec:
    process = Process(cwd="/", user=User(uid=0, gid=0), args=args, env=("PATH=/bin",))
    out = null if stdout < 0 else stdout
    cgroup = Cgroup.of(bench.cgroups, f"{bench.cgroup}/c")
    return pod.exec(ExecStart(f"e{number}", "c", process, Linux(), cgroup.join_files, cgroup.clone_dir), null, out, out)


async def test_a_container_sees_only_its_own(bench: Bench) -> None:
    pod = await bench.pod()
    exited, log = await bench.run(pod, "c", container(pod, "sh", "-c", "hostname; ps -o pid,args; ls /; exit 3"))
    assert exited.code == 3
    assert not exited.oom_killed
    assert exited.exited_ns >= exited.started_ns > 0
    lines = log.splitlines()
    assert lines[0] == "pod"
    assert [line.split()[0] for line in lines[2:4]] == ["1", "3"] or lines[2].split()[0] == "1"
    assert lines[-5:] == ["bin", "dev", "etc", "proc"] or lines[-4:] == ["bin", "dev", "etc", "proc"]


async def test_the_process_inherits_what_was_chosen(bench: Bench) -> None:
    pod = await bench.pod()
    command = "cat /proc/self/status; ls -l /proc/self/fd; readlink /proc/self/cwd"
    _, log = await bench.run(pod, "c", container(pod, "sh", "-c", command))
    status = dict(line.split(":\t", 1) for line in log.splitlines() if ":\t" in line)
    assert (status["SigIgn"], status["SigBlk"], status["SigCgt"]) == ("0" * 16,) * 3
    assert status["NoNewPrivs"] == "1"
    assert status["Umask"] == "0022"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0x080000E1
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NSsid"] == "1"
    descriptors = [line for line in log.splitlines() if " -> " in line and line[0] in "l"]
    assert len([line for line in descriptors if "socket" in line or "memfd" in line]) == 0


async def test_start_tells_each_step_and_its_time(bench: Bench) -> None:
    pod = await bench.pod()
    started = await bench.start(pod, "c", container(pod, "sleep", "100"))
    texts = [item.text for item in started.timeline]
    assert texts[0].startswith("compile")
    assert texts[2].startswith("new session")
    assert {item.phase for item in started.timeline} >= {"plan", "namespaces", "rootfs", "mounts", "identity", "exec"}
    assert texts[-1].startswith("execute sleep")
    assert all(0 <= item.duration_ns < 10**10 for item in started.timeline)
    assert Path(f"/proc/{started.pid}/root/bin/busybox").exists()


@pytest.mark.parametrize(
    ("args", "mounts", "cause", "number"),
    [
        (("nope",), (), 'exec: "nope": executable file not found in $PATH', errno.ENOENT),
        (("/etc",), (), 'exec: "/etc"', errno.EACCES),
        (
            ("true",),
            (Mount(destination="/x", type="bind", source="/does/not/exist", options=("rbind",)),),
            "open_tree /does/not/exist",
            errno.ENOENT,
        ),
        (("true",), (Mount(destination="/x", type="nonsense"),), "mount nonsense on /x", errno.ENODEV),
    ],
)
async def test_a_failed_start_names_the_cause_and_leaves_nothing(
    bench: Bench, args: tuple[str, ...], mounts: tuple[Mount, ...], cause: str, number: int
) -> None:
    pod = await bench.pod()
    with pytest.raises(StepFailed, match=r"step \d+/\d+") as caught:
        await bench.start(pod, "c", container(pod, *args, mounts=mounts))
    assert cause in str(caught.value)
    assert caught.value.errno == number
    assert await pod.containers() == []
    exited, _ = await bench.run(pod, "c2", container(pod, "true"))
    assert exited.code == 0


async def test_a_killed_container_has_128_and_the_signal(bench: Bench) -> None:
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "100"))
    await pod.signal("c", signal.SIGKILL)
    exited = await asyncio.wait_for(bench.exited("c"), TIMEOUT_S)
    assert exited.code == 137
    with pytest.raises(WrongState, match="not running"):
        await pod.signal("c", signal.SIGTERM)
    await pod.forget("c")
    assert await pod.containers() == []


async def test_exec_runs_inside(bench: Bench, null: int) -> None:
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "100"))
    read, write = os.pipe()
    done = await execute(bench, pod, 1, null, "sh", "-c", "hostname; ls -d /bin/busybox; exit 7", stdout=write).wait()
    os.close(write)
    assert done.code == 7
    assert os.read(read, 99) == b"pod\n/bin/busybox\n"
    os.close(read)


async def test_exec_of_what_does_not_run(bench: Bench, null: int) -> None:
    pod = await bench.pod()
    bench.cgroup_of("c")
    with pytest.raises(WrongState, match="not running"):
        await execute(bench, pod, 1, null, "true").wait()
    await bench.start(pod, "c", container(pod, "sleep", "100"))
    with pytest.raises(StepFailed, match="executable file not found"):
        await execute(bench, pod, 2, null, "nope").wait()


async def test_a_failure_is_told_to_who_asked(bench: Bench, state_dir: Path, null: int) -> None:
    """Two cribds may number their requests alike."""
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "100"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        directory = os.open(state_dir / "pods" / POD_ID, os.O_PATH)
        other.connect(f"/proc/self/fd/{directory}/monitor.sock")
        os.close(directory)
        with pytest.raises(StepFailed):
            await execute(bench, pod, 1, null, "nope").wait()
        with pytest.raises(StepFailed):
            await bench.start(pod, "d", container(pod, "nope"))
        assert (await execute(bench, pod, 2, null, "true").wait()).code == 0
        other.settimeout(TIMEOUT_S)
        message = receive(other)
        assert message
        assert message[0] == Kind.EXEC_EXITED, "that is told to all"


async def test_a_start_that_fails_in_the_monitor_leaves_nothing_there(bench: Bench) -> None:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", pid=True))
    capable = Capabilities(bounding=("CAP_SYS_PTRACE",), effective=("CAP_SYS_PTRACE",), permitted=("CAP_SYS_PTRACE",))

    def watching(process: Process) -> Process:
        return msgspec.structs.replace(process, capabilities=capable)

    shared: dict[str, str | None] = {"pid": pod.namespaces.pid}
    held = bench.cgroup_of("c")
    await bench.start(pod, "c", container(pod, "sleep", "100", namespaces=shared, process=watching), held)
    rootfs = RootFs(base=str(bench.layer), lowers=("1",), upper="/", work="/")
    usual, gone = bench.cgroup_of("d"), "/sys/fs/cgroup/gone"
    process = Path(f"/proc/{pod.monitor_pid}")
    await pod.containers()
    before = sorted(os.listdir(process / "fd")), (process / "cmdline").read_bytes()
    for command, cgroup in (("x" * (5 << 20), usual), ("true", replace(usual, clone_dir=gone))):
        spec = container(pod, command, namespaces=shared)
        for _ in range(3):
            with pytest.raises(StepFailed, match=r"start: message too long|gone no such file or directory"):
                await pod.start(ContainerStart("d", spec, rootfs, cgroup, None, stdin=True))
    await pod.containers()  # asked after those: it is done with them
    assert (sorted(os.listdir(process / "fd")), (process / "cmdline").read_bytes()) == before
    states = [Path(path) / name for path in held.kill_dirs for name in ("cgroup.freeze", "freezer.state")]
    assert {path.read_text().strip() for path in states if path.exists()} in ({"0"}, {"THAWED"})


async def test_two_containers_share_shm_and_hostname_but_not_processes(bench: Bench) -> None:
    pod = await bench.pod()
    await bench.run(pod, "c1", container(pod, "sh", "-c", "echo shared > /dev/shm/x"))
    _, log = await bench.run(pod, "c2", container(pod, "sh", "-c", "cat /dev/shm/x; stat -f -c %b /dev/shm; ls /proc"))
    assert log.startswith("shared\n16384\n")  # 64 MiB in pages
    assert len([name for name in log.split() if name.isdigit() and int(name) < 100]) <= 3


async def test_without_clones_of_detached_mounts_shm_is_shared_too(
    layer: Path, state_dir: Path, tmp_path: Path
) -> None:
    state_dir.mkdir()
    engine = Engine(state_dir, launch(), replace(probe(), clone_detached_mount=False))
    bench = Bench(engine, layer, tmp_path, detect(driver="cgroupfs"), f"/crib-test-{os.getpid()}-shm")
    try:
        pod = await bench.pod()
        await bench.run(pod, "c1", container(pod, "sh", "-c", "echo shared > /dev/shm/x"))
        _, log = await bench.run(pod, "c2", container(pod, "cat", "/dev/shm/x"))
        assert log == "shared\n"
    finally:
        await bench.engine.stop_pod(POD_ID)
        bench.engine.close()
        await bench.remove_cgroups()


async def test_a_shared_pid_namespace_has_an_init_that_reaps(bench: Bench) -> None:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", pid=True))
    shared: dict[str, str | None] = {"pid": pod.namespaces.pid}
    await bench.start(pod, "c1", container(pod, "sh", "-c", "(sleep 0 &); exec sleep 100", namespaces=shared))
    until_reaped = "while ps -o stat | grep -q Z; do true; done; ps -o pid,stat,args"
    exited, log = await bench.run(pod, "c2", container(pod, "sh", "-c", until_reaped, namespaces=shared))
    assert exited.code == 0
    assert "sleep 100" in log
    init = Path(f"/proc/{pod.init_pid}")
    assert os.listdir(init / "root") == []
    assert os.listdir(init / "fd") == []
    status = (init / "status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "CapBnd:\t0000000000000000" in status


async def test_the_hosts_namespaces_can_be_had(bench: Bench) -> None:
    pod = await bench.pod(PodStart(id=POD_ID, hostname=None, net=False, ipc=False, shm_bytes=0))
    spec = container(
        pod,
        "sh",
        "-c",
        "for n in net ipc uts pid; do readlink /proc/self/ns/$n; done",
        namespaces={"network": None, "ipc": None, "uts": None, "pid": None},
    )
    mounts = tuple(mount for mount in spec.mounts if mount.destination != "/dev/shm")
    exited, log = await bench.run(pod, "c", msgspec.structs.replace(spec, mounts=mounts))
    assert exited.code == 0
    assert log.splitlines() == [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "ipc", "uts", "pid")]


async def test_a_new_engine_finds_what_runs_and_what_ended(bench: Bench, state_dir: Path, null: int) -> None:
    pod = await bench.pod()
    started = await bench.start(pod, "c", container(pod, "sleep", "100"))
    await bench.start(pod, "done", container(pod, "sh", "-c", "exit 5"))
    await asyncio.wait_for(bench.exited("done"), TIMEOUT_S)
    monitor = pod.monitor_pid
    bench.engine.close()
    bench.engine = Engine(state_dir, launch(), probe())
    again = await bench.engine.connect(POD_ID)
    assert again is not None
    assert again.monitor_pid == monitor
    assert again.namespaces == pod.namespaces
    assert again.shm_path == pod.shm_path
    facts = {fact.id: fact for fact in await again.containers()}
    assert facts["c"].pid == started.pid
    assert facts["c"].exited is None
    assert facts["done"].exited is not None
    assert facts["done"].exited.code == 5
    assert [record.code for record in bench.engine.exits_on_disk(POD_ID)] == [5]
    assert (await execute(bench, again, 1, null, "true").wait()).code == 0


async def test_a_pod_whose_monitor_hangs_can_be_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.pod.END_TIMEOUT_S", 0.5)
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "100"))
    os.kill(pod.monitor_pid, signal.SIGSTOP)
    with pytest.raises(
        DeadlineExceeded, match=rf"no answer to facts within 0.1 s: crib-monitor {pod.monitor_pid} T in "
    ):
        await pod.request(Kind.FACTS, 0.1)
    await bench.engine.stop_pod(POD_ID)
    try:  # dead: what is left of it, for a moment, is the zygote's to reap
        assert Path(f"/proc/{pod.monitor_pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        pass
    await bench.engine.stop_pod(POD_ID)


async def test_a_start_that_hangs_says_where(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.starts.START_TIMEOUT_S", scaled(1))

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(bench.engine, "run_hooks", hang)
    pod = await bench.pod()
    spec = msgspec.structs.replace(container(pod, "true"), hooks=Hooks(prestart=(Hook(path="/bin/true"),)))
    with pytest.raises(DeadlineExceeded, match=r"crib-monitor \d+ S in \w+.*; its child \d+ S in \w+"):
        await bench.start(pod, "c", spec)


async def test_a_lost_monitor_is_told(bench: Bench, null: int) -> None:
    pod = await bench.pod()
    started = await bench.start(pod, "c", container(pod, "sleep", "100"))
    lost = asyncio.Event()
    pod.on_lost = lost.set
    running = execute(bench, pod, 1, null, "sleep", "100")
    os.kill(pod.monitor_pid, signal.SIGKILL)
    await asyncio.wait_for(lost.wait(), TIMEOUT_S)
    with pytest.raises(Unavailable):
        await running.wait()
    with pytest.raises(Unavailable):
        await pod.containers()
    os.kill(started.pid, signal.SIGKILL)


async def test_nothing_of_the_interpreter_can_be_written_through_a_monitor(bench: Bench) -> None:
    """CVE-2019-5736: the files that a process of crib's maps can't be opened for writing by way of /proc."""
    pod = await bench.pod()
    maps = Path(f"/proc/{pod.monitor_pid}/map_files")
    targets = [maps / name for name in os.listdir(maps)] + [Path(f"/proc/{pod.monitor_pid}/exe")]
    files = [path for path in targets if os.readlink(path).startswith("/")]
    assert any("libc" in os.readlink(path) for path in files)
    for path in files:
        with pytest.raises(OSError, match=r"Read-only|Text file busy") as caught:
            os.close(os.open(path, os.O_WRONLY))
        if os.readlink(path) != interpreter():  # the program itself answers ETXTBSY while it runs
            assert caught.value.errno == errno.EROFS, f"{path} → {os.readlink(path)}"


async def test_pods_survive_without_the_files_crib_was_started_from(
    layer: Path, state_dir: Path, tmp_path: Path
) -> None:
    """A zygote started from a copy of the package goes on making pods when the copy is gone."""
    root = Path(__file__).parents[2]
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(["cp", "-r", str(root / "runtime"), str(copy)], check=True)
    program = (
        "import asyncio, shutil, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from runtime.zygote.launch import launch\n"
        "zygote = launch()\n"
        "from runtime.engine import Engine, PodStart\n"
        "from runtime.linux.probe import probe\n"
        "import runtime; assert runtime.__file__.startswith(sys.argv[1])\n"
        "async def main():\n"
        "    Path(sys.argv[2]).mkdir()\n"
        "    engine = Engine(Path(sys.argv[2]), zygote, probe())\n"
        "    shutil.rmtree(sys.argv[1])\n"
        "    pod = await engine.start_pod(PodStart(id='b' * 64, hostname='x', pid=True))\n"
        "    print(await pod.containers())\n"
        "    await engine.stop_pod('b' * 64)\n"
        "    engine.close()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(copy), str(state_dir)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd="/",
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


async def test_exec_kill_takes_what_it_left_behind(bench: Bench, null: int) -> None:
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "100"))
    read, write = os.pipe()
    running = execute(bench, pod, 1, null, "sh", "-c", "(sleep 50 & ) ; echo ready; sleep 60", stdout=write)
    os.close(write)
    assert await asyncio.to_thread(os.read, read, 99) == b"ready\n"
    await running.kill()
    assert (await asyncio.wait_for(running.wait(), TIMEOUT_S)).code == 137
    os.close(read)


async def test_exec_kill_takes_what_makes_a_session_of_its_own_meanwhile(bench: Bench, null: int) -> None:
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "100"))
    for number in range(15):
        read, write = os.pipe()
        command = "for i in 1 2 3 4; do setsid sleep 50 & done; echo ready; sleep 60"
        running = execute(bench, pod, number, null, "sh", "-c", command, stdout=write)
        os.close(write)
        assert await asyncio.to_thread(os.read, read, 99) == b"ready\n"
        await running.kill()
        assert (await asyncio.wait_for(running.wait(), TIMEOUT_S)).code == 137
        await asyncio.wait_for(asyncio.to_thread(os.read, read, 1), TIMEOUT_S)  # the end: nobody holds it any more
        os.close(read)


async def test_a_container_can_join_anothers_pid_namespace_while_that_runs(bench: Bench) -> None:
    pod = await bench.pod()
    await bench.start(pod, "c1", container(pod, "sleep", "111"))
    spec = container(pod, "ps", "-o", "args", namespaces={"pid": "/proc/0/ns/pid"})
    exited, log = await bench.run(pod, "c2", spec, pid_target="c1")
    assert exited.code == 0
    assert "sleep 111" in log.splitlines()
    await pod.kill("c1")
    await asyncio.wait_for(bench.exited("c1"), TIMEOUT_S)
    with pytest.raises(WrongState, match="not running"):
        await bench.start(pod, "c3", spec, pid_target="c1")


async def test_kernel_parameters_of_a_pod(bench: Bench) -> None:
    sysctls = {"net.ipv4.conf.lo.forwarding": "1", "kernel.shm_rmid_forced": "1"}
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", sysctls=sysctls))
    files = "/proc/sys/net/ipv4/conf/lo/forwarding /proc/sys/kernel/shm_rmid_forced"
    _, log = await bench.run(pod, "c", container(pod, "sh", "-c", f"cat {files}"))
    assert log.split() == ["1", "1"]


async def test_devices_that_are_there_already_stay(bench: Bench, tmp_path: Path) -> None:
    """A container with the host's /dev and devices of its own must not replace the host's."""
    (tmp_path / "dev").mkdir()
    os.mknod(tmp_path / "dev/null", 0o20640, os.makedev(1, 3))
    (tmp_path / "dev/ptmx").symlink_to("pts/ptmx")
    before = os.lstat(tmp_path / "dev/null")
    devices = tuple(
        Device(path=f"/own/{n}", type="c", major=1, minor=m) for n, m in (("null", 3), ("ptmx", 5), ("x", 5))
    )
    pod = await bench.pod()
    mount = Mount(destination="/own", type="bind", source=str(tmp_path / "dev"), options=("rbind",))
    spec = container(
        pod, "true", mounts=(mount,), linux=lambda linux: msgspec.structs.replace(linux, devices=devices)
    )  # fmt: skip
    exited, _ = await bench.run(pod, "c", spec)
    assert exited.code == 0
    assert os.lstat(tmp_path / "dev/null") == before
    assert (tmp_path / "dev/ptmx").is_symlink()
    assert (tmp_path / "dev/x").is_char_device()

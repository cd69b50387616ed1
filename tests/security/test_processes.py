"""What a container sees of crib's processes, and what it can do to them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from runtime.engine import Pod, PodStart
from runtime.errors import CribError
from runtime.linux import caps
from tests.requires import requires
from tests.runtime.conftest import POD_ID, TIMEOUT_S, Bench, container
from tests.security import weak
from tests.security.conftest import Image, Plans, Weaken, capable, execute, holding, python, with_image
from tests.security.defects import attack
from tests.security.trace import tracing
from tests.security.watch import NO_PTRACE, Watch, at_the_fifo, has, held_by, shared, until

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]

# Every file behind /proc/PID of every process that is not this shell: opened for writing, without writing.
OVERWRITE = """
for p in $SEEN; do
    [ $p = /proc/$$ ] && continue
    echo "SEEN $(cat $p/comm)"
    for f in $p/exe $p/map_files/* $p/fd/*; do
        [ -f $f ] && case $(readlink $f) in *.so*|*python*|/work*|/usr*|/opt*) ( : >> $f ) 2>/dev/null && echo "WRITABLE $(readlink $f)";; esac
    done
    for d in $p/cwd $p/root; do [ -e $d/$MARKER ] && echo "HOST $p"; done
    for f in $p/fd/*; do [ -e $f ] && echo "DESCRIPTOR $(readlink $f)"; done
done; true
"""  # noqa: E501


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def overwrite(bench: Bench, marker: Path, pid: str | None) -> list[str]:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", pid=pid == "pod"))
    namespaces: dict[str, str | None] = shared(pod) if pid == "pod" else {"pid": None}
    # In the host's there are other cribds, and everything else: it is this pod's monitor and its parent.
    seen = (
        "/proc/[0-9]*"
        if pid == "pod"
        else " ".join(f"/proc/{each}" for each in (pod.monitor_pid, parent(pod.monitor_pid)))
    )
    spec = container(
        pod, "sh", "-c", f"MARKER={marker}; SEEN='{seen}'; {OVERWRITE}", namespaces=namespaces,
        process=holding("SYS_PTRACE", "SYS_ADMIN", "DAC_OVERRIDE"),
    )  # fmt: skip
    exited, log = await bench.run(pod, "c", spec)
    assert exited.code == 0, log
    return log.splitlines()


@attack(
    "CVE-2019-5736",
    sentence="A container with SYS_PTRACE and SYS_ADMIN in a shared pid namespace opens exe, map_files, fd, cwd and "
    "root "
    "of crib's processes, to overwrite the runtime or to reach the host",
    guard="every file of the interpreter is mapped through a read-only private mount; a pod's init has an empty root "
    "and "
    "no descriptor",
    control="test_5736_control_mapped_from_where_they_are",
)
async def test_cve_2019_5736_shared_pid_namespace(bench: Bench, tmp_path: Path) -> None:
    lines = await overwrite(bench, tmp_path, "pod")
    assert lines == ["SEEN pod-init"]


@attack(
    "CVE-2019-5736",
    sentence="The same in the host's pid namespace, where zygote and monitors are seen as well: their interpreter is "
    "opened for writing",
    guard="every file of the interpreter is mapped through a read-only private mount",
    control="test_5736_control_mapped_from_where_they_are",
)
async def test_cve_2019_5736_host_pid_namespace(bench: Bench, tmp_path: Path) -> None:
    lines = await overwrite(bench, tmp_path, None)
    assert {"SEEN crib-zygote", "SEEN crib-monitor"} <= set(lines)
    assert [line for line in lines if line.startswith("HOST")]  # not a boundary: see docs/security.md
    assert not [line for line in lines if line.startswith("WRITABLE")]


async def test_5736_control_mapped_from_where_they_are(weaken: Weaken, tmp_path: Path) -> None:
    lines = await overwrite(await weaken(weak.NO_READ_ONLY_WORLD), tmp_path, "pod")
    assert [line for line in lines if line.startswith("WRITABLE")]


# What the interpreter itself does when a container has it run: it keeps its file, which is busy until it has become
# something else, and opens that for writing, or mounts it anew.
REOPEN = """
( : >> /proc/self/fd/$0 ) && echo WRITABLE
mount -o bind /proc/self/fd/$0 /mine && mount -o remount,rw,bind /mine && ( : >> /mine ) && echo REMOUNTED
"""
AS_ITSELF = f"""
import os
fd = os.open('/proc/self/exe', os.O_PATH)
os.set_inheritable(fd, True)
print('EXE', os.readlink('/proc/self/exe'), flush=True)
if os.access('/proc/self/exe', os.W_OK):  # it can be opened whenever crib does not run
    print('WRITABLE', flush=True)
os.execv('/bin/sh', ['sh', '-c', {REOPEN!r}, str(fd)])
"""


async def run_itself(bench: Bench, image: Image, null: int) -> list[str]:
    """Start and exec a link to /proc/self/exe, where the container has the interpreter's libraries."""
    (image.root / "bin/itself").symlink_to("/proc/self/exe")
    (image.root / "mine").touch()
    _, mounts = python()
    pod = await with_image(bench, image).pod()
    command = ("/bin/itself", "-I", "-S", "-c", AS_ITSELF)
    able = holding("SYS_PTRACE", "SYS_ADMIN", "DAC_OVERRIDE")
    first = container(pod, *command, mounts=mounts, process=able)
    _, log = await bench.run(pod, "first", first)
    await bench.start(pod, "c", container(pod, "sleep", "1000", mounts=mounts, process=able))
    read, write = os.pipe()
    running = execute(bench, pod, 1, (null, write, write), *command, process=able, linux=first.linux)
    await asyncio.wait_for(running.wait(), TIMEOUT_S)
    os.close(write)
    with open(read) as output:
        return [*log.splitlines(), *output.read().splitlines()]


@attack(
    "CVE-2019-5736",
    sentence="A container's program, and a command's, is a link to /proc/self/exe, so that crib's own interpreter runs "
    "there, which opens its file for writing or mounts it anew, with SYS_PTRACE and SYS_ADMIN",
    guard="every file of the interpreter is mapped through a read-only private mount, of which no other namespace can "
    "make a mount",
    control="test_5736_control_runs_its_own_file",
)
async def test_cve_2019_5736_the_interpreter_itself(bench: Bench, image: Image, null: int) -> None:
    lines = await run_itself(bench, image, null)
    assert len([line for line in lines if line.startswith("EXE") and "python" in line]) == 2, lines
    assert not {"WRITABLE", "REMOUNTED"} & set(lines)


async def test_5736_control_runs_its_own_file(weaken: Weaken, image: Image, null: int) -> None:
    lines = await run_itself(await weaken(weak.NO_READ_ONLY_WORLD), image, null)
    assert "WRITABLE" in lines


@requires("strace")
async def test_a_child_that_can_not_be_traced(bench: Bench, null: int, tmp_path: Path) -> None:
    """Somebody traces the monitor, or the kernel lets nobody be traced: the command fails, and nothing else."""
    pod = await bench.pod()
    able = holding("SYS_PTRACE")
    spec = container(pod, "sleep", "1000", process=able)
    await bench.start(pod, "c", spec)
    with tracing(pod.monitor_pid, tmp_path, "ptrace"):
        running = execute(bench, pod, 1, (null,) * 3, "true", process=able, linux=spec.linux)
        with pytest.raises(CribError, match="ptrace"):
            await asyncio.wait_for(running.wait(), TIMEOUT_S)
    running = execute(bench, pod, 2, (null,) * 3, "true", process=able, linux=spec.linux)
    assert (await asyncio.wait_for(running.wait(), TIMEOUT_S)).code == 0
    assert len(Path(f"/proc/{pod.monitor_pid}/task/{pod.monitor_pid}/children").read_text().split()) == 1


# CVE-2016-9962. The child is held by its own plan, by a step that waits for a reader of a fifo: right after it was
# born, and so for as long as the attacker may need. The attacker counts his rounds, so that he is known to have tried.

WATCH = """
round=0
while :; do
    for p in /proc/[0-9]*; do [ -e $p/root/$MARKER ] && { echo $p > /caught.new; mv /caught.new /caught; }; done
    round=$((round+1)); echo $round > /rounds.new; mv /rounds.new /rounds
done
"""


@asynccontextmanager
async def watching(
    bench: Bench, pod: Pod, marker: Path, *, with_pod_pid: bool, ptrace: bool = True
) -> AsyncIterator[Watch]:
    spec = container(
        pod, "sh", "-c", f"MARKER={marker}; {WATCH}", namespaces=shared(pod) if with_pod_pid else {},
        process=holding("SYS_PTRACE", "DAC_OVERRIDE") if ptrace else has(capable(*NO_PTRACE)),
        linux=lambda linux: linux,
    )  # fmt: skip
    await bench.start(pod, "c", spec)
    watch = Watch(bench.directory / f"upper{bench.count}")
    await watch.tried()
    assert not watch.caught
    yield watch
    await pod.kill("c")


def frozen(bench: Bench) -> bool:
    directory = bench.cgroups.join_files(f"{bench.cgroup}/c")
    for name in directory:
        base = os.path.dirname(name)
        if os.path.exists(f"{base}/freezer.state"):
            return "FROZEN" in Path(base, "freezer.state").read_text()
        if os.path.exists(f"{base}/cgroup.freeze"):
            return "frozen 1" in Path(base, "cgroup.events").read_text()
    raise AssertionError("no freezer")


async def exec_watched(
    bench: Bench, plans: Plans, null: int, tmp_path: Path, *, guarded: bool, ptrace: bool = True
) -> bool:
    """Exec into the attacker's container; whether he caught the child. In either case the exec itself works."""
    pod = await bench.pod()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    plans.execs(held_by(fifo))
    async with watching(bench, pod, tmp_path, with_pod_pid=False, ptrace=ptrace) as watch:
        spec = container(
            pod, "x", process=holding("SYS_PTRACE", "DAC_OVERRIDE") if ptrace else has(capable(*NO_PTRACE))
        )
        running = execute(
            bench, pod, 1, (null, null, null), "true", linux=spec.linux,
            process=lambda process: msgspec.structs.replace(process, capabilities=spec.process.capabilities),
        )  # fmt: skip
        if guarded:
            await until(lambda: at_the_fifo(pod.monitor_pid) > 0)
            assert frozen(bench) == ptrace
            if not ptrace:
                await watch.tried()
        else:
            await until(lambda: watch.caught)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        assert (await asyncio.wait_for(running.wait(), TIMEOUT_S)).code == 0
        os.close(reader)
        await watch.tried()  # it runs again
        assert not frozen(bench)
        return watch.caught


@attack(
    "CVE-2016-9962",
    sentence="A container with SYS_PTRACE goes through /proc/PID/root of an exec's child that is still crib's",
    guard="the container's cgroup is frozen until execve, at which the child is stopped and put into the cgroup",
    control="test_9962_control_not_frozen",
)
async def test_cve_2016_9962_exec(bench: Bench, plans: Plans, null: int, tmp_path: Path) -> None:
    assert not await exec_watched(bench, plans, null, tmp_path, guarded=True)


async def test_9962_control_not_frozen(
    bench: Bench, plans: Plans, null: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("runtime.execs", "runtime.plan.compile"):
        monkeypatch.setattr(f"{module}.watches", lambda *_: False)
    assert await exec_watched(bench, plans, null, tmp_path, guarded=False)


# The child has as few capabilities as it will have at the end: only that it is not dumpable keeps the attacker off.
LESS = caps.mask(tuple(f"CAP_{name}" for name in NO_PTRACE))
EQUAL: weak.Edits = (
    (
        "zygote/child.py",
        "        context = Context(fds)\n",
        f"        identity.caps.capset({LESS}, {LESS}, 0)\n        context = Context(fds)\n",
    ),
)
DUMPABLE: weak.Edits = (("zygote/zygote.py", "prctl(PR_SET_DUMPABLE, 0)", "pass"),)


@attack(
    "CVE-2016-9962",
    sentence="A container with every capability but SYS_PTRACE and PERFMON goes through /proc/PID/root of an exec's "
    "child whose capabilities are no more than its own",
    guard="crib's processes are not dumpable",
    control="test_9962_control_dumpable",
)
async def test_cve_2016_9962_without_ptrace(weaken: Weaken, plans: Plans, null: int, tmp_path: Path) -> None:
    bench = await weaken(EQUAL)
    assert not await exec_watched(bench, plans, null, tmp_path, guarded=True, ptrace=False)


async def test_9962_control_dumpable(weaken: Weaken, plans: Plans, null: int, tmp_path: Path) -> None:
    bench = await weaken(EQUAL, DUMPABLE)
    assert await exec_watched(bench, plans, null, tmp_path, guarded=False, ptrace=False)


@attack(
    "CVE-2016-9962",
    sentence="In a shared pid namespace a container with SYS_PTRACE goes through /proc/PID/root of another container's "
    "first process, which is still crib's",
    guard="the cgroups of the pod's containers with that capability are frozen until execve",
    control="test_9962_control_start_not_frozen",
)
async def test_cve_2016_9962_start_in_a_shared_pid_namespace(bench: Bench, plans: Plans, tmp_path: Path) -> None:
    assert not await start_watched(bench, plans, tmp_path, guarded=True)


async def test_9962_control_start_not_frozen(
    bench: Bench, plans: Plans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.plan.compile.watches", lambda *_: False)
    assert await start_watched(bench, plans, tmp_path, guarded=False)


async def start_watched(bench: Bench, plans: Plans, tmp_path: Path, *, guarded: bool) -> bool:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", pid=True))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with watching(bench, pod, tmp_path, with_pod_pid=True) as watch:
        plans.starts(held_by(fifo))
        starting = asyncio.ensure_future(bench.run(pod, "victim", container(pod, "true", namespaces=shared(pod))))
        if guarded:
            await until(lambda: at_the_fifo(pod.monitor_pid) > 0)
            assert frozen(bench)
        else:
            await until(lambda: watch.caught)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        exited, _ = await starting
        os.close(reader)
        assert exited.code == 0
        await watch.tried()
        assert not frozen(bench)
        return watch.caught


@attack(
    "CVE-2016-9962",
    sentence="A container with SYS_PTRACE goes through /proc/1/root of the init of a shared pid namespace, which is "
    "still "
    "on its way into its empty root",
    guard="the monitor starts no container there before the init has let go of everything",
    control="test_9962_control_init_not_waited_for",
)
async def test_cve_2016_9962_pod_init(bench: Bench, tmp_path: Path) -> None:
    assert not await init_watched(bench, tmp_path, guarded=True)


async def test_9962_control_init_not_waited_for(weaken: Weaken, tmp_path: Path) -> None:
    edits = (("zygote/podspace.py", "if self._init_ready >= 0:", "if False:"),)
    assert await init_watched(await weaken(edits), tmp_path, guarded=False)


async def init_watched(bench: Bench, tmp_path: Path, *, guarded: bool) -> bool:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", pid=True, init_cgroup=(str(fifo),)))
    spec = container(
        pod, "sh", "-c", f"MARKER={tmp_path}; {WATCH}", namespaces=shared(pod),
        process=holding("SYS_PTRACE", "DAC_OVERRIDE"),
    )  # fmt: skip
    starting = asyncio.ensure_future(bench.start(pod, "c", spec))
    if not guarded:
        await starting
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK) if guarded else -1
    await starting
    watch = Watch(bench.directory / f"upper{bench.count}")
    await watch.tried()
    if not guarded:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.close(reader)
    await pod.kill("c")
    return watch.caught

"""Plans lowered to system calls: an exec that comes again does by calls what it did by steps, and fails alike."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.engine import Cgroup, ExecStart, Pod, PodStart
from runtime.errors import CribError
from runtime.linux import caps
from runtime.linux.namespaces import CLONE
from runtime.plan import identity
from runtime.plan.compile import Maps
from runtime.plan.lower import Lowered
from runtime.plan.plan import Plan, Step
from runtime.spec import Capabilities, Linux, Process, Rlimit, Seccomp, SeccompRule, User
from runtime.zygote.child import become_by_calls
from tests.requires import requires
from tests.runtime.conftest import MAPS, POD_ID, TIMEOUT_S, Bench, container

pytestmark = requires("root", "overlay", "busybox")
STATUS = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status"
EVERYTHING = (1 << 64) - 1


def plan_of(script: str, *before: Step) -> Plan:
    """As an exec's, but for the mount namespace: this process's own is joined."""
    held = caps.last_cap()
    execute = identity.Execute(
        args=("sh", "-c", script),
        env=("PATH=/bin:/usr/bin",),
        uid=7,
        gid=8,
        groups=(8, 9),
        bounding=1 << caps.NUMBERS["CAP_KILL"],
        effective=0,
        permitted=0,
        inheritable=0,
        ambient=0,
        last_cap=held,
        umask=0o27,
        no_new_privileges=True,
        seccomp="",
        seccomp_flags=0,
        label="",
    )
    joined = identity.JoinProcess("container", int(CLONE.NEWUTS | CLONE.NEWIPC))
    find = identity.FindExecutable("sh", "/proc:/nonexistent:/bin")
    return (*before, joined, identity.WorkingDirectory("/usr/."), find, execute)


def by_calls(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bytes]:
    """What the program of a plan writes, and what is reported; running a step is a failure of the child."""
    lowered = Lowered(plan)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reading, writing = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    fds = {"stdin": null, "stdout": writing, "stderr": writing, "container": os.pidfd_open(os.getpid())}
    for step in plan:
        monkeypatch.setattr(type(step), "run", None)
    pid = os.fork()  # noqa: TID251 - as a monitor does
    if pid == 0:
        try:
            become_by_calls(lowered, fds, theirs)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    theirs.close()
    for fd in (writing, null, fds["container"]):
        os.close(fd)
    with open(reading, encoding="utf-8") as output, mine:
        written, report = output.read(), mine.recv(65536)
    os.waitpid(pid, 0)
    return written, report


def test_no_step_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    script = f"pwd; umask; id -u; id -G; ulimit -n; ls /proc/self/fd | wc -l; {STATUS}"
    before = (
        identity.Detach(""),
        identity.JoinCgroup(("/dev/null", "/dev/null")),
        identity.OomScoreAdj(int(Path("/proc/self/oom_score_adj").read_text())),
        identity.Rlimits(((resource.RLIMIT_NOFILE, 77, EVERYTHING if hard < 1 << 30 else hard),)),
    )
    written, report = by_calls(plan_of(script, *before), monkeypatch)
    assert report == b""
    bounding = 1 << caps.NUMBERS["CAP_KILL"]
    sets = {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": bounding, "CapAmb": 0}
    status = [*(f"{name}:\t{value:016x}" for name, value in sets.items()), "NoNewPrivs:\t1", "Seccomp:\t0"]
    assert written.splitlines() == ["/usr", "0027", "7", "8 9", "77", "4", *status]


def test_the_last_step_fails_by_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    *plan, execute = plan_of("true")
    execute.__dict__["ambient"] = 1 << caps.NUMBERS["CAP_CHOWN"]  # which isn't permitted
    written, report = by_calls((*plan, execute), monkeypatch)
    assert written == ""
    assert b"prctl: operation not permitted" in report


def test_a_plan_that_is_not_lowered() -> None:
    *plan, execute = plan_of("true", identity.OpenTerminal(0, 0, 0))
    with pytest.raises(NotImplementedError):
        Lowered((*plan, execute))
    with pytest.raises(NotImplementedError):
        Lowered((execute,))
    *plan, _, execute = plan_of("true")
    for name, path in (("true", ":" * 10_000), ("t" * 20_000, "/bin")):  # the monitor would keep all of that
        with pytest.raises(NotImplementedError):
            Lowered((*plan, identity.FindExecutable(name, path), execute))
    assert Lowered((*plan, identity.FindExecutable("/bin/true", ":" * 10_000), execute)).candidates == []


DENIED = Seccomp(
    default_action="SCMP_ACT_ALLOW",
    syscalls=(SeccompRule(names=("mkdir", "mkdirat"), action="SCMP_ACT_ERRNO", errno_ret=95),),
)
STATE = f"pwd; id; umask; ulimit -n; {STATUS}; ls /proc/self/fd; cat /proc/self/oom_score_adj; cat"
_KILL = ("CAP_KILL",)
CASES: dict[str, Callable[[Process], Process]] = {
    "state": lambda p: p,
    "a user": lambda p: _with(p, user=User(uid=7, gid=8, additional_gids=(8, 9), umask=0o77)),
    "capabilities": lambda p: _with(
        p, capabilities=Capabilities(bounding=_KILL, effective=_KILL, permitted=_KILL, inheritable=_KILL, ambient=_KILL)
    ),
    "new privileges": lambda p: _with(p, no_new_privileges=False),
    "limits": lambda p: _with(p, rlimits=(Rlimit(type="RLIMIT_NOFILE", soft=1 << 30, hard=1 << 30),), oom_score_adj=99),
    "few descriptors": lambda p: _with(p, rlimits=(Rlimit(type="RLIMIT_NOFILE", soft=10, hard=11),)),
    "a directory": lambda p: _with(p, cwd="/etc/../etc"),
    "a new directory": lambda p: _with(p, cwd="/made/anew"),
    "no directory": lambda p: _with(p, cwd="/bin/busybox"),
    "a descriptor's directory": lambda p: _with(p, cwd="/proc/self/fd/0"),
    "behind a directory": lambda p: _with(p, env=("PATH=/in/the/way:/bin",)),
    "nowhere": lambda p: _with(p, args=("no-such-program",)),
    "no file": lambda p: _with(p, args=("/no/such/program",)),
    "not executable": lambda p: _with(p, args=("/etc/plain",)),
    "not along the path": lambda p: _with(p, args=("plain",), env=("PATH=/etc",)),
    "a denied call": lambda p: _with(p, args=("mkdir", "/denied")),
}


def _with(process: Process, **changes: Any) -> Process:
    return msgspec.structs.replace(process, **changes)


async def _outcome(bench: Bench, pod: Pod, process: Process, linux: Linux, null: int, path: Path) -> str:
    cgroup = Cgroup.of(bench.cgroups, f"{bench.cgroup}/c")
    output = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        start = ExecStart(path.name, "c", process, linux, cgroup.join_files, cgroup.clone_dir)
        code = (await asyncio.wait_for(pod.exec(start, null, output, output).wait(), TIMEOUT_S)).code
    except CribError as error:
        return str(error)
    finally:
        os.close(output)
    return f"{path.read_text()}{code}"


@pytest.mark.asyncio
@pytest.mark.parametrize("maps", [(), MAPS], ids=["", "user namespace"])
async def test_the_same_by_steps_and_by_calls(bench: Bench, null: int, tmp_path: Path, maps: Maps) -> None:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", uids=maps, gids=maps))
    made = "mkdir -p /in/the/way/sh /etc; echo >/etc/plain; exec sleep 100"
    spec = container(pod, "sh", "-c", made)
    await bench.start(pod, "c", spec)
    assert spec.linux
    linux = msgspec.structs.replace(spec.linux, seccomp=DENIED)
    base = _with(spec.process, args=("sh", "-c", STATE))
    listed = _with(base, args=("ls", "/etc/plain"))
    while not (await _outcome(bench, pod, listed, linux, null, tmp_path / "listed")).endswith("\n0"):
        pass
    for name, change in CASES.items():
        outcomes = [
            await _outcome(bench, pod, change(base), linux, null, tmp_path / f"{name}{again}".replace(" ", "-"))
            for again in range(4)
        ]
        assert outcomes == [outcomes[0]] * 4, name
        assert outcomes[0].endswith("\n0") or name in ERRORS, (name, outcomes[0])
        for text in ERRORS.get(name, ()):
            assert text in outcomes[0]


ERRORS = {
    "no directory": ("enter /bin/busybox", "not a directory"),
    "a descriptor's directory": (),
    "nowhere": ("executable file not found in $PATH",),
    "no file": ('exec: "/no/such/program"', "no such file or directory"),
    "not executable": ('exec: "/etc/plain"', "permission denied"),
    "not along the path": ("executable file not found in $PATH", "permission denied"),
    "a denied call": ("not supported",),
}

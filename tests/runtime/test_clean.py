"""What a container and an exec inherit, field by field: from a cribd that was started with everything odd."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from runtime.cgroup import detect
from runtime.engine import Cgroup, Engine, ExecStart
from runtime.linux.probe import probe
from runtime.linux.process import PR_SET_TIMERSLACK, prctl
from runtime.spec import Capabilities, Linux, Mount, Process, Rlimit, User
from runtime.zygote.launch import interpreter, launch
from tests.requires import requires
from tests.runtime.conftest import POD_ID, TIMEOUT_S, Bench, container

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]

# /proc/self/status: what every field is, as a pattern; "" is anything (what the kernel counts, or the machine decides).
STATUS = {
    "Name": "cat", "Umask": "0022", "State": "R .*", "Tgid": r"\d+", "Ngid": "0", "Pid": r"\d+", "PPid": r"\d+",
    "TracerPid": "0", "Uid": r"7\t7\t7\t7", "Gid": r"8\t8\t8\t8", "FDSize": r"\d+", "Groups": "8 9 ",
    "NStgid": "", "NSpid": "", "NSpgid": "", "NSsid": "", "Kthread": "0",
    "VmPeak": "", "VmSize": "", "VmLck": "", "VmPin": "", "VmHWM": "", "VmRSS": "", "RssAnon": "", "RssFile": "",
    "RssShmem": "", "VmData": "", "VmStk": "", "VmExe": "", "VmLib": "", "VmPTE": "", "VmSwap": "",
    "HugetlbPages": "", "CoreDumping": "0", "THP_enabled": "", "untag_mask": "", "Threads": "1", "SigQ": "",
    "SigPnd": "0+", "ShdPnd": "0+", "SigBlk": "0+", "SigIgn": "0+", "SigCgt": "0+",
    "CapInh": "0+20", "CapPrm": "0+20", "CapEff": "0+20", "CapBnd": "0+21", "CapAmb": "0+20",
    "NoNewPrivs": "1", "Seccomp": "0", "Seccomp_filters": "0", "Speculation_Store_Bypass": "",
    "SpeculationIndirectBranch": "", "Cpus_allowed": "", "Cpus_allowed_list": "", "Mems_allowed": "",
    "Mems_allowed_list": "", "voluntary_ctxt_switches": "", "nonvoluntary_ctxt_switches": "",
    "x86_Thread_features": "", "x86_Thread_features_locked": "",
}  # fmt: skip
# Every other file that tells of inherited state.
FILES = {
    "oom_score_adj": "13",
    "coredump_filter": "0+33",
    "personality": "0+",
    "timerslack_ns": "50000",
    "cmdline": r"cat\0/proc/self/cmdline\0",
    "environ": r"PATH=/bin\0A=b\0",
}
LIMITS = {
    "Max open files": ("100", "200"),
    "Max core file size": ("0", "unlimited"),
    "Max processes": ("500", "600"),
    "Max nice priority": ("0", "0"),
}
COMMAND = (
    "cat /proc/self/status; for f in oom_score_adj coredump_filter personality timerslack_ns; do echo @$f; "
    "cat /proc/self/$f; done; echo @limits; cat /proc/self/limits; echo @stat; cat /proc/self/stat; echo @cwd; "
    "readlink /proc/self/cwd; echo @fd; ls /proc/self/fd; echo @cpus; grep Cpus_allowed_list /proc/self/status"
)


@contextlib.contextmanager
def odd() -> Iterator[None]:
    """This process as nobody would start cribd, for what it starts meanwhile."""
    cpus, mask = os.sched_getaffinity(0), os.umask(0o177)
    libc = ctypes.CDLL(None)
    ioprio_set = {"x86_64": 251, "aarch64": 30}[os.uname().machine]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        os.sched_setaffinity(0, {min(cpus)})
        os.setpriority(os.PRIO_PROCESS, 0, 7)
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except PermissionError:  # a kernel with groups of real-time processes, and this one's may have none
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        prctl(PR_SET_TIMERSLACK, 999)
        libc.personality(0x0040000)  # ADDR_NO_RANDOMIZE
        libc.syscall(ioprio_set, 1, 0, 2 << 13 | 7)  # best effort, lowest
        Path("/proc/self/coredump_filter").write_text("0x7f")
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[0] - 1, limit[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        Path("/proc/self/coredump_filter").write_text("0x33")
        libc.personality(0)
        libc.syscall(ioprio_set, 1, 0, 0)
        prctl(PR_SET_TIMERSLACK, 50_000)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        os.sched_setaffinity(0, cpus)
        os.umask(mask)


@pytest_asyncio.fixture
async def odd_bench(layer: Path, state_dir: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    state_dir.mkdir()
    cgroups, cgroup = detect(driver="cgroupfs"), f"/crib-test-{os.getpid()}-clean"
    own = f"{cgroup}/monitors"
    cgroups.create(own, None)
    with odd():  # real-time, too: the cpu controller of v1 may not take such a process
        zygote = launch(cgroups.join_files(own))
    assert zygote.process.pid in cgroups.procs(own)
    engine = Engine(state_dir, zygote, probe())
    bench = Bench(engine, layer, tmp_path, cgroups, cgroup)
    yield bench
    bench.cgroups.kill(bench.cgroup)
    await engine.stop_pod(POD_ID)
    engine.close()
    await bench.remove_cgroups()


def chosen(process: Process) -> Process:
    one = ("CAP_KILL",)
    return msgspec.structs.replace(
        process,
        user=User(uid=7, gid=8, additional_gids=(8, 9), umask=0o022),
        capabilities=Capabilities(
            bounding=("CAP_CHOWN", *one), effective=one, permitted=one, inheritable=one, ambient=one
        ),
        oom_score_adj=13,
        env=("PATH=/bin", "A=b"),
        rlimits=(
            Rlimit(type="RLIMIT_NOFILE", soft=100, hard=200),
            Rlimit(type="RLIMIT_CORE", soft=0, hard=2**64 - 1),
            Rlimit(type="RLIMIT_NPROC", soft=500, hard=600),
            Rlimit(type="RLIMIT_NICE", soft=0, hard=0),
        ),
    )


def check(text: str) -> None:
    status, *parts = re.split(r"^@(\w+)\n", text, flags=re.MULTILINE)
    files = dict(zip(parts[::2], parts[1::2], strict=True))
    found = {name: value for name, _, value in (line.partition(":\t") for line in status.splitlines())}
    wrong = {name: value for name, value in found.items() if name not in STATUS}
    wrong |= {n: found[n] for n, p in STATUS.items() if n in found and p and not re.fullmatch(p, found[n])}
    for name in ("oom_score_adj", "coredump_filter", "personality", "timerslack_ns"):
        if not re.fullmatch(FILES[name], files[name].strip()):
            wrong[name] = files[name]
    for name, pair in LIMITS.items():
        line = next(line for line in files["limits"].splitlines() if line.startswith(name))
        if tuple(line.removeprefix(name).split()[:2]) != pair:
            wrong[name] = line
    stat = files["stat"].rpartition(")")[2].split()
    for name, index, value in (("tty", 4, "0"), ("nice", 16, "0"), ("rt_priority", 37, "0"), ("policy", 38, "0")):
        if stat[index] != value:
            wrong[name] = stat[index]
    if files["cwd"] != "/\n":
        wrong["cwd"] = files["cwd"]
    if set(files["fd"].split()) != {"0", "1", "2", "3"}:  # 3 is the directory that ls reads
        wrong["fd"] = files["fd"]
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if "Cpus_allowed_list" in line)
    if files["cpus"].strip() != own:
        wrong["cpus"] = files["cpus"]
    assert wrong == {}


async def test_a_container_inherits_what_is_written_here(odd_bench: Bench) -> None:
    pod = await odd_bench.pod()
    _, log = await odd_bench.run(pod, "c", container(pod, "sh", "-c", COMMAND, process=chosen))
    check(log)
    for name in ("cmdline", "environ"):
        _, log = await odd_bench.run(pod, name, container(pod, "cat", f"/proc/self/{name}", process=chosen))
        assert re.fullmatch(FILES[name].replace("cmdline", name), log.rstrip("\n")), log


async def test_an_exec_inherits_what_is_written_here(odd_bench: Bench, null: int, tmp_path: Path) -> None:
    pod = await odd_bench.pod()
    await odd_bench.start(pod, "c", container(pod, "sleep", "100"))
    process = chosen(Process(cwd="/", user=User(uid=0, gid=0), args=("sh", "-c", COMMAND), no_new_privileges=True))
    cgroup = Cgroup.of(odd_bench.cgroups, f"{odd_bench.cgroup}/c")
    for how in ("by steps", "by steps again, or by calls", "by calls"):
        output = os.open(tmp_path / how, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)
        try:
            start = ExecStart(how, "c", process, Linux(), cgroup.join_files, cgroup.clone_dir)
            done = await asyncio.wait_for(pod.exec(start, null, output, output).wait(), TIMEOUT_S)
        finally:
            os.close(output)
        assert done.code == 0
        check((tmp_path / how).read_text())


# What no file of /proc tells, asked from inside: by a Python whose files are the host's.
PROBE = """
import ctypes, fcntl, json, os, resource, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
keyctl, ioprio_get, get_mempolicy = {"x86_64": (250, 252, 239), "aarch64": (219, 31, 236)}[os.uname().machine]
number = ctypes.c_int(-1)
def prctl(option):
    return libc.prctl(option, 0, 0, 0, 0)
def pointed(option):
    libc.prctl(option, ctypes.byref(number), 0, 0, 0)
    return number.value
mode = ctypes.c_int(-1)
found = {
    "parent_death_signal": pointed(2), "keep_capabilities": prctl(7), "secure_bits": prctl(27),
    "timer_slack_ns": prctl(30), "subreaper": pointed(37), "no_new_privileges": prctl(39), "thp_disabled": prctl(42),
    "scheduler": os.sched_getscheduler(0), "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "io_priority": libc.syscall(ioprio_get, 1, 0), "affinity": sorted(os.sched_getaffinity(0)),
    "memory_policy": mode.value if libc.syscall(get_mempolicy, ctypes.byref(mode), 0, 0, 0, 0) == 0 else 0,
    "session_leader": os.getsid(0) == os.getpid(), "group_leader": os.getpgid(0) == os.getpid(),
    "session_keyring": libc.syscall(keyctl, 0, -3, 0), "umask": os.umask(0), "directory": os.getcwd(),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "pending": sorted(signal.sigpending()),
    "timers": [signal.getitimer(which) for which in (0, 1, 2)],
    "non_blocking": [fd for fd in (0, 1, 2) if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK],
    "ids": [*os.getresuid(), *os.getresgid(), *sorted(os.getgroups())], "environment": {key: value for key, value in os.environ.items() if key != "LC_CTYPE"},  # which Python sets
    "limits": {name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in ("NOFILE", "CORE", "NPROC", "NICE")},
}
print(json.dumps(found))
"""  # noqa: E501
INVISIBLE = {
    "parent_death_signal": 0, "keep_capabilities": 0, "secure_bits": 0, "timer_slack_ns": 50_000, "subreaper": 0,
    "no_new_privileges": 1, "thp_disabled": 0, "scheduler": 0, "nice": 0, "io_priority": 0, "memory_policy": 0,
    "session_leader": True, "group_leader": True, "umask": 0o022, "directory": "/", "blocked": [], "pending": [],
    "timers": [[0.0, 0.0]] * 3, "non_blocking": [], "ids": [7, 7, 7, 8, 8, 8, 8, 9],
    "environment": {"PATH": "/bin", "A": "b"},
    "limits": {"NOFILE": [100, 200], "CORE": [0, -1], "NPROC": [500, 600], "NICE": [0, 0]},
}  # fmt: skip


def probe_command() -> tuple[str, ...]:
    return (interpreter(), "-I", "-S", "-c", PROBE)


def hosts_files() -> tuple[Mount, ...]:
    wanted = {"/usr", "/lib", "/lib64", os.path.dirname(os.path.dirname(interpreter()))}
    options = ("rbind", "ro", "rprivate")
    paths = sorted(path for path in wanted if os.path.exists(path))
    return tuple(Mount(destination=path, type="bind", source=path, options=options) for path in paths)


def check_invisible(text: str) -> int:
    """Compare with the table; the session keyring."""
    found = json.loads(text)
    keyring = found.pop("session_keyring")
    assert found.pop("affinity") == sorted(os.sched_getaffinity(0))
    assert found == INVISIBLE
    return int(keyring)


async def test_what_no_file_tells_of(odd_bench: Bench, null: int, tmp_path: Path) -> None:
    pod = await odd_bench.pod()
    _, log = await odd_bench.run(pod, "probe", container(pod, *probe_command(), mounts=hosts_files(), process=chosen))
    keyrings = [check_invisible(log)]
    await odd_bench.start(pod, "c", container(pod, "sleep", "100", mounts=hosts_files()))
    process = Process(cwd="/", user=User(uid=0, gid=0), args=probe_command(), no_new_privileges=True)
    cgroup = Cgroup.of(odd_bench.cgroups, f"{odd_bench.cgroup}/c")
    for how in ("by steps", "by steps again, or by calls", "by calls"):
        output = os.open(tmp_path / how, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)
        try:
            start = ExecStart(how, "c", chosen(process), Linux(), cgroup.join_files, cgroup.clone_dir)
            assert (await asyncio.wait_for(pod.exec(start, null, output, output).wait(), TIMEOUT_S)).code == 0
        finally:
            os.close(output)
        keyrings.append(check_invisible((tmp_path / how).read_text()))
    keyctl = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    own = ctypes.CDLL(None).syscall(keyctl, 0, -3, 0)
    if keyrings[0] > 0:  # a kernel with keyrings
        assert len({*keyrings, own}) == 5

"""Every limit is enforced by the kernel and not only written."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.cgroup import files
from runtime.cgroup.stats import Cpu
from runtime.spec import CPU, BlockIO, DeviceCgroup, Memory, Pids, Resources, ThrottleDevice
from tests.requires import requires
from tests.runtime.cgroup.conftest import Place, wait_until_dead

pytestmark = requires("root")

MIB = 1 << 20
DENY_ALL = DeviceCgroup(allow=False, type="a", access="rwm")

# Uses so much processor time, however long that takes, says so and goes on.
BURN = """
import time
def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
burn(0.05)
print("burns", flush=True)
burn({seconds})
print("done", flush=True)
burn(3600)
"""


def test_a_fork_bomb_stops_at_the_pids_limit(place: Place) -> None:
    path = place.make("bomb", limits=Resources(pids=Pids(limit=5)))
    bomb = place.run(
        path,
        """
        import os, signal
        forked = 0
        try:
            while forked < 50:
                if os.fork() == 0:
                    signal.pause()
                forked += 1
        except BlockingIOError:
            pass
        print(forked, flush=True)
        signal.pause()
        """,
    )
    bomb.go()
    assert bomb.line() == "4"
    assert len(place.cgroups.procs(path)) == 5
    pids = place.cgroups.stats(path).pids
    assert pids is not None
    assert (pids.current, pids.limit) == (5, 5)
    place.cgroups.kill(path)
    assert bomb.wait() == -signal.SIGKILL


def test_a_memory_hog_is_killed_and_counted(place: Place) -> None:
    path = place.make("hog", limits=Resources(memory=Memory(limit=32 * MIB, swap=32 * MIB)))
    assert place.oom_kills(path) == 0
    hog = place.run(path, "hoard = bytearray(b'x') * (128 << 20); print('survived')")
    hog.go()
    assert hog.wait() == -signal.SIGKILL
    assert place.oom_kills(path) == 1
    assert place.cgroups.stats(path).oom_kills == 1


def test_memory_within_the_limit_is_had_and_shows(place: Place) -> None:
    path = place.make("tenant", limits=Resources(memory=Memory(limit=96 * MIB, swap=96 * MIB)))
    tenant = place.run(path, "hoard = bytearray(b'x') * (32 << 20); print('has', flush=True); sys.stdin.readline()")
    tenant.go()
    assert tenant.line() == "has"
    stats = place.cgroups.stats(path)
    assert stats.memory is not None
    assert stats.memory.limit == 96 * MIB
    assert 32 * MIB <= stats.memory.working_set <= stats.memory.usage <= 96 * MIB
    assert stats.memory.rss is not None
    assert stats.memory.rss >= 32 * MIB
    assert stats.memory.available == stats.memory.limit - stats.memory.working_set
    assert stats.memory.page_faults
    assert stats.oom_kills == 0
    if stats.swap is not None:
        assert (stats.swap.usage, stats.swap.limit, stats.swap.available) == (0, 0, 0)


def _cpu(place: Place, path: str) -> Cpu:
    cpu = place.cgroups.stats(path).cpu
    assert cpu is not None
    return cpu


def test_a_cpu_bound_process_is_throttled_to_its_quota(place: Place) -> None:
    quota_ns, period_ns = 5_000_000, 100_000_000
    path = place.make("burner", limits=Resources(cpu=CPU(quota=quota_ns // 1000, period=period_ns // 1000)))
    burner = place.run(path, BURN.format(seconds=0.1))
    burner.go()
    assert burner.line() == "burns"
    before, began = _cpu(place, path), time.monotonic_ns()
    assert burner.line() == "done"
    after, ended = _cpu(place, path), time.monotonic_ns()
    periods = after.periods - before.periods  # type: ignore[operator]
    assert after.throttled_periods > before.throttled_periods  # type: ignore[operator]
    assert after.throttled_ns > before.throttled_ns  # type: ignore[operator]
    # A processor takes 5 ms of the quota at once, and overdraws it by a tick.
    assert after.usage_ns - before.usage_ns < (periods + 2) * quota_ns * 2
    assert periods - 1 <= (ended - began) / period_ns, "the periods are as long as asked"


def test_shares_divide_a_core(place: Place, needs_controller: Callable[[str], None]) -> None:
    needs_controller("cpuset")
    paths = [
        place.make(name, limits=Resources(cpu=CPU(shares=shares, cpus="0")))
        for name, shares in (("small", 1024), ("large", 3072))
    ]
    small, large = programs = [place.run(path, BURN.format(seconds=1.5)) for path in paths]
    for program in programs:
        program.go()
    for program in programs:
        assert program.line() == "burns"
    before = [_cpu(place, path).usage_ns for path in paths]
    assert large.line() == "done"
    used_small, used_large = (_cpu(place, path).usage_ns - was for path, was in zip(paths, before, strict=True))
    assert small.silent_for(0)
    # On v2 the kubelet's new curve makes 100 and 242 of 1024 and 3072 shares.
    assert 1.6 < used_large / used_small < 4.5


def test_a_cpuset_pins(place: Place, needs_controller: Callable[[str], None]) -> None:
    needs_controller("cpuset")
    path = place.make("pinned", limits=Resources(cpu=CPU(cpus="0", mems="0")))
    assert place.run(path, "import os; print(os.sched_getaffinity(0))").output().strip() == "{0}"


def test_without_a_cpuset_every_cpu_is_there(place: Place) -> None:
    path = place.make("free", limits=Resources(cpu=CPU(shares=512)))
    seen = place.run(path, "import os; print(len(os.sched_getaffinity(0)))").output()
    assert int(seen) == len(os.sched_getaffinity(0))


DEVICES = """
import os, stat
def attempt(what, action):
    try:
        action()
        print(what, "ok")
    except PermissionError:
        print(what, "denied")
def knot(kind, major, minor):
    os.mknod({node!r}, kind | 0o600, os.makedev(major, minor))
    os.unlink({node!r})
attempt("null", lambda: open("/dev/null", "wb").close())
attempt("zero-read", lambda: open("/dev/zero", "rb").close())
attempt("zero-write", lambda: open("/dev/zero", "wb").close())
attempt("full", lambda: open("/dev/full", "rb").close())
attempt("mknod-char", lambda: knot(stat.S_IFCHR, 1, 7))
attempt("mknod-block", lambda: knot(stat.S_IFBLK, 7, 99))
"""


def _attempts(place: Place, path: str, directory: Path) -> dict[str, str]:
    output = place.run(path, DEVICES.format(node=str(directory / "node"))).output()
    return dict(line.split() for line in output.splitlines())


def test_device_rules_deny_open_and_mknod(place: Place, run_dir: Path) -> None:
    rules = (
        DENY_ALL,
        DeviceCgroup(allow=True, type="c", major=1, minor=3, access="rwm"),
        DeviceCgroup(allow=True, type="c", major=1, minor=5, access="r"),
        DeviceCgroup(allow=True, type="c", access="m"),
    )
    path = place.make("devices", limits=Resources(devices=rules))
    assert _attempts(place, path, run_dir) == {
        "null": "ok",
        "zero-read": "ok",
        "zero-write": "denied",
        "full": "denied",
        "mknod-char": "ok",
        "mknod-block": "denied",
    }


def test_all_devices_but_some(place: Place, run_dir: Path) -> None:
    rules = (
        DeviceCgroup(allow=True, type="a", access="rwm"),
        DeviceCgroup(allow=False, type="c", major=1, minor=7, access="rw"),
        DeviceCgroup(allow=False, type="b", access="m"),
    )
    path = place.make("devices", limits=Resources(devices=rules))
    assert _attempts(place, path, run_dir) == {
        "null": "ok",
        "zero-read": "ok",
        "zero-write": "ok",
        "full": "denied",
        "mknod-char": "ok",
        "mknod-block": "denied",
    }


def test_device_rules_change_under_a_running_process(place: Place) -> None:
    null = DeviceCgroup(allow=True, type="c", major=1, minor=3, access="rw")
    full = DeviceCgroup(allow=True, type="c", major=1, minor=7, access="rw")
    path = place.make("devices", limits=Resources(devices=(DENY_ALL, null)))
    program = place.run(
        path,
        """
        for line in sys.stdin:
            try:
                open(line.strip(), "rb").close()
                print("ok", flush=True)
            except PermissionError:
                print("denied", flush=True)
        """,
    )
    program.go()

    def answers() -> tuple[str, str]:
        program.tell("/dev/null")
        program.tell("/dev/full")
        return program.line(), program.line()

    assert answers() == ("ok", "denied")
    place.cgroups.update(path, Resources(devices=(DENY_ALL, null, full)))
    assert answers() == ("ok", "ok")
    place.cgroups.update(path, Resources(devices=(DENY_ALL, full)))
    assert answers() == ("denied", "ok")


def test_a_frozen_process_does_not_run(place: Place) -> None:
    path = place.make("ice")
    echo = place.run(path, "for line in sys.stdin: print(line, end='', flush=True)")
    echo.go()
    echo.tell("one")
    assert echo.line() == "one"
    place.cgroups.freeze(path)
    echo.tell("two")
    assert echo.silent_for(0.3)
    place.cgroups.thaw(path)
    assert echo.line() == "two"


@pytest.mark.parametrize("frozen", ["", "pod", "pod tree", "pod tree nested"])
def test_kill_ends_a_whole_tree(place: Place, frozen: str) -> None:
    path = place.make("pod", "tree")
    root = place.run(
        path,
        """
        import os, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    signal.pause()
                signal.pause()
        print("grown", flush=True)
        signal.pause()
        """,
    )
    root.go()
    assert root.line() == "grown"
    below = place.run_nested(path, "import signal; signal.pause()")
    watched = {pid: os.pidfd_open(pid) for pid in place.cgroups.procs(path)}
    assert {root.pid, below.pid} <= watched.keys()
    assert len(watched) >= 6
    names = ("pod", "tree", "nested")
    for name in frozen.split():
        place.cgroups.freeze(place.path(*names[: names.index(name) + 1]))
    place.cgroups.kill(path)
    assert root.wait() == below.wait() == -signal.SIGKILL
    for pidfd in watched.values():
        assert _readable(pidfd)
        os.close(pidfd)
    if frozen:
        place.cgroups.thaw(place.path("pod"))


def _readable(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 30)[0])


def test_kill_of_what_forks_all_the_time(place: Place) -> None:
    path = place.make("rabbits", limits=Resources(pids=Pids(limit=60)))
    rabbits = place.run(
        path,
        """
        import os, signal
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("breeding", flush=True)
        while True:
            try:
                if os.fork() == 0 and os.fork() == 0:
                    os._exit(0)
            except BlockingIOError:
                os._exit(0) if os.getppid() == 1 else None
        """,
    )
    rabbits.go()
    assert rabbits.line() == "breeding"
    place.cgroups.kill(path)
    assert rabbits.wait() == -signal.SIGKILL
    wait_until_dead(place.cgroups.procs(path))
    assert place.cgroups.remove(path)


def test_io_is_throttled(place: Place, needs_controller: Callable[[str], None], tmp_path: Path) -> None:
    needs_controller("blkio" if place.cgroups.version == 1 else "io")
    device = tmp_path.stat().st_dev
    if not os.path.exists(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"):
        pytest.skip(f"{tmp_path} is not on a block device")
    rate = ThrottleDevice(major=os.major(device), minor=os.minor(device), rate=4 * MIB)
    try:
        path = place.make("slow", limits=Resources(block_io=BlockIO(throttle_write_bps_device=(rate,))))
    except Exception as error:
        if not os.path.exists(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue"):
            pytest.skip(f"a partition can't be throttled: {error}")
        raise
    writer = place.run(
        path,
        f"""
        import mmap, os, time
        page = mmap.mmap(-1, 1 << 20)
        fd = os.open({str(tmp_path / "file")!r}, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        start = time.monotonic()
        for _ in range(6):
            os.write(fd, page)
        print(time.monotonic() - start)
        """,
    )
    assert float(writer.output()) > 1.0  # unthrottled some hundredths
    io = place.cgroups.stats(path).io
    assert io is not None
    written = [d.write_bytes for d in io.devices if (d.major, d.minor) == (rate.major, rate.minor)]
    assert written == [6 * MIB]


def test_joining_by_the_file_primitive(place: Place) -> None:
    path = place.make("joined")
    program = place.run(path, "import signal; signal.pause()")
    assert place.cgroups.procs(path) == (program.pid,)
    assert files.procs(place.cgroups.join_files(path)[0].rpartition("/")[0]) == [program.pid]

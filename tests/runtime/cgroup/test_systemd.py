"""Under systemd: what it is told, what it leaves alone, and evidence that outlives the processes."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from runtime.cgroup import units, v2
from runtime.cgroup.dbus import PRIVATE_SOCKET, SYSTEM_SOCKET, Connection, Refused
from runtime.cgroup.guard import Guard
from runtime.errors import DeadlineExceeded, InvalidSpec, Unavailable
from runtime.linux import inotify
from runtime.spec import CPU, BlockIO, DeviceCgroup, HugepageLimit, Memory, Pids, Resources, ThrottleDevice
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.cgroup.conftest import DEADLINE_S, Place

MIB = 1 << 20
under_systemd = pytest.mark.parametrize("place", ["systemd"], indirect=True)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("system.slice", "/system.slice"),
        ("kubepods-burstable-pod1_2.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"),
    ],
)
def test_where_a_slice_is(name: str, path: str) -> None:
    assert units.slice_path(name) == path
    assert units.slice_name(path) == name


@pytest.mark.parametrize(
    "name", ["pods", "/pods", "-.slice", "a--b.slice", "-a.slice", "a/b.slice", ".slice", "a b.slice"]
)
def test_what_is_no_slice(name: str) -> None:
    with pytest.raises(InvalidSpec):
        units.slice_path(name)


def test_a_name_below_a_slice() -> None:
    assert units.slice_below("a-b.slice", ["c"]) == units.slice_below("/a.slice/a-b.slice", ["c"])
    assert units.slice_below("a.slice", ["b", "c"]) == "/a.slice/a-b.slice/a-b-c.slice"
    assert units.slice_below("a.slice", ["b-c"]) == "/a.slice/a-b\\x2dc.slice"
    with pytest.raises(InvalidSpec):
        units.slice_below("/elsewhere/a.slice", ["b"])
    with pytest.raises(InvalidSpec):
        units.slice_name("/a-b.slice")


def test_limits_as_properties() -> None:
    limits = Resources(
        cpu=CPU(shares=1024, quota=12_345, period=100_000, cpus="0-2,9", mems="0"),
        memory=Memory(limit=64 * MIB, swap=96 * MIB, reservation=MIB),
        pids=Pids(limit=-1),
        block_io=BlockIO(weight=100, throttle_read_bps_device=(ThrottleDevice(major=8, minor=0, rate=7),)),
        hugepage_limits=(HugepageLimit(page_size="2MB", limit=0),),
        unified={"memory.high": "max", "memory.oom.group": "1"},
    )
    assert dict(units.properties(v2.writes(limits))) == {
        "CPUWeight": ("t", 100),
        "CPUQuotaPerSecUSec": ("t", 130_000),
        "CPUQuotaPeriodUSec": ("t", 100_000),
        "AllowedCPUs": ("ay", b"\x07\x02"),
        "AllowedMemoryNodes": ("ay", b"\x01"),
        "MemoryMax": ("t", 64 * MIB),
        "MemorySwapMax": ("t", 32 * MIB),
        "MemoryLow": ("t", MIB),
        "MemoryHigh": ("t", 2**64 - 1),
        "TasksMax": ("t", 2**64 - 1),
        "IOWeight": ("t", 910),
        "IOReadBandwidthMax": ("a(st)", [("/dev/block/8:0", 7)]),
    }


@pytest.mark.parametrize("cpus", ["zero", "3-1", "0-99999999", "-1", "1,"])
def test_nonsense_for_a_property(cpus: str) -> None:
    with pytest.raises(InvalidSpec, match=r"cpu\.cpus"):
        units.properties(v2.writes(Resources(cpu=CPU(cpus=cpus))))


def test_systemd_gone(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="can't be reached"):
        Connection(sockets=(str(tmp_path / "none"),))


def test_systemd_silent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with pytest.raises(DeadlineExceeded, match="has not answered within"):
            Connection(timeout_s=0.2, sockets=(str(tmp_path / "s"),))


@pytest.mark.parametrize("answer", [b"", b"REJECTED EXTERNAL\r\n", b"OK 1234\r\n"])
def test_systemd_that_ends_the_conversation(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()

        def serve() -> None:
            connected, _ = server.accept()
            with connected:
                connected.recv(4096)
                connected.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(Unavailable), Connection(timeout_s=10, sockets=(str(tmp_path / "s"),)) as connection:
            connection.settle()
        thread.join()


@requires("root", "systemd")
@pytest.mark.parametrize("path", [PRIVATE_SOCKET, SYSTEM_SOCKET])
def test_both_ways_to_systemd(path: str) -> None:
    if not Path(path).exists():
        pytest.skip(f"no {path} here")
    with Connection(sockets=(path,)) as systemd:
        name = "cribtestways.slice"
        assert systemd.job("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "replace", [], []) == "done"
        assert systemd.job("StopUnit", "ss", name, "replace") == "done"
        with pytest.raises(Refused) as caught:
            systemd.call("GetUnit", "s", "no-such-thing.slice")
        assert caught.value.name == "NoSuchUnit"


def _systemctl(*arguments: str) -> str:
    return subprocess.run(
        ["systemctl", *arguments], check=True, capture_output=True, text=True, timeout=scaled(60)
    ).stdout


def _files(path: str) -> dict[str, str]:
    names = ("cpu.weight", "cpu.max", "memory.max", "memory.high", "memory.swap.max", "pids.max")
    found = {name: Path(f"/sys/fs/cgroup{path}/{name}") for name in names}
    return {name: file.read_text().strip() for name, file in found.items() if file.exists()}


def _wait_for(file: Path, value: str) -> None:
    watching = inotify.inotify_init()
    inotify.add_watch(watching, str(file), inotify.IN_MODIFY)
    while file.read_text().strip() != value:
        assert select.select([watching], [], [], DEADLINE_S)[0], f"{file} is still {file.read_text()}"
        list(inotify.read_events(watching))
    os.close(watching)


@requires("root", "systemd")
@under_systemd
def test_what_is_kept_is_found_again_by_the_next(place: Place) -> None:
    path = place.make("kept", limits=Resources(memory=Memory(limit=64 * MIB)))
    directory = Path(f"/sys/fs/cgroup{path}")
    limit, group = directory / "memory.high", directory / "memory.oom.group"
    limit.write_text(str(48 * MIB))
    first = Guard()
    first.keep(str(directory), ["memory.high", "memory.oom.group", "memory.nonsense"])
    limit.write_text("max")
    _wait_for(limit, str(48 * MIB))
    first.release(str(directory), ["memory.high"])
    limit.write_text("max")
    group.write_text("1")
    _wait_for(group, "0")  # handled in their order
    assert limit.read_text() == "max\n"
    second = Guard()
    second.resume("/sys/fs/cgroup")
    assert limit.read_text() == f"{48 * MIB}\n"
    limit.write_text("max")
    _wait_for(limit, str(48 * MIB))


@requires("root", "systemd")
@under_systemd
def test_limits_and_devices_survive_systemd(place: Place) -> None:
    """Its reload, its executing itself anew, units that come and go beside: it rewrites what it knows each time."""
    limits = Resources(
        cpu=CPU(shares=512, quota=30_000, period=100_000),
        memory=Memory(limit=64 * MIB, swap=64 * MIB),
        pids=Pids(limit=33),
        unified={"memory.high": str(48 * MIB), "memory.oom.group": "1"},
        devices=(
            DeviceCgroup(allow=False, type="a", access="rwm"),
            DeviceCgroup(allow=True, type="c", major=1, minor=3),
        ),
    )
    path = place.make("steady", limits=limits)
    place.cgroups.update(path, Resources(memory=Memory(limit=80 * MIB, swap=80 * MIB)))
    program = place.run(
        path,
        """
        for line in sys.stdin:
            for device in "/dev/null", "/dev/full":
                try:
                    open(device, "rb").close()
                    print("ok", flush=True)
                except PermissionError:
                    print("denied", flush=True)
        """,
    )
    program.go()
    before = _files(path)
    assert before["memory.max"] == str(80 * MIB)
    for disturb in (
        ("daemon-reload",),
        ("set-property", "--runtime", place.root, "TasksMax=500"),
        ("daemon-reexec",),
        ("daemon-reload",),
    ):
        _systemctl(*disturb)
        other = place.make("other", limits=Resources(memory=Memory(limit=32 * MIB), cpu=CPU(cpus="")))
        assert _files(path) == before, disturb
        _wait_for(Path(f"/sys/fs/cgroup{path}/memory.oom.group"), "1")
        program.tell("")
        assert (program.line(), program.line()) == ("ok", "denied")
        assert place.cgroups.remove(other)
    assert place.cgroups.procs(path) == (program.pid,)


@requires("root", "systemd")
@under_systemd
def test_every_oom_kill_is_seen(place: Place) -> None:
    """The last process is gone and systemd knows it: the figure is still there."""
    for number in range(20):
        path = place.make(f"hog{number}", limits=Resources(memory=Memory(limit=16 * MIB, swap=16 * MIB)))
        hog = place.run(path, "hoard = bytearray(b'x') * (64 << 20)")
        hog.go()
        assert hog.wait() == -signal.SIGKILL
        if number % 5 == 0:
            _systemctl("daemon-reload")
        assert place.oom_kills(path) == 1
        assert place.cgroups.remove(path)


@requires("root", "systemd")
@under_systemd
def test_a_slice_goes_with_its_cgroup(place: Place) -> None:
    path = place.make("pod", "container", limits=Resources(pids=Pids(limit=5)))
    name = units.slice_name(path)
    assert _systemctl("show", "-P", "ActiveState", name).strip() == "active"
    assert _systemctl("show", "-P", "TasksMax", name).strip() == "5"
    assert place.cgroups.remove(path)
    assert _systemctl("show", "-P", "ActiveState", name).strip() == "inactive"
    assert place.cgroups.remove(place.path("pod"))
    assert not place.cgroups.exists(place.path("pod"))

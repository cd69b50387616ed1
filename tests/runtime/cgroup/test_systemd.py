"""Under systemd: what it is told, what it leaves alone, and evidence that outlives the processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from runtime.cgroup import systemd, units
from runtime.cgroup.dbus import PRIVATE_SOCKET, SYSTEM_SOCKET, Connection, Refused
from runtime.errors import DeadlineExceeded, InvalidSpec, Unavailable
from runtime.spec import CPU, DeviceCgroup, Memory, Pids, Resources
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.cgroup.conftest import Place, Program

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
    assert units.split(path) == (name, path)


@pytest.mark.parametrize(
    "name", ["pods", "/pods", "-.slice", "a--b.slice", "-a.slice", "a/b.slice", ".slice", "a b.slice"]
)
def test_what_is_no_slice(name: str) -> None:
    with pytest.raises(InvalidSpec):
        units.slice_path(name)


def test_a_name_below_a_slice() -> None:
    assert units.below("a-b.slice", ["c"]) == units.below("/a.slice/a-b.slice", ["c"]) == "/a.slice/a-b.slice/c"
    assert units.below("a.slice", ["b", "c-d"]) == "/a.slice/b/c-d"
    assert units.keeper("a-b.slice") == "a-b-crib.slice"
    with pytest.raises(InvalidSpec):
        units.below("/elsewhere/a.slice", ["b"])


def test_a_path_is_a_slice_and_what_is_in_it() -> None:
    assert units.split("/a.slice/a-b.slice/c/d") == ("a-b.slice", "/a.slice/a-b.slice")
    assert units.split("/a.slice") == ("a.slice", "/a.slice")
    for path in ("/a-b.slice/c", "/a", "/a/b.slice", "/a.slice/b.slice"):
        with pytest.raises(InvalidSpec):
            units.split(path)


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
            connection.call("GetUnit", "s", "a.slice")
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
    names = (
        *("cpu.weight", "cpu.max", "cpuset.cpus", "pids.max", "cgroup.subtree_control", "cgroup.controllers"),
        *("memory.max", "memory.high", "memory.swap.max", "memory.oom.group"),
    )
    found = {name: Path(f"/sys/fs/cgroup{path}/{name}") for name in names}
    return {name: file.read_text().strip() for name, file in found.items() if file.exists()}


@requires("root", "systemd")
@under_systemd
def test_a_container_and_what_it_made_itself_survive_systemd(place: Place) -> None:
    """Its reload, its executing itself anew, units that come and go beside."""
    limits = Resources(
        cpu=CPU(shares=512, quota=12_345, period=100_000, cpus="0" if "cpuset" in place.cgroups.controllers else ""),
        memory=Memory(limit=64 * MIB, swap=64 * MIB),
        pids=Pids(limit=33),
        unified={"memory.high": str(48 * MIB), "memory.oom.group": "1"},
        devices=(
            DeviceCgroup(allow=False, type="a", access="rwm"),
            DeviceCgroup(allow=True, type="c", major=1, minor=3),
        ),
    )
    path = place.make("pod", "steady", limits=limits)
    place.cgroups.update(path, Resources(memory=Memory(limit=80 * MIB, swap=80 * MIB)))
    container = Path(f"/sys/fs/cgroup{path}")
    within = container / "own"
    within.mkdir()
    (container / "cgroup.subtree_control").write_text("+memory +pids +cpu")
    (within / "memory.max").write_text(str(40 * MIB))
    (within / "pids.max").write_text("7")
    program = Program(
        (f"{within}/cgroup.procs",),
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
    place.programs.append(program)
    program.go()
    before, before_within = _files(path), _files(f"{path}/own")
    assert before["memory.max"] == str(80 * MIB)
    assert before["cpu.max"] == "12345 100000"
    assert before_within["memory.max"] == str(40 * MIB)
    for disturb in (
        ("daemon-reload",),
        ("set-property", "--runtime", place.root, "TasksMax=500"),
        ("daemon-reexec",),
        ("set-property", "--runtime", place.root, "MemoryMax=1G"),
        ("daemon-reload",),
    ):
        _systemctl(*disturb)
        other = place.make("pod", "other", limits=Resources(memory=Memory(limit=32 * MIB), pids=Pids(limit=5)))
        neighbour = place.cgroups.create(place.cgroups.join_path(f"{place.root.removesuffix('.slice')}-x.slice"), None)
        assert (_files(path), _files(f"{path}/own")) == (before, before_within), disturb
        program.tell("")
        assert (program.line(), program.line()) == ("ok", "denied")
        assert place.cgroups.remove(other)
        assert place.cgroups.remove(neighbour[-1])
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
def test_the_keeper_comes_with_the_first_and_goes_with_the_last(place: Place) -> None:
    keeper = units.keeper(place.root)
    first = place.make("first", limits=Resources(pids=Pids(limit=5)))
    assert _systemctl("show", "-P", "ActiveState", keeper).strip() == "active"
    second = place.make("second", "nested")
    assert place.cgroups.remove(first)
    assert _systemctl("show", "-P", "ActiveState", keeper).strip() == "active"
    assert place.cgroups.remove(second)
    assert place.cgroups.remove(place.path("second"))
    assert _systemctl("show", "-P", "ActiveState", keeper).strip() == "inactive"
    assert not place.cgroups.exists(units.slice_path(keeper))
    assert place.cgroups.exists(place.parent)
    with pytest.raises(InvalidSpec):
        place.make("third", limits=Resources(pids=Pids(limit=2**62)))
    assert not place.cgroups.exists(units.slice_path(keeper))
    assert place.cgroups.remove(place.parent)
    assert _systemctl("show", "-P", "ActiveState", place.root).strip() == "inactive"


@requires("root", "systemd")
@under_systemd
def test_the_owner_of_a_slice_may_stop_and_limit_it(place: Place) -> None:
    """As the kubelet does with its pods' slices."""
    path = place.make("container", limits=Resources(pids=Pids(limit=5)))
    _systemctl("set-property", "--runtime", place.root, "CPUWeight=37", "MemoryMax=256M")
    assert _files(path)["pids.max"] == "5"
    for action in (place.cgroups.update, place.cgroups.create):
        with pytest.raises(InvalidSpec, match="its owner's"):
            action(place.parent, Resources(pids=Pids(limit=5)))
    place.cgroups.kill(path)
    _systemctl("stop", place.root)
    assert _systemctl("show", "-P", "ActiveState", units.keeper(place.root)).strip() == "inactive"
    assert place.cgroups.remove(path)
    assert place.cgroups.create(path, Resources(pids=Pids(limit=6)))[-1] == path
    assert _files(path)["pids.max"] == "6"


@requires("root", "systemd")
@under_systemd
@pytest.mark.parametrize("silent", [False, True])
def test_systemd_gone_or_slow(place: Place, silent: bool, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new pod gets an error in time and leaves nothing; what is there goes on without it."""
    path = place.make("there", limits=Resources(pids=Pids(limit=5)))
    monkeypatch.setattr(systemd, "Connection", partial(Connection, timeout_s=0.5))
    with socket.socket(socket.AF_UNIX) as server, ExitStack() as hidden:
        server.bind(str(run_dir / "s"))
        if silent:
            server.listen()
        for path_of_socket in (PRIVATE_SOCKET, SYSTEM_SOCKET):
            subprocess.run(["mount", "--bind", run_dir / "s", path_of_socket], check=True)
            hidden.callback(subprocess.run, ["umount", path_of_socket], check=True)
        other = place.cgroups.join_path(f"{place.root.removesuffix('.slice')}-pod.slice", "c")
        error = DeadlineExceeded if silent else Unavailable
        with pytest.raises(error, match="systemd"):
            place.cgroups.create(other, Resources(pids=Pids(limit=5)))
        assert not place.cgroups.exists(other.rpartition("/")[0])
        place.cgroups.update(path, Resources(pids=Pids(limit=6)))
        assert _files(path)["pids.max"] == "6"
        second = place.make("second", limits=Resources(pids=Pids(limit=7)))
        assert place.cgroups.remove(second)
    place.cgroups.create(other, Resources(pids=Pids(limit=5)))

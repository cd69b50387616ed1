"""Cgroups are made as a whole or not at all, changed likewise, and cope with what others do to them."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.cgroup import files
from runtime.errors import InvalidSpec, NotFound, WrongState
from runtime.spec import CPU, HugepageLimit, Memory, Pids, Resources
from tests.requires import requires
from tests.runtime.cgroup.conftest import Place

pytestmark = requires("root")

MIB = 1 << 20


def _value(place: Place, path: str, v1: tuple[str, str], v2: str) -> str:
    """What the kernel holds: v1's controller and file, v2's file."""
    controller, file = v1
    base = f"/sys/fs/cgroup/{controller}" if place.cgroups.version == 1 else "/sys/fs/cgroup"
    return Path(f"{base}{path}/{file if place.cgroups.version == 1 else v2}").read_text().strip()


def _quota(place: Place, path: str) -> tuple[str, str]:
    if place.cgroups.version == 2:
        quota, period = _value(place, path, ("cpu", ""), "cpu.max").split()
        return quota, period
    quota = _value(place, path, ("cpu", "cpu.cfs_quota_us"), "")
    return "max" if quota == "-1" else quota, _value(place, path, ("cpu", "cpu.cfs_period_us"), "")


def _memory_limit(place: Place, path: str) -> str:
    return _value(place, path, ("memory", "memory.limit_in_bytes"), "memory.max")


def _pids_limit(place: Place, path: str) -> str:
    return _value(place, path, ("pids", "pids.max"), "pids.max")


def test_missing_parents_are_made_and_reported(place: Place) -> None:
    made = place.cgroups.create(place.path("pod", "container"), None)
    assert made == (place.parent, place.path("pod"), place.path("pod", "container"))
    assert place.cgroups.create(place.path("pod", "other"), None) == (place.path("pod", "other"),)
    assert place.cgroups.exists(place.path("pod", "other"))
    assert place.cgroups.remove(place.path("pod"))
    assert not place.cgroups.exists(place.path("pod", "other"))
    assert place.cgroups.exists(place.parent)


@pytest.mark.parametrize(
    ("resources", "named"),
    [
        (Resources(pids=Pids(limit=7), cpu=CPU(cpus="0-4095")), "cpu.cpus 0-4095"),
        (Resources(pids=Pids(limit=7), cpu=CPU(cpus="zero")), "cpu.cpus zero"),
        (Resources(pids=Pids(limit=7), cpu=CPU(mems="77")), "cpu.mems 77"),
        (Resources(cpu=CPU(quota=10, period=100_000)), "10"),
        (Resources(cpu=CPU(quota=10_000, period=5)), "5"),
        (Resources(pids=Pids(limit=2**62)), f"pids.limit {2**62}"),
        (Resources(memory=Memory(limit=-7)), "memory.limit -7"),
        (Resources(memory=Memory(limit=2**63)), f"memory.limit {2**63}"),
        (Resources(memory=Memory(limit=2 * MIB, swap=MIB)), "memory.swap"),
        (Resources(hugepage_limits=(HugepageLimit(page_size="3MB", limit=MIB),)), "hugepage 3MB"),
        (Resources(unified={"memory.nonsense": "1"}), "unified"),
        (Resources(unified={"cgroup.procs": "1"}), "unified"),
        (Resources(unified={"../memory.max": "1"}), "unified"),
    ],
)
def test_a_refused_limit_is_named_and_nothing_is_left(place: Place, resources: Resources, named: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        place.cgroups.create(place.path("pod", "container"), resources)
    assert named in str(caught.value)
    assert not place.cgroups.exists(place.parent)


def test_a_huge_page_limit_of_nothing_needs_no_controller(place: Place) -> None:
    path = place.make("small", limits=Resources(hugepage_limits=(HugepageLimit(page_size="2MB", limit=0),)))
    assert place.cgroups.exists(path)


@pytest.mark.parametrize("path", ["relative", "/", "/a/../b", "/a//b", "/a/./b", "/a\nb", "/" + "x" * 300, ""])
def test_a_path_that_leads_elsewhere_is_refused(place: Place, path: str) -> None:
    with pytest.raises(InvalidSpec):
        place.cgroups.create(path, None)
    with pytest.raises(InvalidSpec):
        place.cgroups.remove(path)


@pytest.mark.parametrize("place", ["cgroupfs"], indirect=True)
def test_a_path_through_a_file_is_refused(place: Place) -> None:
    place.make("pod")
    for name in ("cgroup.procs", "cgroup.procs/container"):
        with pytest.raises(InvalidSpec):
            place.cgroups.create(place.path("pod", name), None)


def test_the_parent_is_of_the_drivers_kind(place: Place) -> None:
    slice_of_kubelet, path_of_kubelet = "kubepods-burstable-pod1.slice", "/kubepods/burstable/pod1"
    wrong, right = slice_of_kubelet, path_of_kubelet
    if place.cgroups.driver == "systemd":
        wrong, right = right, wrong
    assert place.cgroups.join_path(right, "container").startswith("/kubepods")
    with pytest.raises(InvalidSpec, match="slice"):
        place.cgroups.join_path(wrong, "container")


def test_limits_are_set_and_changed(place: Place) -> None:
    limits = Resources(
        cpu=CPU(shares=1024, quota=50_000, period=100_000),
        memory=Memory(limit=64 * MIB, swap=64 * MIB),
        pids=Pids(limit=50),
    )
    path = place.make("limited", limits=limits)
    assert _quota(place, path) == ("50000", "100000")
    assert _value(place, path, ("cpu", "cpu.shares"), "cpu.weight") == ("1024" if place.cgroups.version == 1 else "100")
    assert _memory_limit(place, path) == str(64 * MIB)
    assert _pids_limit(place, path) == "50"

    place.cgroups.update(path, Resources(cpu=CPU(quota=400_000, period=200_000)))
    assert _quota(place, path) == ("400000", "200000")
    place.cgroups.update(path, Resources(cpu=CPU(quota=10_000, period=20_000)))
    assert _quota(place, path) == ("10000", "20000")
    place.cgroups.update(path, Resources(cpu=CPU(quota=20_000)))
    assert _quota(place, path) == ("20000", "20000")
    place.cgroups.update(path, Resources(cpu=CPU(period=40_000)))
    assert _quota(place, path) == ("20000", "40000")
    place.cgroups.update(path, Resources(cpu=CPU(quota=12_345)))
    assert _quota(place, path) == ("12345", "40000")

    for size in (256 * MIB, 32 * MIB):
        place.cgroups.update(path, Resources(memory=Memory(limit=size, swap=size)))
        assert _memory_limit(place, path) == str(size)
    place.cgroups.update(path, Resources(memory=Memory(limit=512 * MIB)))
    swap = place.cgroups.stats(path).swap
    assert swap is None or swap.limit == 0
    place.cgroups.update(path, Resources(pids=Pids(limit=-1)))
    assert _pids_limit(place, path) == "max"
    # What was not given is as it was.
    assert _quota(place, path) == ("12345", "40000")
    place.cgroups.update(path, Resources(cpu=CPU(quota=-1)))
    assert _quota(place, path)[0] == "max"


def test_a_refused_update_changes_nothing(place: Place) -> None:
    path = place.make(
        "steady",
        limits=Resources(
            cpu=CPU(shares=512, quota=50_000, period=100_000), memory=Memory(limit=64 * MIB), pids=Pids(limit=9)
        ),
    )
    before = (_quota(place, path), _memory_limit(place, path), _pids_limit(place, path))
    for refused in (
        Resources(cpu=CPU(shares=2048, quota=90_000, period=50_000, cpus="0-4095"), pids=Pids(limit=10)),
        Resources(cpu=CPU(quota=-1), memory=Memory(limit=128 * MIB), pids=Pids(limit=2**62)),
    ):
        with pytest.raises(InvalidSpec):
            place.cgroups.update(path, refused)
        assert before == (_quota(place, path), _memory_limit(place, path), _pids_limit(place, path))


@pytest.mark.parametrize("numbers", [CPU(cpus="0,{}"), CPU(cpus="0-{}"), CPU(mems="{}")])
def test_one_more_than_the_machine_has(place: Place, numbers: CPU) -> None:
    """v2 would take it where the kernel could have it, and go on with what there is."""
    if "cpuset" not in place.cgroups.controllers:
        pytest.skip("no cpuset controller here")
    present = Path("/sys/devices/system/cpu/present")
    one_more = str(1 + int(re.split("[-,]", present.read_text())[-1]) if present.exists() else os.cpu_count())
    asked = CPU(cpus=numbers.cpus.format(one_more), mems=numbers.mems.format("9"))
    with pytest.raises(InvalidSpec, match=r"cpu\.(cpus|mems)"):
        place.make("pod", limits=Resources(cpu=asked))
    path = place.make("pod", limits=Resources(cpu=CPU(cpus="0", mems="0")))
    with pytest.raises(InvalidSpec, match=r"cpu\.(cpus|mems)"):
        place.cgroups.update(path, Resources(cpu=asked))
    assert _value(place, path, ("cpuset", "cpuset.cpus"), "cpuset.cpus") == "0"


def test_a_limit_above_the_parents(place: Place) -> None:
    """On v1 the kernel refuses a quota above the parent's; memory, and all on v2, is as low as the lowest above."""
    pod = place.make("pod", "all")
    above = Path(pod).parent
    outer = Resources(cpu=CPU(quota=20_000, period=100_000), memory=Memory(limit=32 * MIB, swap=32 * MIB))
    place.cgroups.update(str(above), outer)
    inner = Resources(cpu=CPU(quota=90_000, period=100_000))
    if place.cgroups.version == 1:
        with pytest.raises(InvalidSpec, match=r"cpu\.quota 90000: the kernel refuses it"):
            place.make("pod", "container", limits=inner)
        assert not place.cgroups.exists(place.path("pod", "container"))
    else:
        assert _quota(place, place.make("pod", "container", limits=inner))[0] == "90000"
    hog = place.run(
        place.make("pod", "hog", limits=Resources(memory=Memory(limit=256 * MIB, swap=256 * MIB))),
        "hoard = bytearray(b'x') * (128 << 20)",
    )
    hog.go()
    assert hog.wait() == -signal.SIGKILL


def test_memory_below_the_present_use_is_refused(place: Place) -> None:
    path = place.make("full", limits=Resources(memory=Memory(limit=128 * MIB, swap=128 * MIB)))
    holder = place.run(path, "hoard = bytearray(b'x') * (48 << 20); print('has', flush=True); sys.stdin.readline()")
    holder.go()
    assert holder.line() == "has"
    with pytest.raises(InvalidSpec, match="below the present use"):
        place.cgroups.update(path, Resources(memory=Memory(limit=16 * MIB, swap=16 * MIB), cpu=CPU(shares=100)))
    assert _memory_limit(place, path) == str(128 * MIB)
    place.cgroups.update(path, Resources(memory=Memory(limit=96 * MIB, swap=96 * MIB)))
    holder.tell("end")
    assert holder.wait() == 0


def test_an_empty_cgroup_that_is_there_is_taken_over(place: Place) -> None:
    path = place.make("left", limits=Resources(memory=Memory(limit=16 * MIB, swap=16 * MIB), pids=Pids(limit=1)))
    place.make("left", "nested", limits=Resources(pids=Pids(limit=1)))
    place.cgroups.freeze(path)
    limits = Resources(memory=Memory(limit=64 * MIB, swap=64 * MIB), pids=Pids(limit=5))
    assert place.cgroups.create(path, limits) == ()
    assert not place.cgroups.exists(place.path("left", "nested"))
    assert place.run(path, "print('runs')").output() == "runs\n"


def test_a_cgroup_in_use_is_not_taken_over(place: Place) -> None:
    path = place.make("busy", limits=Resources(pids=Pids(limit=3)))
    place.run(path, "sys.stdin.readline()")
    with pytest.raises(WrongState, match="holds processes"):
        place.cgroups.create(path, Resources(pids=Pids(limit=9)))
    assert _pids_limit(place, path) == "3"
    assert not place.cgroups.remove(path)
    assert place.cgroups.exists(path)


def test_one_that_is_gone(place: Place) -> None:
    path = place.path("never", "made")
    place.cgroups.kill(path)
    assert place.cgroups.procs(path) == ()
    assert not place.cgroups.exists(path)
    assert place.cgroups.remove(path)
    for action in (place.cgroups.stats, place.cgroups.freeze, place.cgroups.thaw):
        with pytest.raises(NotFound):
            action(path)
    with pytest.raises(NotFound):
        place.cgroups.update(path, Resources(pids=Pids(limit=1)))
    file = place.cgroups.memory_events(path)
    assert file is None or files.oom_kills(file) == 0


def test_figures_grow(place: Place) -> None:
    path = place.make("worker", limits=Resources(pids=Pids(limit=10)))
    worker = place.run(
        path,
        """
        import os
        if os.fork() == 0:
            sum(range(2_000_000))
            os._exit(0)
        os.wait()
        print("done", flush=True)
        sys.stdin.readline()
        """,
    )
    worker.go()
    assert worker.line() == "done"
    stats = place.cgroups.stats(path)
    assert stats.cpu is not None
    assert stats.cpu.usage_ns > 1_000_000
    assert stats.pids is not None
    assert (stats.pids.current, stats.pids.limit) == (1, 10)
    assert stats.read_ns > 1.5e18


def test_two_that_race_for_the_same_parents(place: Place) -> None:
    paths = [place.path("pod", f"container-{number}") for number in range(16)]
    failures: list[BaseException] = []

    def make(own: list[str]) -> None:
        try:
            for path in own:
                place.cgroups.create(path, Resources(pids=Pids(limit=5)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make, args=(paths[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(place.cgroups.exists(path) for path in paths)


@pytest.mark.requires("cgroup2")
def test_a_parent_that_holds_processes_passes_no_controllers_on(place: Place) -> None:
    parent = place.make("pod")
    program = place.run(parent, "import signal; signal.pause()")
    with pytest.raises(WrongState, match="holds processes itself"):
        place.cgroups.create(place.path("pod", "container"), Resources(memory=Memory(limit=MIB)))
    assert not place.cgroups.exists(place.path("pod", "container"))
    place.cgroups.kill(parent)
    assert program.wait() == -signal.SIGKILL


@pytest.mark.requires("cgroup2")
def test_unified_limits(place: Place) -> None:
    path = place.make(
        "unified",
        limits=Resources(
            memory=Memory(limit=64 * MIB), unified={"memory.high": str(32 * MIB), "memory.oom.group": "1"}
        ),
    )
    directory = Path(f"/sys/fs/cgroup{path}")
    assert (directory / "memory.high").read_text().strip() == str(32 * MIB)
    assert (directory / "memory.oom.group").read_text().strip() == "1"
    with pytest.raises(InvalidSpec, match=r"unified memory\.high many"):
        place.cgroups.update(path, Resources(unified={"memory.oom.group": "0", "memory.high": "many"}))
    assert (directory / "memory.oom.group").read_text().strip() == "1"
    assert place.cgroups.clone_dir(path) == str(directory)


@pytest.mark.requires("cgroup1")
def test_unified_limits_need_v2(place: Place) -> None:
    with pytest.raises(InvalidSpec, match="cgroup v1"):
        place.cgroups.create(place.path("pod"), Resources(unified={"memory.high": "1"}))


@pytest.mark.requires("cgroup1")
def test_v1_hierarchies_are_what_a_container_mounts(place: Place, needs_controller: Callable[[str], None]) -> None:
    needs_controller("memory")
    path = place.make("view")
    mounts = {mount.target: mount for mount in place.cgroups.mounts_in_container(path)}
    assert mounts["memory"].data == "memory"
    assert all(mount.fstype == "cgroup" and os.path.isdir(mount.directory) for mount in mounts.values())
    assert len(place.cgroups.join_files(path)) == len(mounts)
    assert "unified" not in mounts

"""Huge pages and swap are limited by the kernel, where a machine has them: this lends it some for the test."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.cgroup import detect
from runtime.cgroup.stats import Swap
from runtime.errors import InvalidSpec
from runtime.spec import HugepageLimit, Memory, Resources
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.cgroup.conftest import Place

pytestmark = requires("root")

MIB = 1 << 20
SIZE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Eight huge pages of 2 MiB more than the machine has."""
    if not SIZE.exists():
        pytest.skip("no huge pages of 2 MiB here")
    pages = SIZE / "nr_hugepages"
    before = pages.read_text()
    pages.write_text(str(int(before) + 8))
    try:
        if int(pages.read_text()) < int(before) + 8:
            pytest.skip("no memory for eight huge pages")
        yield
    finally:
        pages.write_text(before)


@pytest.fixture(params=["v2", "v1"])
def huge_place(request: pytest.FixtureRequest, huge_pages: None, run_dir: Path) -> Iterator[Place]:
    """A hierarchy with the hugetlb controller, mounted apart from the machine's own; it belongs to one at a time."""
    root = run_dir / "cgroup"
    root.mkdir()
    hierarchy, mount = root, ["-t", "cgroup2", "cgroup2"]
    if request.param == "v1":
        hierarchy, mount = root / "hugetlb", ["-t", "cgroup", "-o", "hugetlb", "cgroup"]
        hierarchy.mkdir()
    if request.param == "v1" and _hugetlb()[0]:
        pytest.skip("hugetlb is mounted already")
    mounted = _repeat(lambda: _run("mount", *mount, str(hierarchy)))
    if mounted:
        pytest.skip(f"hugetlb belongs to another hierarchy: {mounted}")
    try:
        cgroups = detect(str(root), driver="cgroupfs")
        if "hugetlb" not in cgroups.controllers:
            pytest.skip("hugetlb belongs to another hierarchy, or the kernel lacks it")
        handed = (root / "cgroup.subtree_control").read_text().split() if request.param == "v2" else []
        place = Place(cgroups, f"/crib-test-{secrets.token_hex(6)}")
        yield place
        for program in place.programs:
            program.end()
        assert cgroups.remove(place.parent)
        if request.param == "v2" and "hugetlb" not in handed:
            (root / "cgroup.subtree_control").write_text("-hugetlb")
    finally:
        # A v1 hierarchy that is unmounted while a cgroup of it is still dying stays for ever.
        emptied = request.param == "v2" or not _repeat(lambda: "" if _hugetlb()[1] == 1 else "a cgroup is dying")
        assert not _run("umount", str(hierarchy))
        assert emptied
    if request.param == "v1":
        assert not _repeat(lambda: "it is still there" if _hugetlb()[0] else "")


def _hugetlb() -> tuple[int, int]:
    """The number of the v1 hierarchy that hugetlb belongs to, 0 for v2's; and how many cgroups that has, its root and
    those that are dying included.
    """
    for line in Path("/proc/cgroups").read_text().splitlines():
        name, hierarchy, cgroups, _ = line.split()
        if name == "hugetlb":
            return int(hierarchy), int(cgroups)
    return 0, 0


def _run(*command: str) -> str:
    """What it complained of."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() or "failed" if done.returncode else ""


def _repeat(attempt: Callable[[], str]) -> str:
    """Try until there is no complaint, for as long as the kernel may take to be done with removed cgroups."""
    deadline = time.monotonic() + scaled(60)
    while (complaint := attempt()) and time.monotonic() < deadline:
        time.sleep(0.02)  # noqa: TID251 - the end of a cgroup has no event
    return complaint


MAP_HUGE = """
import mmap, os, signal
def huge(pages):
    found = mmap.mmap(-1, pages << 21, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000 | {flags})
    for page in range(pages):
        found[page << 21] = 1
    return found
"""
NO_RESERVE = 0x4000


def test_huge_pages_hold_at_their_limit(huge_place: Place) -> None:
    path = huge_place.make("huge", limits=Resources(hugepage_limits=(HugepageLimit("2MB", 4 * MIB),)))
    program = huge_place.run(
        path,
        MAP_HUGE.format(flags=0)
        + "two = huge(2); print('has', flush=True); sys.stdin.readline()\n"
        + "try:\n    huge(1)\nexcept OSError as error:\n    print(error.errno, flush=True)\nsys.stdin.readline()\n",
    )
    program.go()
    assert program.line() == "has"
    (pages,) = (one for one in huge_place.cgroups.stats(path).hugepages if one.page_size == "2MB")
    assert (pages.usage, pages.limit) == (4 * MIB, 4 * MIB)
    program.tell("more")
    assert program.line() == str(errno.ENOMEM)  # it can't even be reserved
    huge_place.cgroups.update(path, Resources(hugepage_limits=(HugepageLimit("2MB", 8 * MIB),)))
    (pages,) = (one for one in huge_place.cgroups.stats(path).hugepages if one.page_size == "2MB")
    assert pages.limit == 8 * MIB


def test_a_huge_page_that_was_not_reserved_kills(huge_place: Place) -> None:
    path = huge_place.make("huge", limits=Resources(hugepage_limits=(HugepageLimit("2MB", 4 * MIB),)))
    program = huge_place.run(path, MAP_HUGE.format(flags=NO_RESERVE) + "huge(3)")
    program.go()
    assert program.wait() == -signal.SIGBUS


def test_a_size_of_huge_pages_that_is_not(huge_place: Place) -> None:
    with pytest.raises(InvalidSpec, match="3MB"):
        huge_place.make("huge", limits=Resources(hugepage_limits=(HugepageLimit("3MB", 3 * MIB),)))
    assert not huge_place.cgroups.exists(huge_place.parent)


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """64 MiB of swap in a file."""
    file = tmp_path / "swap"
    with file.open("wb") as opened:
        file.chmod(0o600)
        for _ in range(64):
            opened.write(b"\0" * MIB)
        os.fsync(opened.fileno())
    subprocess.run(["mkswap", "-q", file], check=True)
    on = subprocess.run(["swapon", file], capture_output=True, text=True, check=False)
    if on.returncode:
        pytest.skip(f"no swap: {on.stderr.strip()}")
    yield
    subprocess.run(["swapoff", file], check=True)


EAT = "hoard = bytearray(b'x') * (48 << 20); print('has', flush=True); sys.stdin.readline()"


def _swap(place: Place, path: str) -> Swap:
    found = place.cgroups.stats(path).swap
    if found is None:
        pytest.skip("this kernel does not count swap by cgroup")
    return found


def test_swap_is_what_was_asked(swap: None, place: Place) -> None:
    path = place.make("swaps", limits=Resources(memory=Memory(limit=32 * MIB, swap=64 * MIB)))
    assert _swap(place, path).limit == 32 * MIB
    program = place.run(path, EAT)
    program.go()
    assert program.line() == "has"
    now = _swap(place, path)
    assert now.limit == 32 * MIB
    assert 12 * MIB <= now.usage <= 32 * MIB
    assert now.available == now.limit - now.usage
    # Memory alone goes up, and what may be swapped stays.
    place.cgroups.update(path, Resources(memory=Memory(limit=40 * MIB)))
    assert _swap(place, path).limit == 32 * MIB


@pytest.mark.parametrize("together", [32 * MIB, 40 * MIB])
def test_more_than_memory_and_swap_kills(swap: None, place: Place, together: int) -> None:
    """Without any swap asked for, and with too little."""
    path = place.make("starves", limits=Resources(memory=Memory(limit=32 * MIB, swap=together)))
    _swap(place, path)
    program = place.run(path, EAT)
    program.go()
    assert program.wait() == -signal.SIGKILL
    assert place.oom_kills(path) == 1

"""Limits as file writes: pure, for both versions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cgroup import v1, v2
from runtime.cgroup.weights import cpu_weight, io_weight
from runtime.cgroup.writes import Write, previous
from runtime.errors import InvalidSpec
from runtime.spec import CPU, BlockIO, HugepageLimit, Memory, Pids, Resources, ThrottleDevice, WeightDevice

LIMITS = Resources(
    cpu=CPU(shares=2048, quota=25_000, period=100_000, cpus="0-1", mems="0"),
    memory=Memory(limit=1000, swap=1500, reservation=500),
    pids=Pids(limit=100),
    hugepage_limits=(HugepageLimit(page_size="2MB", limit=4096),),
    block_io=BlockIO(
        throttle_read_bps_device=(ThrottleDevice(major=8, minor=0, rate=1000),),
        throttle_write_iops_device=(
            ThrottleDevice(major=8, minor=0, rate=10),
            ThrottleDevice(major=8, minor=16, rate=20),
        ),
    ),
)


def _lines(writes: tuple[Write, ...]) -> list[str]:
    return [f"{write.file} {value}" for write in writes for value in write.values]


def test_v1() -> None:
    assert _lines(v1.writes(LIMITS)) == [
        "cpu.shares 2048",
        "cpu.cfs_period_us 100000",
        "cpu.cfs_quota_us 25000",
        "cpuset.cpus 0-1",
        "cpuset.mems 0",
        "memory.limit_in_bytes 1000",
        "memory.memsw.limit_in_bytes 1500",
        "memory.soft_limit_in_bytes 500",
        "pids.max 100",
        "blkio.throttle.read_bps_device 8:0 1000",
        "blkio.throttle.write_iops_device 8:0 10",
        "blkio.throttle.write_iops_device 8:16 20",
        "hugetlb.2MB.limit_in_bytes 4096",
        "hugetlb.2MB.rsvd.limit_in_bytes 4096",
    ]


def test_v2() -> None:
    assert _lines(v2.writes(LIMITS)) == [
        "cpu.weight 174",
        "cpu.max 25000 100000",
        "cpuset.cpus 0-1",
        "cpuset.mems 0",
        "memory.max 1000",
        "memory.swap.max 500",
        "memory.low 500",
        "pids.max 100",
        "io.max 8:0 rbps=1000 wiops=10",
        "io.max 8:16 wiops=20",
        "hugetlb.2MB.max 4096",
        "hugetlb.2MB.rsvd.max 4096",
    ]


@pytest.mark.parametrize("writes", [v1.writes, v2.writes])
def test_what_is_not_asked_for_is_not_written(writes: v1.Translation) -> None:
    nothing = Resources(cpu=CPU(), memory=Memory(), block_io=BlockIO())
    assert writes(nothing) == writes(Resources()) == ()
    # CRI's zeros mean "not given".
    assert writes(Resources(cpu=CPU(shares=0, quota=0, period=0), memory=Memory(limit=0, swap=0))) == ()


def test_unlimited() -> None:
    unlimited = Resources(cpu=CPU(quota=-1, period=50_000), memory=Memory(limit=-1, swap=-1), pids=Pids(limit=-1))
    assert _lines(v2.writes(unlimited)) == [
        "cpu.max max 50000",
        "memory.max max",
        "memory.swap.max max",
        "pids.max max",
    ]
    assert _lines(v1.writes(unlimited)) == [
        "cpu.cfs_period_us 50000",
        "cpu.cfs_quota_us -1",
        "memory.limit_in_bytes -1",
        "memory.memsw.limit_in_bytes -1",
        "pids.max max",
    ]


def test_no_swap_needs_no_accounting_of_it() -> None:
    no_swap = Resources(memory=Memory(limit=1000, swap=1000))
    for writes, file in ((v1.writes, "memory.memsw.limit_in_bytes"), (v2.writes, "memory.swap.max")):
        (swap,) = [write for write in writes(no_swap) if write.file == file]
        assert swap.tolerant
    assert _lines(v2.writes(no_swap)) == ["memory.max 1000", "memory.swap.max 0"]


def test_both_io_weights() -> None:
    limits = Resources(block_io=BlockIO(weight=500, weight_device=(WeightDevice(major=8, minor=0, weight=10),)))
    assert _lines(v2.writes(limits)) == [
        "io.weight 4950",
        "io.bfq.weight 500",
        "io.weight 8:0 1",
        "io.bfq.weight 8:0 10",
    ]
    assert _lines(v1.writes(limits)) == ["blkio.bfq.weight 500", "blkio.bfq.weight_device 8:0 10"]


def test_unified_lines_are_written_one_by_one() -> None:
    unified = {"io.max": "8:0 rbps=1\n8:16 rbps=2\n", "memory.high": "5"}
    assert _lines(v2.writes(Resources(unified=unified))) == ["io.max 8:0 rbps=1", "io.max 8:16 rbps=2", "memory.high 5"]


@pytest.mark.parametrize(
    "file", ["memory/max", "../memory.max", "cgroup.procs", "cpu", "", "memory.max/../x", "cpuacct.usage", "memory.\n"]
)
def test_unified_files_are_checked(file: str) -> None:
    with pytest.raises(InvalidSpec, match="unified"):
        v2.writes(Resources(unified={file: "1"}))


@pytest.mark.parametrize("writes", [v1.writes, v2.writes])
@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (Resources(memory=Memory(limit=-2)), "memory.limit -2"),
        (Resources(hugepage_limits=(HugepageLimit(page_size="2MB/../x", limit=0),)), "hugepage size '2MB/../x'"),
        (Resources(hugepage_limits=(HugepageLimit(page_size="2MB", limit=2**64 - 1),)), "hugepage limit"),
        (Resources(memory=Memory(limit=2**63)), "memory.limit"),
        (Resources(memory=Memory(limit=100, swap=50)), "memory.swap 50"),
        (Resources(cpu=CPU(quota=-5)), "cpu.quota -5"),
        (Resources(cpu=CPU(period=-5)), "cpu.period -5"),
        (Resources(cpu=CPU(shares=-1)), "cpu.shares -1"),
        (Resources(pids=Pids(limit=-3)), "pids.limit -3"),
    ],
)
def test_nonsense_is_named(writes: v1.Translation, limits: Resources, named: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        writes(limits)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("shares", "weight"),
    [(0, 1), (2, 1), (3, 2), (10, 4), (100, 17), (512, 59), (1024, 100), (2048, 174), (262144, 10000), (10**9, 10000)],
)
def test_cpu_weight(shares: int, weight: int) -> None:
    assert cpu_weight(shares) == weight


@given(st.integers(2, 262144), st.integers(2, 262144))
def test_cpu_weight_grows_with_the_shares(one: int, other: int) -> None:
    assert 1 <= cpu_weight(one) <= 10000
    assert math.copysign(1, cpu_weight(one) - cpu_weight(other)) == math.copysign(1, one - other) or (
        cpu_weight(one) == cpu_weight(other)
    )


def test_io_weight() -> None:
    assert [io_weight(weight) for weight in (10, 100, 1000)] == [1, 910, 10000]


@pytest.mark.parametrize(
    ("file", "held", "values", "restored"),
    [
        ("memory.max", "max\n", ("5",), ("max",)),
        ("cpu.max", "max 100000\n", ("5 10",), ("max 100000",)),
        ("cpuset.cpus", "\n", ("0",), ("\n",)),
        ("io.max", "8:0 rbps=5 wbps=max\n8:16 rbps=1\n", ("8:16 rbps=2",), ("8:16 rbps=1",)),
        ("io.max", "", ("8:16 rbps=2",), ("8:16 rbps=max wbps=max riops=max wiops=max",)),
        ("io.weight", "default 100\n8:0 50\n", ("200",), ("default 100",)),
        ("io.weight", "default 100\n", ("8:0 50",), ("8:0 default",)),
        ("blkio.throttle.read_bps_device", "", ("8:0 50", "8:16 7"), ("8:0 0", "8:16 0")),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", ("1",), ("0",)),
    ],
)
def test_what_undoes_a_write(file: str, held: str, values: tuple[str, ...], restored: tuple[str, ...]) -> None:
    assert previous(held, Write("x", file, values, "", "")) == restored

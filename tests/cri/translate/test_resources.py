"""LinuxContainerResources to OCI resources."""

from __future__ import annotations

from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from cri.translate.resources import changed, resources
from runtime.errors import InvalidSpec
from runtime.spec import CPU, DeviceCgroup, HugepageLimit, Memory, Resources

Pair = tuple[int, int]


def made(version: int = 2, **fields: Any) -> Resources:
    return resources(pb.LinuxContainerResources(**fields), cgroup_version=version)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Resources()),
        ({"cpu_shares": 2, "cpu_period": 100_000}, Resources(cpu=CPU(shares=2, period=100_000))),
        ({"cpu_shares": 1}, Resources(cpu=CPU(shares=2))),
        ({"cpu_quota": -1}, Resources(cpu=CPU(quota=-1))),
        ({"cpu_quota": 20_000}, Resources(cpu=CPU(quota=20_000))),
        ({"cpuset_cpus": "0-3,7", "cpuset_mems": "0"}, Resources(cpu=CPU(cpus="0-3,7", mems="0"))),
        ({"memory_limit_in_bytes": 64 << 20}, Resources(memory=Memory(limit=64 << 20, swap=64 << 20))),
        ({"memory_limit_in_bytes": -1}, Resources(memory=Memory(limit=-1, swap=-1))),
        (
            {"memory_limit_in_bytes": 1 << 20, "memory_swap_limit_in_bytes": 2 << 20},
            Resources(memory=Memory(limit=1 << 20, swap=2 << 20)),
        ),
        (
            {"memory_limit_in_bytes": 1 << 20, "memory_swap_limit_in_bytes": -1},
            Resources(memory=Memory(limit=1 << 20, swap=-1)),
        ),
        (
            {"hugepage_limits": [pb.HugepageLimit(page_size="2MB"), pb.HugepageLimit(page_size="1GB", limit=1 << 30)]},
            Resources(
                hugepage_limits=(
                    HugepageLimit(page_size="2MB", limit=0),
                    HugepageLimit(page_size="1GB", limit=1 << 30),
                )
            ),
        ),
        (
            {"unified": {"memory.high": "1000", "io.max": "8:0 rbps=1\n8:1 rbps=2", "cgroup.max.depth": "1"}},
            Resources(unified={"memory.high": "1000", "io.max": "8:0 rbps=1\n8:1 rbps=2", "cgroup.max.depth": "1"}),
        ),
    ],
)
def test_translated(fields: dict[str, Any], expected: Resources) -> None:
    assert made(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cpu_shares": -1}, "cpu_shares -1"),
        ({"cpu_shares": 262_145}, "cpu_shares 262145"),
        ({"cpu_period": 999}, "cpu_period 999"),
        ({"cpu_period": 1_000_001}, "cpu_period 1000001"),
        ({"cpu_quota": -2}, "cpu_quota -2"),
        ({"cpu_quota": 999}, "cpu_quota 999"),
        ({"cpuset_cpus": "0-"}, "cpuset_cpus '0-'"),
        ({"cpuset_mems": "all"}, "cpuset_mems 'all'"),
        ({"cpuset_cpus": "0," * 5000 + "0"}, "cpuset_cpus '0,"),
        ({"memory_limit_in_bytes": -2}, "memory_limit_in_bytes -2"),
        ({"memory_swap_limit_in_bytes": -2}, "memory_swap_limit_in_bytes -2"),
        ({"memory_swap_limit_in_bytes": 5}, "memory_swap_limit_in_bytes 5: needs"),
        ({"memory_limit_in_bytes": 9, "memory_swap_limit_in_bytes": 5}, "memory_swap_limit_in_bytes 5"),
        ({"memory_limit_in_bytes": -1, "memory_swap_limit_in_bytes": 5}, "memory_swap_limit_in_bytes 5"),
        ({"hugepage_limits": [pb.HugepageLimit(page_size="2")]}, "hugepage_limits '2'"),
        ({"hugepage_limits": [pb.HugepageLimit(page_size="../2MB")]}, "hugepage_limits '../2MB'"),
        ({"hugepage_limits": [pb.HugepageLimit(page_size="2MB")] * 2}, "hugepage_limits 2MB: given twice"),
        ({"hugepage_limits": [pb.HugepageLimit(page_size="2MB", limit=1 << 63)]}, "hugepage_limits 2MB: 9223"),
        ({"unified": {"../memory.max": "1"}}, "unified '../memory.max'"),
        ({"unified": {"memory": "1"}}, "unified 'memory'"),
        ({"unified": {"cgroup.procs": "1"}}, "unified cgroup.procs"),
        ({"unified": {"cgroup.kill": "1"}}, "unified cgroup.kill"),
        ({"unified": {"devices.allow": "a"}}, "unified devices.allow"),
        ({"unified": {"memory.high": "\0"}}, "unified memory.high: the value '\\x00'"),
    ],
)
def test_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        made(**fields)
    assert f"resources.{said}" in str(error.value)
    assert len(str(error.value)) < 300


def test_unified_needs_cgroup_v2() -> None:
    with pytest.raises(InvalidSpec, match=r"resources.unified 'memory.high': this host has cgroup v1"):
        made(1, unified={"memory.high": "1"})


def test_an_update_keeps_what_it_does_not_name() -> None:
    rules = (DeviceCgroup(allow=False),)
    before = Resources(
        devices=rules,
        cpu=CPU(shares=100, quota=5000, period=100_000, cpus="0"),
        memory=Memory(limit=100, swap=100),
        hugepage_limits=(HugepageLimit(page_size="2MB", limit=0),),
        unified={"memory.high": "1"},
    )
    request = pb.LinuxContainerResources(
        cpu_quota=-1,
        hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=5)],
        unified={"memory.low": "2"},
    )
    assert changed(before, request, cgroup_version=2) == Resources(
        devices=rules,
        cpu=CPU(shares=100, quota=-1, period=100_000, cpus="0"),
        memory=Memory(limit=100, swap=100),
        hugepage_limits=(HugepageLimit(page_size="2MB", limit=5),),
        unified={"memory.high": "1", "memory.low": "2"},
    )


def test_an_update_of_nothing_and_of_what_was_unset() -> None:
    assert changed(Resources(), pb.LinuxContainerResources(), cgroup_version=1) == Resources()
    raised = changed(Resources(), pb.LinuxContainerResources(memory_limit_in_bytes=5), cgroup_version=1)
    assert raised == Resources(memory=Memory(limit=5, swap=5)), "swap follows the limit"


@pytest.mark.parametrize(
    ("held", "asked", "expected"),
    [
        ((64, 64), (96, 0), (96, 96)),
        ((64, 128), (96, 0), (96, 128)),
        ((64, -1), (96, 0), (96, -1)),
        ((64, 64), (0, 100), (64, 100)),
        ((64, 128), (96, 96), (96, 96)),
    ],
)
def test_swap_that_was_asked_for_stays(held: Pair, asked: Pair, expected: Pair) -> None:
    request = pb.LinuxContainerResources(memory_limit_in_bytes=asked[0], memory_swap_limit_in_bytes=asked[1])
    before = Resources(memory=Memory(limit=held[0], swap=held[1]))
    assert changed(before, request, cgroup_version=2).memory == Memory(limit=expected[0], swap=expected[1])


def test_an_update_above_memory_and_swap_together() -> None:
    before = Resources(memory=Memory(limit=64, swap=128))
    with pytest.raises(InvalidSpec, match="memory_swap_limit_in_bytes 128: memory and swap together, below"):
        changed(before, pb.LinuxContainerResources(memory_limit_in_bytes=200), cgroup_version=2)

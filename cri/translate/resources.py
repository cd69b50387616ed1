"""LinuxContainerResources to the OCI resources of a cgroup."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from cri.api import cri_pb2 as pb
from cri.translate.field import show
from runtime.errors import InvalidSpec
from runtime.spec import CPU, DeviceCgroup, HugepageLimit, Memory, Resources

CPU_PERIOD_US = (1_000, 1_000_000)  # the kernel's min_bw_quota_period_ns and max_bw_quota_period_ns
CPU_QUOTA_MIN_US = 1_000
CPU_SHARES_MAX = 262_144
OOM_SCORE_ADJ = (-1000, 1000)
_Part = TypeVar("_Part", CPU, Memory)
_INT64_MAX = (1 << 63) - 1
_CPU_LIST = re.compile(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*")
_PAGE_SIZE = re.compile(r"[1-9]\d{0,6}[KMG]B")
_UNIFIED_FILE = re.compile(r"[a-z][a-z0-9_]*(\.[a-zA-Z0-9_-]+)+")
_UNIFIED_VALUE = re.compile(r"[\x20-\x7e\n]{0,4096}")
_UNIFIED_CGROUP = frozenset({"cgroup.max.depth", "cgroup.max.descendants", "cgroup.pressure"})

DEFAULT_DEVICE_RULES = (
    DeviceCgroup(allow=False, access="rwm"),
    DeviceCgroup(allow=True, type="c", access="m"),
    DeviceCgroup(allow=True, type="b", access="m"),
    *(
        DeviceCgroup(allow=True, type="c", major=major, minor=minor, access="rwm")
        for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, None))
    ),
)
"""Nothing but null, zero, full, random, urandom, tty, ptmx and ptys; any node may be made, not opened."""
ALL_DEVICE_RULES = (DeviceCgroup(allow=True, access="rwm"),)


def resources(
    requested: pb.LinuxContainerResources, *, cgroup_version: int, devices: tuple[DeviceCgroup, ...] = ()
) -> Resources:
    """What a container's cgroup is set to. Zero and empty mean "not asked for", as the kubelet sends them.

    Without a swap limit swap is as high as memory, so none is used. `unified` needs cgroup v2.
    """
    return Resources(
        devices=devices,
        cpu=_cpu(requested),
        memory=_memory(requested),
        hugepage_limits=_hugepages(requested),
        unified=_unified(requested, cgroup_version),
    )


def changed(current: Resources, requested: pb.LinuxContainerResources, *, cgroup_version: int) -> Resources:
    """`current` with what `requested` names put over it, for UpdateContainerResources; device rules stay.

    A limit of memory and swap together that was asked for stays as well when only that of memory is changed.
    """
    update = resources(_with_memory(current.memory or Memory(), requested), cgroup_version=cgroup_version)
    cpu = _over(current.cpu, update.cpu) if update.cpu else current.cpu
    memory = _over(current.memory, update.memory) if update.memory else current.memory
    pages = {limit.page_size: limit for limit in (*current.hugepage_limits, *update.hugepage_limits)}
    return msgspec.structs.replace(
        current,
        cpu=cpu,
        memory=memory,
        hugepage_limits=tuple(pages.values()),
        unified=current.unified | update.unified,
    )


def _with_memory(held: Memory, requested: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    """`requested` with both limits of memory, if it has one of them."""
    limit, swap = requested.memory_limit_in_bytes, requested.memory_swap_limit_in_bytes
    if not limit and not swap:
        return requested
    filled = pb.LinuxContainerResources()
    filled.CopyFrom(requested)
    filled.memory_limit_in_bytes = limit or held.limit or 0
    filled.memory_swap_limit_in_bytes = swap or (held.swap if held.swap != held.limit else 0) or 0
    return filled


def _over(current: _Part | None, update: _Part) -> _Part:
    if current is None:
        return update
    asked = {name: value for name, value in msgspec.structs.asdict(update).items() if value not in (None, "")}
    return msgspec.structs.replace(current, **asked)


def oom_score_adj(requested: pb.LinuxContainerResources) -> int:
    """Always a number, so that the daemon's own is never inherited."""
    low, high = OOM_SCORE_ADJ
    if not low <= requested.oom_score_adj <= high:
        raise InvalidSpec(f"resources.oom_score_adj {requested.oom_score_adj}: not between {low} and {high}")
    return requested.oom_score_adj


def _cpu(requested: pb.LinuxContainerResources) -> CPU | None:
    shares, quota, period = requested.cpu_shares, requested.cpu_quota, requested.cpu_period
    if not 0 <= shares <= CPU_SHARES_MAX:
        raise InvalidSpec(f"resources.cpu_shares {shares}: not between 2 and {CPU_SHARES_MAX}")
    if period and not CPU_PERIOD_US[0] <= period <= CPU_PERIOD_US[1]:
        raise InvalidSpec(f"resources.cpu_period {period}: not between {CPU_PERIOD_US[0]} and {CPU_PERIOD_US[1]}")
    if quota and quota != -1 and quota < CPU_QUOTA_MIN_US:
        raise InvalidSpec(f"resources.cpu_quota {quota}: neither -1 nor at least {CPU_QUOTA_MIN_US}")
    for field, value in (("cpuset_cpus", requested.cpuset_cpus), ("cpuset_mems", requested.cpuset_mems)):
        if value and (len(value) > 4096 or not _CPU_LIST.fullmatch(value)):
            raise InvalidSpec(f"resources.{field} {show(value)}: not a list like 0-3,7")
    cpu = CPU(
        shares=max(shares, 2) if shares else None,
        quota=quota or None,
        period=period or None,
        cpus=requested.cpuset_cpus,
        mems=requested.cpuset_mems,
    )
    return None if cpu == CPU() else cpu


def _memory(requested: pb.LinuxContainerResources) -> Memory | None:
    limit, swap = requested.memory_limit_in_bytes, requested.memory_swap_limit_in_bytes
    for field, value in (("memory_limit_in_bytes", limit), ("memory_swap_limit_in_bytes", swap)):
        if value < -1:
            raise InvalidSpec(f"resources.{field} {value}: neither -1 nor a number of bytes")
    if limit > 0 and 0 < swap < limit:
        raise InvalidSpec(
            f"resources.memory_swap_limit_in_bytes {swap}: memory and swap together, below memory's limit {limit}"
        )
    if limit == -1 and swap > 0:
        raise InvalidSpec(f"resources.memory_swap_limit_in_bytes {swap}: memory itself is unlimited")
    if not limit:
        if swap > 0:
            raise InvalidSpec(f"resources.memory_swap_limit_in_bytes {swap}: needs memory_limit_in_bytes")
        return None
    return Memory(limit=limit, swap=swap or limit)


def _hugepages(requested: pb.LinuxContainerResources) -> tuple[HugepageLimit, ...]:
    limits: dict[str, HugepageLimit] = {}
    for entry in requested.hugepage_limits:
        if not _PAGE_SIZE.fullmatch(entry.page_size):
            raise InvalidSpec(f"resources.hugepage_limits {show(entry.page_size)}: not a page size like 2MB")
        if entry.limit > _INT64_MAX:
            raise InvalidSpec(f"resources.hugepage_limits {entry.page_size}: {entry.limit} bytes is out of range")
        if entry.page_size in limits:
            raise InvalidSpec(f"resources.hugepage_limits {entry.page_size}: given twice")
        limits[entry.page_size] = HugepageLimit(page_size=entry.page_size, limit=entry.limit)
    return tuple(limits.values())


def _unified(requested: pb.LinuxContainerResources, cgroup_version: int) -> dict[str, str]:
    if requested.unified and cgroup_version != 2:
        raise InvalidSpec(f"resources.unified {show(min(requested.unified))}: this host has cgroup v1")
    for name, value in requested.unified.items():
        if len(name) > 255 or not _UNIFIED_FILE.fullmatch(name):
            raise InvalidSpec(f"resources.unified {show(name)}: not the name of a cgroup v2 file")
        if name.startswith("cgroup.") and name not in _UNIFIED_CGROUP:
            raise InvalidSpec(f"resources.unified {name}: moves or stops processes, it is not a limit")
        if name.startswith("devices."):
            raise InvalidSpec(f"resources.unified {name}: not a file of cgroup v2")
        if not _UNIFIED_VALUE.fullmatch(value):
            raise InvalidSpec(f"resources.unified {name}: the value {show(value)} is not printable text")
    return dict(requested.unified)

"""Figures of containers and pods under the names that cAdvisor has given them: one table, pure.

A metric's value is a whole number, so that what is told in seconds has lost its fraction (CRI, `Metric.value`). One
whose figure this host doesn't tell is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from cri.api import cri_pb2 as pb
from net.statistics import Counters
from runtime.cgroup.processes import Processes
from runtime.cgroup.stats import PressureLine, Stats

BASE: Final = ("container", "id", "image", "name", "namespace", "pod")
"""The labels that each metric has first: cAdvisor's."""
_S: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Where a container writes: what it uses, and what the file system has."""

    device: str
    used_bytes: int
    size_bytes: int
    inodes_free: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of a running container at `read_ns` of its stats."""

    stats: Stats
    processes: Processes
    layer: FileSystem
    resources: pb.LinuxContainerResources
    started_ns: int
    device_name: Callable[[int, int], str]


Values: TypeAlias = Iterable[tuple[tuple[str, ...], int | None]]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: `labels` follow the base ones, and `values` gives theirs with each figure."""

    name: str
    help: str
    kind: pb.MetricType
    labels: tuple[str, ...]
    values: Callable[[Sample], Values]


def descriptors() -> list[pb.MetricDescriptor]:
    """What ListMetricDescriptors tells."""
    found = [(family.name, family.help, family.labels) for family in _FAMILIES]
    found += [(f"container_network_{name}", text, ("interface",)) for name, _, text in _NETWORK]
    return [pb.MetricDescriptor(name=name, help=text, label_keys=(*BASE, *labels)) for name, text, labels in found]


def of_container(base: Sequence[str], sample: Sample) -> list[pb.Metric]:
    """A container's metrics; `base` are the values of the base labels."""
    return [
        _metric(family.name, family.kind, sample.stats.read_ns, (*base, *labels), value)
        for family in _FAMILIES
        for labels, value in family.values(sample)
        if value is not None
    ]


def of_pod(base: Sequence[str], counters: Sequence[Counters], now_ns: int) -> list[pb.Metric]:
    """A pod's own metrics: its network's."""
    return [
        _metric(f"container_network_{name}", pb.COUNTER, now_ns, (*base, one.name), getattr(one, field))
        for name, field, _ in _NETWORK
        for one in counters
    ]


def _metric(name: str, kind: pb.MetricType, now_ns: int, labels: Sequence[str], value: int) -> pb.Metric:
    return pb.Metric(
        name=name, timestamp=now_ns, metric_type=kind, label_values=labels, value=pb.UInt64Value(value=value)
    )


# ---- the table -------------------------------------------------------------------------------------------------------


def _at(path: str, unit: int = 1) -> Callable[[Sample], Values]:
    """A figure by the names that lead to it from the sample, divided by `unit`; None on the way is None."""

    def values(sample: Sample) -> Values:
        found: object = sample
        for name in path.split("."):
            found = None if found is None else getattr(found, name)
        yield (), found // unit if isinstance(found, int) else None

    return values


def _devices(field: str) -> Callable[[Sample], Values]:
    def values(sample: Sample) -> Values:
        for device in sample.stats.io.devices if sample.stats.io else ():
            yield (sample.device_name(device.major, device.minor),), getattr(device, field)

    return values


def _layer(field: str) -> Callable[[Sample], Values]:
    return lambda sample: [((sample.layer.device,), getattr(sample.layer, field))]


def _operations(sample: Sample) -> Values:
    for device in sample.stats.io.devices if sample.stats.io else ():
        where = (sample.device_name(device.major, device.minor), str(device.major), str(device.minor))
        for operation, value in (("Read", device.read_bytes), ("Write", device.write_bytes)):
            yield (*where, operation), value


def _faults(sample: Sample) -> Values:
    memory = sample.stats.memory
    yield ("pgfault", "container"), memory.page_faults if memory else None
    yield ("pgmajfault", "container"), memory.major_page_faults if memory else None


def _hugepages(field: str) -> Callable[[Sample], Values]:
    return lambda sample: [((pages.page_size,), getattr(pages, field)) for pages in sample.stats.hugepages]


def _pressure(part: str, line: str) -> Callable[[Sample], Values]:
    def values(sample: Sample) -> Values:
        pressure = getattr(getattr(sample.stats, part), "pressure", None)
        found: PressureLine | None = getattr(pressure, line, None)
        yield (), None if found is None else found.total_ns // _S

    return values


def _limit(part: str) -> Callable[[Sample], Values]:
    """A limit in force: 0 where there is none (as cAdvisor tells it), nothing where there is nothing to be limited."""

    def values(sample: Sample) -> Values:
        found = getattr(sample.stats, part)
        yield (), None if found is None else found.limit or 0

    return values


def _asked(field: str) -> Callable[[Sample], Values]:
    """A limit of the request, where it has one."""
    return lambda sample: [((), getattr(sample.resources, field) or None)]


_C, _G = pb.COUNTER, pb.GAUGE
_DEVICE: Final = ("device",)
_FAMILIES: Final = tuple(
    Family(f"container_{name}", text, kind, labels, values)
    for name, kind, labels, values, text in (
        ("blkio_device_usage_total", _C, ("device", "major", "minor", "operation"), _operations,
         "bytes read from and written to a block device"),
        ("cpu_cfs_periods_total", _C, (), _at("stats.cpu.periods"), "enforcement periods of the CPU quota"),
        ("cpu_cfs_throttled_periods_total", _C, (), _at("stats.cpu.throttled_periods"), "periods throttled"),
        ("cpu_cfs_throttled_seconds_total", _C, (), _at("stats.cpu.throttled_ns", _S), "time throttled"),
        ("cpu_system_seconds_total", _C, (), _at("stats.cpu.system_ns", _S), "CPU time in the kernel"),
        ("cpu_usage_seconds_total", _C, ("cpu",),
         lambda sample: [(("total",), value) for _, value in _at("stats.cpu.usage_ns", _S)(sample)], "CPU time"),
        ("cpu_user_seconds_total", _C, (), _at("stats.cpu.user_ns", _S), "CPU time in user space"),
        ("file_descriptors", _G, (), _at("processes.descriptors"), "open file descriptors"),
        ("fs_inodes_free", _G, _DEVICE, _layer("inodes_free"), "free inodes of the writable layer's file system"),
        ("fs_inodes_total", _G, _DEVICE, _layer("inodes"), "inodes of the writable layer's file system"),
        ("fs_limit_bytes", _G, _DEVICE, _layer("size_bytes"), "size of the writable layer's file system"),
        ("fs_reads_bytes_total", _C, _DEVICE, _devices("read_bytes"), "bytes read"),
        ("fs_reads_total", _C, _DEVICE, _devices("reads"), "reads completed"),
        ("fs_usage_bytes", _G, _DEVICE, _layer("used_bytes"), "bytes in the writable layer"),
        ("fs_writes_bytes_total", _C, _DEVICE, _devices("write_bytes"), "bytes written"),
        ("fs_writes_total", _C, _DEVICE, _devices("writes"), "writes completed"),
        ("hugetlb_max_usage_bytes", _G, ("pagesize",), _hugepages("peak"), "most huge pages used at a time"),
        ("hugetlb_usage_bytes", _G, ("pagesize",), _hugepages("usage"), "huge pages in use"),
        ("last_seen", _G, (), _at("stats.read_ns", _S), "when the container was last seen"),
        ("memory_cache", _G, (), _at("stats.memory.cache"), "page cache"),
        ("memory_failcnt", _C, (), _at("stats.memory.limit_hits"), "times that the memory limit was hit"),
        ("memory_failures_total", _C, ("failure_type", "scope"), _faults, "page faults"),
        ("memory_kernel_usage", _G, (), _at("stats.memory.kernel"), "kernel memory"),
        ("memory_mapped_file", _G, (), _at("stats.memory.mapped_file"), "mapped files"),
        ("memory_max_usage_bytes", _G, (), _at("stats.memory.peak"), "most memory used at a time"),
        ("memory_rss", _G, (), _at("stats.memory.rss"), "anonymous memory"),
        ("memory_swap", _G, (), _at("stats.swap.usage"), "swap in use"),
        ("memory_usage_bytes", _G, (), _at("stats.memory.usage"), "memory in use, caches included"),
        ("memory_working_set_bytes", _G, (), _at("stats.memory.working_set"), "memory not to be had back at once"),
        ("oom_events_total", _C, (), _at("stats.oom_kills"), "processes killed for want of memory"),
        *(
            (f"pressure_{part}_{word}_seconds_total", _C, (), _pressure(attribute, line), f"time {text}")
            for part, attribute in (("cpu", "cpu"), ("io", "io"), ("memory", "memory"))
            for word, line, text in (
                ("stalled", "full", f"in which no task could go on for want of {part}"),
                ("waiting", "some", f"in which a task waited for {part}"),
            )
        ),
        ("processes", _G, (), _at("processes.count"), "processes"),
        ("sockets", _G, (), _at("processes.sockets"), "open sockets"),
        ("spec_cpu_period", _G, (), _asked("cpu_period"), "CPU period asked for, in microseconds"),
        ("spec_cpu_quota", _G, (), _asked("cpu_quota"), "CPU quota asked for, in microseconds"),
        ("spec_cpu_shares", _G, (), _asked("cpu_shares"), "CPU shares asked for"),
        ("spec_memory_limit_bytes", _G, (), _limit("memory"), "memory limit in force, 0 for none"),
        ("spec_memory_reservation_limit_bytes", _G, (), _at("stats.memory.reservation"), "memory that is kept free"),
        ("spec_memory_swap_limit_bytes", _G, (), _at("stats.swap.limit"), "swap limit in force"),
        ("start_time_seconds", _G, (), _at("started_ns", _S), "when the container was started, since the epoch"),
        ("threads", _G, (), _at("processes.threads"), "threads"),
        ("threads_max", _G, (), _limit("pids"), "most threads allowed, 0 for any number"),
        ("ulimits_soft", _G, ("ulimit",),
         lambda sample: [(("max_open_files",), sample.processes.open_files_limit)], "limit of the first process"),
    )
)  # fmt: skip
_NETWORK: Final = tuple(
    (f"{word}_{what}_total", f"{way}_{field}", f"{text} {word}d" if word == "receive" else f"{text} {word}ted")
    for word, way in (("receive", "rx"), ("transmit", "tx"))
    for what, field, text in (
        ("bytes", "bytes", "bytes"),
        ("errors", "errors", "errors in packets"),
        ("packets_dropped", "dropped", "dropped packets"),
        ("packets", "packets", "packets"),
    )
)

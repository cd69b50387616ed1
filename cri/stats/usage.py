"""A cgroup's figures as the CRI's messages: pure."""

from __future__ import annotations

from collections.abc import Sequence

from cri.api import cri_pb2 as pb
from net.statistics import Counters
from runtime.cgroup.stats import Cpu, Io, Memory, Pressure, PressureLine, Stats, Swap


def _value(number: int | None) -> pb.UInt64Value | None:
    return None if number is None else pb.UInt64Value(value=max(number, 0))


def _line(line: PressureLine) -> pb.PsiData:
    return pb.PsiData(Total=line.total_ns, Avg10=line.avg10, Avg60=line.avg60, Avg300=line.avg300)


def psi(pressure: Pressure | None) -> pb.PsiStats | None:
    """Totals in ns, averages in percent; `full` as the kernel gives it, zero where it does not."""
    if pressure is None:
        return None
    return pb.PsiStats(Some=_line(pressure.some), Full=_line(pressure.full) if pressure.full else pb.PsiData())


def cpu(stats: Cpu, read_ns: int, nano_cores: int | None) -> pb.CpuUsage:
    return pb.CpuUsage(
        timestamp=read_ns,
        usage_core_nano_seconds=_value(stats.usage_ns),
        usage_nano_cores=_value(nano_cores),
        psi=psi(stats.pressure),
    )


def memory(stats: Memory, read_ns: int) -> pb.MemoryUsage:
    return pb.MemoryUsage(
        timestamp=read_ns,
        working_set_bytes=_value(stats.working_set),
        available_bytes=_value(stats.available),
        usage_bytes=_value(stats.usage),
        rss_bytes=_value(stats.rss),
        page_faults=_value(stats.page_faults),
        major_page_faults=_value(stats.major_page_faults),
        psi=psi(stats.pressure),
    )


def swap(stats: Swap, read_ns: int) -> pb.SwapUsage:
    return pb.SwapUsage(
        timestamp=read_ns,
        swap_available_bytes=_value(stats.available),
        swap_usage_bytes=_value(stats.usage),
    )


def io(stats: Io, read_ns: int) -> pb.IoUsage:
    return pb.IoUsage(timestamp=read_ns, psi=psi(stats.pressure))


def container_stats(
    attributes: pb.ContainerAttributes, stats: Stats, nano_cores: int | None, layer: pb.FilesystemUsage | None
) -> pb.ContainerStats:
    """One container's figures; a part is absent where this host does not count it."""
    found = pb.ContainerStats(attributes=attributes, writable_layer=layer)
    if stats.cpu:
        found.cpu.CopyFrom(cpu(stats.cpu, stats.read_ns, nano_cores))
    if stats.memory:
        found.memory.CopyFrom(memory(stats.memory, stats.read_ns))
    if stats.swap:
        found.swap.CopyFrom(swap(stats.swap, stats.read_ns))
    if stats.io and stats.io.pressure:
        found.io.CopyFrom(io(stats.io, stats.read_ns))
    return found


def total(parts: list[pb.ContainerStats], read_ns: int) -> tuple[pb.CpuUsage, pb.MemoryUsage]:
    """A pod's CPU and memory where it has no cgroup of its own to read: the sum over its containers."""
    cpu_sum, memory_sum = pb.CpuUsage(timestamp=read_ns), pb.MemoryUsage(timestamp=read_ns)
    for field in ("usage_core_nano_seconds", "usage_nano_cores"):
        getattr(cpu_sum, field).value = sum(getattr(part.cpu, field).value for part in parts)
    for field in ("working_set_bytes", "usage_bytes", "rss_bytes", "page_faults", "major_page_faults"):
        getattr(memory_sum, field).value = sum(getattr(part.memory, field).value for part in parts)
    return cpu_sum, memory_sum


def network(counters: Sequence[Counters], read_ns: int) -> pb.NetworkUsage:
    """A pod's interfaces; the default one is that with the pod's address, which every network calls eth0."""
    found = pb.NetworkUsage(timestamp=read_ns)
    for one in counters:
        listed = found.default_interface if one.name == "eth0" else found.interfaces.add()
        listed.name = one.name
        for field in ("rx_bytes", "rx_errors", "tx_bytes", "tx_errors"):
            getattr(listed, field).value = getattr(one, field)
    return found

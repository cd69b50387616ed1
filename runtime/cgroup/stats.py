"""What a cgroup uses and has used: the kernel's files as figures, None for what this kernel doesn't tell.

Times in nanoseconds, sizes in bytes, counters since the cgroup was made, subtree included.
"""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from runtime.cgroup import files
from runtime.errors import NotFound

# cgroup v1 shows "unlimited" as the largest number of whole pages.
_V1_UNLIMITED: Final = 2**62
_ABSENT: Final = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class PressureLine:
    """Shares of time in percent over the last seconds, and all of it in `total_ns`."""

    avg10: float
    avg60: float
    avg300: float
    total_ns: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """Pressure stall information: some tasks, or all (`full`), were waiting. Only on v2."""

    some: PressureLine
    full: PressureLine | None


@dataclass(frozen=True, slots=True)
class Cpu:
    usage_ns: int
    user_ns: int | None
    system_ns: int | None
    periods: int | None
    throttled_periods: int | None
    throttled_ns: int | None
    pressure: Pressure | None


@dataclass(frozen=True, slots=True)
class Memory:
    """`working_set` is usage without the file cache that is reclaimed first; `available` is None without a limit.

    `reservation` is what the cgroup may keep under pressure.
    """

    usage: int
    working_set: int
    rss: int | None
    cache: int | None
    mapped_file: int | None
    kernel: int | None
    peak: int | None
    limit: int | None
    available: int | None
    page_faults: int | None
    major_page_faults: int | None
    limit_hits: int | None
    reservation: int | None
    pressure: Pressure | None


@dataclass(frozen=True, slots=True)
class Swap:
    """`available` is None without a limit."""

    usage: int
    limit: int | None
    available: int | None


@dataclass(frozen=True, slots=True)
class Pids:
    current: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Device:
    """I/O of one block device."""

    major: int
    minor: int
    read_bytes: int
    write_bytes: int
    reads: int
    writes: int


@dataclass(frozen=True, slots=True)
class Io:
    devices: tuple[Device, ...]
    pressure: Pressure | None


@dataclass(frozen=True, slots=True)
class Hugepages:
    page_size: str
    usage: int
    limit_hits: int | None
    limit: int | None
    peak: int | None


@dataclass(frozen=True, slots=True)
class Stats:
    """Read one after the other at about `read_ns` (since the epoch); a part is None without its controller."""

    read_ns: int
    cpu: Cpu | None
    memory: Memory | None
    swap: Swap | None
    pids: Pids | None
    io: Io | None
    hugepages: tuple[Hugepages, ...]
    oom_kills: int | None


def read_v2(directory: str) -> Stats:
    """Raises NotFound where the cgroup isn't there."""
    now_ns = time.time_ns()
    cpu = _pairs(_text(directory, "cpu.stat"))
    if not cpu and not os.path.isdir(directory):
        raise NotFound(f"cgroup {directory} does not exist")
    memory = _memory_v2(directory)
    swap_usage, swap_limit = _number(directory, "memory.swap.current"), _number(directory, "memory.swap.max")
    pids = _number(directory, "pids.current")
    return Stats(
        read_ns=now_ns,
        cpu=Cpu(
            usage_ns=cpu["usage_usec"] * 1000,
            user_ns=_thousand(cpu.get("user_usec")),
            system_ns=_thousand(cpu.get("system_usec")),
            periods=cpu.get("nr_periods"),
            throttled_periods=cpu.get("nr_throttled"),
            throttled_ns=_thousand(cpu.get("throttled_usec")),
            pressure=_pressure(directory, "cpu"),
        )
        if cpu
        else None,
        memory=memory,
        swap=None if swap_usage is None else Swap(swap_usage, swap_limit, _left(swap_limit, swap_usage)),
        pids=None if pids is None else Pids(pids, _number(directory, "pids.max")),
        io=_io_v2(directory),
        hugepages=_hugepages(
            directory, "max", lambda size: _pairs(_text(directory, f"hugetlb.{size}.events")).get("max")
        ),
        oom_kills=_pairs(_text(directory, "memory.events")).get("oom_kill"),
    )


def read_v1(directories: dict[str, str]) -> Stats:
    """`directories`: the cgroup's directory per controller. Raises NotFound where none of them is there."""
    now_ns = time.time_ns()
    if not any(os.path.isdir(directory) for directory in set(directories.values())):
        raise NotFound(f"cgroup {next(iter(directories.values()), '')} does not exist")
    memory_directory = directories.get("memory", "")
    memory, memory_stat = _memory_v1(memory_directory)
    pids = _number(directories.get("pids", ""), "pids.current")
    hugetlb = directories.get("hugetlb", "")
    return Stats(
        read_ns=now_ns,
        cpu=_cpu_v1(directories.get("cpuacct", ""), directories.get("cpu", "")),
        memory=memory,
        swap=_swap_v1(memory_directory, memory, memory_stat),
        pids=None if pids is None else Pids(pids, _number(directories["pids"], "pids.max")),
        io=_io_v1(directories.get("blkio", "")),
        hugepages=_hugepages(hugetlb, "limit_in_bytes", lambda size: _number(hugetlb, f"hugetlb.{size}.failcnt")),
        oom_kills=_pairs(_text(memory_directory, "memory.oom_control")).get("oom_kill"),
    )


def working_set(usage: int, inactive_file: int) -> int:
    """Memory that can't be taken back at once: what Kubernetes evicts by."""
    return max(usage - inactive_file, 0)


def _memory_v2(directory: str) -> Memory | None:
    usage = _number(directory, "memory.current")
    if usage is None:
        return None
    stat = _pairs(_text(directory, "memory.stat"))
    limit = _number(directory, "memory.max")
    used = working_set(usage, stat.get("inactive_file", 0))
    return Memory(
        usage=usage,
        working_set=used,
        rss=stat.get("anon"),
        cache=stat.get("file"),
        mapped_file=stat.get("file_mapped"),
        kernel=stat.get("kernel"),
        peak=_number(directory, "memory.peak"),
        limit=limit,
        available=_left(limit, used),
        page_faults=stat.get("pgfault"),
        major_page_faults=stat.get("pgmajfault"),
        limit_hits=_pairs(_text(directory, "memory.events")).get("max"),
        reservation=_number(directory, "memory.low"),
        pressure=_pressure(directory, "memory"),
    )


def _memory_v1(directory: str) -> tuple[Memory | None, dict[str, int]]:
    usage = _number(directory, "memory.usage_in_bytes")
    if usage is None:
        return None, {}
    stat = _pairs(_text(directory, "memory.stat"))
    limit = _number(directory, "memory.limit_in_bytes")
    used = working_set(usage, stat.get("total_inactive_file", 0))
    memory = Memory(
        usage=usage,
        working_set=used,
        rss=stat.get("total_rss"),
        cache=stat.get("total_cache"),
        mapped_file=stat.get("total_mapped_file"),
        kernel=_number(directory, "memory.kmem.usage_in_bytes"),
        peak=_number(directory, "memory.max_usage_in_bytes"),
        limit=limit,
        available=_left(limit, used),
        page_faults=stat.get("total_pgfault"),
        major_page_faults=stat.get("total_pgmajfault"),
        limit_hits=_number(directory, "memory.failcnt"),
        reservation=_number(directory, "memory.soft_limit_in_bytes"),
        pressure=None,
    )
    return memory, stat


def _swap_v1(directory: str, memory: Memory | None, stat: dict[str, int]) -> Swap | None:
    usage = stat.get("total_swap")
    if usage is None or memory is None or not os.path.exists(f"{directory}/memory.memsw.limit_in_bytes"):
        return None
    together = _number(directory, "memory.memsw.limit_in_bytes")
    limit = None if together is None or memory.limit is None else max(together - memory.limit, 0)
    return Swap(usage, limit, _left(limit, usage))


def _cpu_v1(cpuacct: str, cpu: str) -> Cpu | None:
    usage_ns = _number(cpuacct, "cpuacct.usage")
    if usage_ns is None:
        return None
    throttling = _pairs(_text(cpu, "cpu.stat"))
    return Cpu(
        usage_ns=usage_ns,
        user_ns=_number(cpuacct, "cpuacct.usage_user"),
        system_ns=_number(cpuacct, "cpuacct.usage_sys"),
        periods=throttling.get("nr_periods"),
        throttled_periods=throttling.get("nr_throttled"),
        throttled_ns=throttling.get("throttled_time"),
        pressure=None,
    )


def _io_v2(directory: str) -> Io | None:
    text = _text(directory, "io.stat")
    if text is None:
        return None
    devices = []
    for line in text.splitlines():
        name, *fields = line.split()
        major, _, minor = name.partition(":")
        # Devices without any I/O show no figures, or only those of io.cost.
        counts = {key: int(value) for key, _, value in (f.partition("=") for f in fields) if value.isdigit()}
        if minor and "rbytes" in counts:
            devices.append(
                Device(int(major), int(minor), counts["rbytes"], counts["wbytes"], counts["rios"], counts["wios"])
            )
    return Io(tuple(devices), _pressure(directory, "io"))


def _io_v1(directory: str) -> Io | None:
    sizes, counts = (
        _text(directory, f"blkio.throttle.{what}_recursive") for what in ("io_service_bytes", "io_serviced")
    )
    if sizes is None or counts is None:
        return None
    totals: dict[tuple[int, int], dict[str, int]] = {}
    for prefix, text in (("b", sizes), ("n", counts)):
        for line in text.splitlines():
            fields = line.split()  # "8:0 Read 4096", and "Total 4096" at the end
            if len(fields) == 3 and fields[1] in ("Read", "Write"):
                major, _, minor = fields[0].partition(":")
                totals.setdefault((int(major), int(minor)), {})[prefix + fields[1]] = int(fields[2])
    return Io(
        tuple(
            Device(*numbers, n.get("bRead", 0), n.get("bWrite", 0), n.get("nRead", 0), n.get("nWrite", 0))
            for numbers, n in totals.items()
        ),
        None,
    )


def _hugepages(directory: str, limit_file: str, limit_hits: Callable[[str], int | None]) -> tuple[Hugepages, ...]:
    usage_file = "current" if limit_file == "max" else "usage_in_bytes"
    found = []
    for size in page_sizes():
        usage = _number(directory, f"hugetlb.{size}.{usage_file}")
        if usage is not None:
            limit = _number(directory, f"hugetlb.{size}.{limit_file}")
            peak = _number(directory, f"hugetlb.{size}.max_usage_in_bytes")  # v1's alone
            found.append(Hugepages(size, usage, limit_hits(size), limit, peak))
    return tuple(found)


def page_sizes() -> tuple[str, ...]:
    """The huge page sizes of this machine, as cgroup files spell them ("2MB")."""
    try:
        names = os.listdir("/sys/kernel/mm/hugepages")
    except FileNotFoundError:
        return ()
    return tuple(page_size_name(int(name.removeprefix("hugepages-").removesuffix("kB"))) for name in sorted(names))


def page_size_name(size_kib: int) -> str:
    """A size as the hugetlb controller's files spell it: "64KB", "2MB", "1GB"."""
    for unit in ("KB", "MB"):
        if size_kib < 1024:
            return f"{size_kib}{unit}"
        size_kib //= 1024
    return f"{size_kib}GB"


def _pressure(directory: str, what: str) -> Pressure | None:
    text = _text(directory, f"{what}.pressure")
    if not text:
        return None
    lines: dict[str, PressureLine] = {}
    for line in text.splitlines():
        kind, *fields = line.split()
        values = dict(field.split("=") for field in fields)
        lines[kind] = PressureLine(
            float(values["avg10"]), float(values["avg60"]), float(values["avg300"]), int(values["total"]) * 1000
        )
    return Pressure(lines["some"], lines.get("full"))


def _text(directory: str, file: str) -> str | None:
    """The file's content; None where the kernel has no such file or the cgroup is gone."""
    if not directory:
        return None
    try:
        return files.read(f"{directory}/{file}")
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def _number(directory: str, file: str) -> int | None:
    """The file's only number; None also for "max" and for what v1 shows instead of it."""
    text = (_text(directory, file) or "").strip()
    value = int(text) if text.lstrip("-").isdigit() else None
    return None if value is None or value >= _V1_UNLIMITED or value < 0 else value


def _pairs(text: str | None) -> dict[str, int]:
    return {key: int(value) for key, _, value in (line.partition(" ") for line in (text or "").splitlines())}


def _thousand(value: int | None) -> int | None:
    return None if value is None else value * 1000


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(limit - used, 0)

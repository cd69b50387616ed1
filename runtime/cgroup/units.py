"""systemd's view of a cgroup: the names of slices, and limits as properties of a unit. Pure."""

import re
from collections.abc import Iterable
from typing import Any, Final

from runtime.cgroup.writes import Write
from runtime.errors import InvalidSpec

_SUFFIX: Final = ".slice"
_PART: Final = re.compile(r"[A-Za-z0-9:_.\\]+")
_LONGEST_NAME: Final = 255
_INFINITY: Final = 2**64 - 1
_SECOND_US: Final = 1_000_000
_PERCENT_US: Final = _SECOND_US // 100
_DEFAULT_PERIOD_US: Final = 100_000

Property = tuple[str, tuple[str, Any]]
"""A property's name, the D-Bus type of its value, and the value."""

_MEMORY: Final = {
    "memory.min": "MemoryMin",
    "memory.low": "MemoryLow",
    "memory.high": "MemoryHigh",
    "memory.max": "MemoryMax",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
}
_IO: Final = {
    "rbps": "IOReadBandwidthMax",
    "wbps": "IOWriteBandwidthMax",
    "riops": "IOReadIOPSMax",
    "wiops": "IOWriteIOPSMax",
}


def slice_path(name: str) -> str:
    """Where systemd puts a slice: "a-b.slice" is /a.slice/a-b.slice. Raises InvalidSpec for what names no slice."""
    parts = name.removesuffix(_SUFFIX).split("-")
    if not name.endswith(_SUFFIX) or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidSpec(f"{name!r} is no name of a systemd slice")
    if len(name) > _LONGEST_NAME:
        raise InvalidSpec(f"slice name of {len(name)} characters is too long: {name}")
    return "".join("/" + "-".join(parts[:count]) + _SUFFIX for count in range(1, len(parts) + 1))


def slice_below(parent: str, names: Iterable[str]) -> str:
    """The path of the slice `names` below a slice, given by its name or its path. Raises InvalidSpec."""
    name = parent.rstrip("/").rpartition("/")[2]
    try:
        path = slice_path(name)
    except InvalidSpec as error:
        raise InvalidSpec(
            f"cgroup parent {parent!r} is no systemd slice, as the cgroup driver systemd needs it"
        ) from error
    if parent.strip("/") not in (name, path.strip("/")):
        raise InvalidSpec(f"cgroup parent {parent!r}: systemd has slice {name} at {path}")
    escaped = (part.replace("\\", "\\x5c").replace("-", "\\x2d") for part in names)
    return slice_path("-".join([name.removesuffix(_SUFFIX), *escaped]) + _SUFFIX)


def slice_name(path: str) -> str:
    """The slice that a cgroup path leads to. Raises InvalidSpec for a path that leads to none."""
    name = path.rpartition("/")[2]
    if slice_path(name) != path:
        raise InvalidSpec(f"cgroup path {path!r}: systemd has slice {name} at {slice_path(name)}")
    return name


def properties(writes: Iterable[Write]) -> tuple[Property, ...]:
    """What systemd has to know of the limits, or it would undo them when it next looks after the unit.

    It knows nothing of the others and leaves them alone. Raises InvalidSpec for values that no kernel would take.
    """
    found: dict[str, tuple[str, Any]] = {}
    for write in writes:
        for value in write.values:
            try:
                _translate(write.file, value, found)
            except (ValueError, ArithmeticError) as error:
                raise InvalidSpec(f"{write.field} {write.asked}: no value for {write.file}") from error
    return tuple(found.items())


def _translate(file: str, value: str, found: dict[str, tuple[str, Any]]) -> None:
    if file in _MEMORY:
        found[_MEMORY[file]] = ("t", _number(value))
    elif file == "cpu.weight":
        found["CPUWeight"] = ("t", int(value))
    elif file == "cpu.max":
        quota, period_us = (*value.split(), "")[:2]
        found["CPUQuotaPerSecUSec"] = ("t", quota_per_second_us(quota, int(period_us or _DEFAULT_PERIOD_US)))
        if period_us:
            found["CPUQuotaPeriodUSec"] = ("t", int(period_us))
    elif file in ("cpuset.cpus", "cpuset.mems"):
        found["AllowedCPUs" if file == "cpuset.cpus" else "AllowedMemoryNodes"] = ("ay", bitmask(value))
    elif file == "io.weight":
        *device, weight = value.split()
        if not device or device == ["default"]:
            found["IOWeight"] = ("t", int(weight))
        else:
            _list(found, "IODeviceWeight").append((f"/dev/block/{device[0]}", int(weight)))
    elif file == "io.max":
        device_number, *limits = value.split()
        for key, _, rate in (item.partition("=") for item in limits):
            _list(found, _IO[key]).append((f"/dev/block/{device_number}", _number(rate)))


def quota_per_second_us(quota: str, period_us: int) -> int:
    """CPUQuotaPerSecUSec: rounded up to whole percents, which is all that systemd keeps over a reload."""
    if quota == "max":
        return _INFINITY
    exact = -(-int(quota) * _SECOND_US // period_us)
    return -(-exact // _PERCENT_US) * _PERCENT_US


def bitmask(numbers: str) -> bytes:
    """A list of CPUs or memory nodes ("0-2,5") as systemd takes it: bit n of the little-endian number is number n."""
    if not numbers.strip():
        return b""
    mask = 0
    for item in numbers.strip().split(","):
        first, _, last = item.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < 2**16:
            raise ValueError(numbers)
        mask |= (1 << high + 1) - (1 << low)
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def _number(value: str) -> int:
    number = _INFINITY if value == "max" else int(value)
    if not 0 <= number <= _INFINITY:
        raise ValueError(value)
    return number


def _list(found: dict[str, tuple[str, Any]], name: str) -> list[tuple[str, int]]:
    entries: list[tuple[str, int]] = found.setdefault(name, ("a(st)", []))[1]
    return entries

"""Limits as a list of file writes, and carrying such a list out: all of it or nothing, with errors a person can use."""

import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from runtime.cgroup import files
from runtime.cgroup.stats import Memory
from runtime.errors import CribError, Exhausted, InvalidSpec, NotFound, Unavailable

_LARGEST = 2**63 - 1
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,5}[KMG]B")
_THERE = {"cpuset.cpus": "/sys/devices/system/cpu/present", "cpuset.mems": "/sys/devices/system/node/online"}
_REFUSED = (
    errno.EINVAL, errno.ERANGE, errno.EBUSY, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDOM, errno.ENODEV,
    errno.ENXIO, errno.E2BIG, errno.EOPNOTSUPP, errno.EEXIST, errno.EOVERFLOW,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Write:
    """Values for one cgroup file, each with a write(2) of its own.

    `field` and `asked` say which limit of the request it stands for. A `tolerant` write may find no such file: what it
    asks for is the case then anyway. Without the file, `fallback` is made instead.
    """

    controller: str
    file: str
    values: tuple[str, ...]
    field: str
    asked: str
    tolerant: bool = False
    fallback: "Write | None" = None


Directory = Callable[[str], str]
"""The cgroup's directory for a controller."""


def limit(field: str, value: int, least: int = 0) -> int:
    """`value`, if it's -1 (unlimited) or at least `least`. Raises InvalidSpec."""
    if value != -1 and not least <= value <= _LARGEST:
        raise InvalidSpec(f"{field} {value}: not -1 nor from {least} to {_LARGEST}")
    return value


def positive(field: str, value: int) -> int:
    """`value`, if it's at least 1. Raises InvalidSpec."""
    if not 1 <= value <= _LARGEST:
        raise InvalidSpec(f"{field} {value}: not from 1 to {_LARGEST}")
    return value


def page_size(size: str) -> str:
    """`size`, if it's the name of a huge page size as cgroup files have it ("2MB"). Raises InvalidSpec."""
    if not _PAGE_SIZE.fullmatch(size):
        raise InvalidSpec(f"hugepage size {size[:32]!r}: not a number and KB, MB or GB")
    return size


def missing(write: Write) -> InvalidSpec:
    """The error for a limit that has no controller to enforce it."""
    return InvalidSpec(f"{write.field} {write.asked}: this host has no {write.controller} controller ({write.file})")


def check_numbers(write: Write) -> None:
    """Raises InvalidSpec for CPUs or memory nodes that this machine hasn't: v2 would take them, and use others."""
    for value in write.values:
        try:
            wanted = _numbers(value)
        except ValueError:
            raise InvalidSpec(f"{write.field} {write.asked}: not a list like 0-3,7") from None
        try:
            there = files.read(_THERE[write.file]).strip()
        except (KeyError, OSError):
            continue
        if not wanted <= _numbers(there):
            raise InvalidSpec(f"{write.field} {write.asked}: this machine has {there}")


def _numbers(text: str) -> set[int]:
    found: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < 2**16:
            raise ValueError(text)
        found.update(range(low, high + 1))
    return found


def fits(limit_bytes: int, usage_file: str) -> bool:
    """Whether a memory limit is above all that is used, caches included: then nobody has to look closer."""
    try:
        return limit_bytes == -1 or int(files.read(usage_file)) <= limit_bytes
    except OSError:  # whoever looks closer tells
        return False


def refuse_decrease(path: str, limit_bytes: int, now: Memory | None) -> None:
    """Raises InvalidSpec for a memory limit below what can't be taken back: the kernel would kill for it."""
    if now is not None and 0 < limit_bytes < now.working_set:
        raise InvalidSpec(
            f"memory.limit {limit_bytes}: below the present use of cgroup {path}, {now.working_set} bytes"
        )


def carry_out(path: str, directory: Directory, writes: Iterable[Write]) -> None:
    """Make the writes for the cgroup `path`; the first failure ends it. Raises CribError."""
    for write in writes:
        try:
            files.write(f"{directory(write.controller)}/{write.file}", *write.values)
        except OSError as error:
            if error.errno == errno.ENOENT and write.fallback:
                carry_out(path, directory, [write.fallback])
                continue
            refusal = _explain(error, path, directory(write.controller), write)
            if refusal is not None:
                raise refusal from error


def carry_out_or_revert(path: str, directory: Directory, writes: Iterable[Write]) -> tuple[Write, ...]:
    """As `carry_out`, but a failure puts back what the files held before, and what they hold already isn't written.

    Returns what `revert` takes to put it back later. Raises CribError.
    """
    undo: list[Write] = []
    try:
        for write in writes:
            try:
                held = files.read(f"{directory(write.controller)}/{write.file}")
                if (held.strip(),) == write.values:
                    continue
                undo.insert(0, replace(write, values=previous(held, write), tolerant=True, fallback=None))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise _explain(error, path, directory(write.controller), write) or error from error
            carry_out(path, directory, [write])
    except CribError:
        revert(directory, undo)
        raise
    return tuple(undo)


def revert(directory: Directory, undo: Iterable[Write]) -> None:
    """Put back what `carry_out_or_revert` has changed."""
    for write in undo:
        try:
            files.write(f"{directory(write.controller)}/{write.file}", *write.values)
        except OSError:
            # It held this a moment ago; what is refused now has been changed, or removed, by its owner.
            continue


def previous(text: str, write: Write) -> tuple[str, ...]:
    """What to write in order to bring a file that held `text` back there, after `write`."""
    lines = text.strip().splitlines()
    if not all(_is_device(value.split()[0]) for value in write.values if value.split()):
        if lines and lines[0].startswith("oom_kill_disable "):
            return (lines[0].split()[1],)
        return tuple(lines[:1]) or ("\n",)
    held = {line.split()[0]: line for line in lines}
    return tuple(
        held.get(device, f"{device} {_unlimited(write.file)}") for device in (v.split()[0] for v in write.values)
    )


def _is_device(key: str) -> bool:
    major, colon, minor = key.partition(":")
    return bool(colon) and major.isdigit() and minor.isdigit()


def _unlimited(file: str) -> str:
    match file:
        case "io.max":
            return "rbps=max wbps=max riops=max wiops=max"
        case "io.weight":
            return "default"
        case _:
            return "0"


def _explain(error: OSError, path: str, directory: str, write: Write) -> CribError | None:
    """The domain error for a write that failed; None where a tolerant one found no file."""
    cause = (error.strerror or str(error)).lower()
    if not os.path.isdir(directory):
        return NotFound(f"cgroup {path} does not exist")
    if error.errno == errno.ENOENT:
        return None if write.tolerant else missing(write)
    if error.errno in _REFUSED:
        return InvalidSpec(
            f"{write.field} {write.asked}: the kernel refuses it for cgroup {path} ({write.file}): {cause}"
        )
    if error.errno == errno.ENOMEM:
        return Exhausted(f"{write.field} {write.asked}: cgroup {path} ({write.file}): {cause}")
    return Unavailable(f"{write.field} {write.asked}: cgroup {path} ({write.file}): {cause}")

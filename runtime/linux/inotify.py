"""inotify(7): being told that somebody has written to a file."""

import os
import struct
from collections.abc import Iterator
from typing import Final

from runtime.linux.lib import check, function

IN_MODIFY: Final = 0x002
IN_IGNORED: Final = 0x8000

_EVENT: Final = struct.Struct("=iIII")  # wd, mask, cookie, length of the name that follows
_READ_BYTES: Final = 64 * 1024

_inotify_init1: Final = function("inotify_init1", 1)
_inotify_add_watch: Final = function("inotify_add_watch", 3)


def inotify_init() -> int:
    """A descriptor that reports what its watches see. Raises SyscallError."""
    return check("inotify_init1", _inotify_init1(os.O_CLOEXEC))


def add_watch(inotify: int, path: str, mask: int) -> int:
    """Watch the file `path`; returns the watch's number. Raises SyscallError."""
    return check("inotify_add_watch", _inotify_add_watch(inotify, os.fsencode(path), mask), path)


def read_events(inotify: int) -> Iterator[tuple[int, int]]:
    """Wait for the next events; (watch, mask) of each. Raises OSError."""
    data = os.read(inotify, _READ_BYTES)
    at = 0
    while at < len(data):
        watch, mask, _, name_bytes = _EVENT.unpack_from(data, at)
        yield watch, mask
        at += _EVENT.size + name_bytes

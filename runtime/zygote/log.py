"""A container's output in the CRI's log format: `TIME stdout|stderr F|P TEXT`, one line per line of output.

A line longer than 16 KiB is split into P parts; output that ends without a newline ends with a P part, so that
every byte can be told. Times are those of the read.
"""

from __future__ import annotations

import errno
import os
import stat
import time

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

LINE_BYTES: Final = 16 * 1024
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC


def open_log(path: str, directory: int | None = None) -> int:
    """A descriptor to append to the file, which is made (0640) if there is none. Raises OSError.

    `path` is relative to `directory`, where that is given. A container with a volume there may have left anything at
    the path: what is no regular file, such as a node of a disk's, is not opened.
    """
    for _ in range(40):  # as often as it may come and go meanwhile
        try:
            there = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            try:
                return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o640, dir_fd=directory)
            except FileExistsError:
                continue
        try:
            kind = stat.S_IFMT(os.fstat(there).st_mode)
            if kind == stat.S_IFLNK:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if kind not in (stat.S_IFREG, stat.S_IFDIR):
                raise OSError(errno.EINVAL, "not a regular file", path)
            return os.open(f"/proc/self/fd/{there}", _FLAGS)
        finally:
            os.close(there)
    raise OSError(errno.EAGAIN, "comes and goes", path)


class Clock:
    """Tells the time as the log's lines have it."""

    __slots__ = ("_second", "_text")

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def now(self) -> bytes:
        """RFC 3339 with nanoseconds, UTC."""
        second, rest = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{rest:09d}Z".encode("ascii")


clock: Final = Clock()


class Stream:
    """Turns one stream's bytes into log lines; keeps an unfinished line for its next bytes."""

    __slots__ = ("_name", "_rest", "_write")

    def __init__(self, write: Callable[[bytes], None], name: bytes) -> None:
        self._write = write
        self._name = name
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Log what is complete."""
        if lines := self.format(data, clock.now()):
            self._write(lines)

    def finish(self) -> None:
        """The stream has ended: log the unfinished line as a P part."""
        if self._rest:
            self._write(b"%b %b P %b\n" % (clock.now(), self._name, self._rest))
            self._rest = b""

    def format(self, data: bytes, now: bytes) -> bytes:
        """The lines for `data`, all with the time `now`."""
        if self._rest:
            data = self._rest + data
        full = b"%b %b F " % (now, self._name)
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if len(data) <= LINE_BYTES or not _has_long_line(data):
            body = full + data[: end - 1].replace(b"\n", b"\n" + full) + b"\n" if end else b""
        else:
            body = b"".join(self._split(line, now) for line in data[:end].split(b"\n")[:-1])
        part = b"%b %b P " % (now, self._name)
        while len(self._rest) > LINE_BYTES:
            body += part + self._rest[:LINE_BYTES] + b"\n"
            self._rest = self._rest[LINE_BYTES:]
        return body

    def _split(self, line: bytes, now: bytes) -> bytes:
        head = b"%b %b " % (now, self._name)
        parts = [line[at : at + LINE_BYTES] for at in range(0, len(line), LINE_BYTES)] or [b""]
        return b"".join(head + (b"F " if i == len(parts) - 1 else b"P ") + part + b"\n" for i, part in enumerate(parts))


def _has_long_line(data: bytes) -> bool:
    """Whether a line of `data` is longer than the limit: each window of that length must hold a newline."""
    at = 0
    while len(data) - at > LINE_BYTES:
        newline = data.rfind(b"\n", at, at + LINE_BYTES + 1)
        if newline < 0:
            return True
        at = newline + 1
    return False

"""A container's log as a stream of lines: the CRI's format, and its files under rotation.

Rotation is the kubelet's, and cribd's own: the file is renamed to PATH.YYYYMMDD-HHMMSS, with a fraction of the second
where there is one, a new one is written under the old name, and the renamed one may be replaced by PATH.….gz later.
"""

from __future__ import annotations

import gzip
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Final

from cri.cli.failure import Failure

_POLL_LEAST_S: Final = 0.005
_POLL_MOST_S: Final = 0.2
_READ_BYTES: Final = 1 << 16
_ROTATED: Final = re.compile(r"(\d{8}-\d{6}(?:\.\d+)?)(?:\.gz)?")


@dataclass(frozen=True, slots=True)
class Line:
    """`content` without the line's end; a partial one has none, for it goes on in the next. `time` is RFC 3339."""

    time: str
    stream: str
    partial: bool
    content: bytes

    @property
    def text(self) -> bytes:
        """As the container wrote it."""
        return self.content if self.partial else self.content + b"\n"


def parse(raw: bytes) -> Line:
    """A line of the CRI's log format, "TIME STREAM TAGS CONTENT". Raises Failure."""
    time, _, rest = raw.partition(b" ")
    stream, _, rest = rest.partition(b" ")
    tags, _, content = rest.partition(b" ")
    if stream not in (b"stdout", b"stderr") or not tags:
        raise Failure(f"a line of the log is not in the CRI's format: {raw[:80]!r}")
    return Line(time.decode("ascii", "replace"), stream.decode(), tags.split(b":")[0] == b"P", content)


class Log:
    """A log being read, from its oldest file on, while it is written and rotated."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._files: list[FileIO | gzip.GzipFile] = []
        self._known = ""  # the newest rotation whose file was opened, or was when it had the name of the log
        self._rest = b""

    def close(self) -> None:
        for file in self._files:
            file.close()

    def start_after(self, seconds: float) -> None:
        """Leave out files that nobody has written to since then, a Unix time."""
        self._look_for_rotation()
        while self._files and os.fstat(self._files[0].fileno()).st_mtime < seconds and len(self._files) > 1:
            self._files.pop(0).close()

    def start_at_tail(self, lines: int) -> None:
        """Leave out all but the last lines of what is there now."""
        self._look_for_rotation()
        for number in reversed(range(len(self._files))):
            lines -= _leave_tail(self._files[number], lines)
            if lines == 0:
                for file in self._files[:number]:
                    file.close()
                del self._files[:number]
                return

    def read(self) -> Iterator[Line]:
        """All whole lines that are there now and weren't yielded before."""
        self._look_for_rotation()
        while len(self._files) > 1:
            # The writer has left a file for good once it has written to the next one.
            yield from self._drain(self._files[0])
            if len(self._files) == 2 and not _is_written(self._files[1]):
                return
            yield from self._drain(self._files[0])
            self._files.pop(0).close()
        if self._files:
            yield from self._drain(self._files[0])

    def _look_for_rotation(self) -> None:
        """Open what there is to read after the file that is the last so far."""
        while True:
            names = self._rotations()
            current = _open(self._path)
            if names == self._rotations():  # so both are of one moment
                break
            if current:
                current.close()
        # The first of the new names is that of the file which had the log's name when it was looked for last.
        for name in names[1:] if self._files else names:
            if file := _open(f"{self._path}.{name}") or _open(f"{self._path}.{name}.gz"):
                self._files.append(file)
        if names:
            self._known = names[-1]
        if current and self._files and os.path.samestat(_stat(current), _stat(self._files[-1])):
            current.close()
        elif current:
            self._files.append(current)

    def _rotations(self) -> list[str]:
        """What the log's name was given when it was rotated, since the last look and in order."""
        directory, base = os.path.split(self._path)
        try:
            found = [name.removeprefix(f"{base}.") for name in os.listdir(directory or ".") if name.startswith(base)]
        except FileNotFoundError:
            return []
        return sorted({match[1] for name in found if (match := _ROTATED.fullmatch(name)) and match[1] > self._known})

    def _drain(self, file: FileIO | gzip.GzipFile) -> Iterator[Line]:
        if isinstance(file, FileIO) and _stat(file).st_size < file.tell():  # cut short, as copytruncate does
            file.seek(0)
        try:
            while chunk := file.read(_READ_BYTES):
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                yield from map(parse, lines)
        except (EOFError, gzip.BadGzipFile) as error:
            raise Failure(f"a rotated file of the log can't be read: {error}") from error


def _open(path: str) -> FileIO | gzip.GzipFile | None:
    try:
        return gzip.GzipFile(path) if path.endswith(".gz") else FileIO(path)
    except FileNotFoundError:
        return None


def _stat(file: FileIO | gzip.GzipFile) -> os.stat_result:
    return os.fstat(file.fileno())


def _is_written(file: FileIO | gzip.GzipFile) -> bool:
    return _stat(file).st_size > 0


def _leave_tail(file: FileIO | gzip.GzipFile, lines: int) -> int:
    """Have `file` be read from where the last `lines` of it begin; how many there are, at most so many."""
    if isinstance(file, FileIO):
        return _leave_plain_tail(file, lines)
    total = 0
    while chunk := file.read(_READ_BYTES):
        total += chunk.count(b"\n")
    file.seek(0)
    for _ in range(total - lines):
        file.readline()
    return min(total, lines)


def _leave_plain_tail(file: FileIO, lines: int) -> int:
    at, found = _stat(file).st_size, 0
    while at > 0:
        start = max(at - _READ_BYTES, 0)
        block = os.pread(file.fileno(), at - start, start)
        here = block.count(b"\n")
        if found + here > lines:  # the end of the line before them is in this block
            end = len(block)
            for _ in range(lines - found + 1):
                end = block.rindex(b"\n", 0, end)
            file.seek(start + end + 1)
            return lines
        found += here
        at = start
    return found


def follow(log: Log, ended: Callable[[], bool]) -> Iterator[Line]:
    """The log's lines as they come, until the container has `ended` and all is read."""
    wait_s, clock, over = _POLL_LEAST_S, threading.Event(), False
    while True:
        some = False
        for line in log.read():
            some = True
            yield line
        if over:
            return
        # A file on any file system, written by another process: polling, the less often the longer nothing comes.
        # Whether it has ended matters only while it is silent, and once it has, what it last wrote is still to be read.
        wait_s = _POLL_LEAST_S if some else min(wait_s * 1.5, _POLL_MOST_S)
        over = not some and ended()
        if not over:
            clock.wait(wait_s)

"""`crib logs`, and a container's log as a stream of lines: the CRI's format, and its file under rotation."""

from __future__ import annotations

import os
import sys
import threading
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Final

import msgspec

from cri.api import cri_pb2 as pb
from cri.cli import failure
from cri.cli.client import Client
from cri.cli.failure import Failure
from cri.cli.inventory import Inventory

_POLL_LEAST_S: Final = 0.005
_POLL_MOST_S: Final = 0.2
_READ_BYTES: Final = 1 << 16


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


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `crib logs -o json`."""

    time: str
    stream: str
    partial: bool
    log: str


def parse(raw: bytes) -> Line:
    """A line of the CRI's log format, "TIME STREAM TAGS CONTENT". Raises Failure."""
    time, _, rest = raw.partition(b" ")
    stream, _, rest = rest.partition(b" ")
    tags, _, content = rest.partition(b" ")
    if stream not in (b"stdout", b"stderr") or not tags:
        raise Failure(f"a line of the log is not in the CRI's format: {raw[:80]!r}")
    return Line(time.decode("ascii", "replace"), stream.decode(), tags.split(b":")[0] == b"P", content)


class Log:
    """A log file being read while it is written, and rotated: renamed, and written anew under the old name."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._files: list[FileIO] = []
        self._rest = b""

    def close(self) -> None:
        for file in self._files:
            file.close()

    def read(self) -> Iterator[Line]:
        """All whole lines that are there now and weren't yielded before."""
        self._look_for_rotation()
        while len(self._files) > 1:
            # The writer has left a file for good once it has written to the next one.
            yield from self._drain(self._files[0])
            if not self._is_written(self._files[1]):
                return
            yield from self._drain(self._files[0])
            self._files.pop(0).close()
        if self._files:
            yield from self._drain(self._files[0])

    def _look_for_rotation(self) -> None:
        try:
            now = os.stat(self._path)
        except FileNotFoundError:
            return
        if not self._files or not os.path.samestat(now, os.fstat(self._files[-1].fileno())):
            try:
                self._files.append(FileIO(self._path))
            except FileNotFoundError:
                return

    @staticmethod
    def _is_written(file: FileIO) -> bool:
        return os.fstat(file.fileno()).st_size > 0

    def _drain(self, file: FileIO) -> Iterator[Line]:
        if os.fstat(file.fileno()).st_size < file.tell():  # cut short, as copytruncate does
            file.seek(0)
        while chunk := file.read(_READ_BYTES):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            yield from map(parse, lines)


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


def write(lines: Iterable[Line], as_json: bool = False, timestamps: bool = False) -> None:
    """Print lines as the container did: each to its own stream, as raw bytes."""
    outputs = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    begins = dict.fromkeys(outputs, True)
    for line in lines:
        if as_json:
            text = line.text.decode("utf-8", "backslashreplace")
            entry = LogEntry(time=line.time, stream=line.stream, partial=line.partial, log=text)
            sys.stdout.buffer.write(msgspec.json.encode(entry) + b"\n")
            sys.stdout.buffer.flush()
            continue
        output = outputs[line.stream]
        if timestamps and begins[line.stream]:
            output.write(line.time.encode() + b" ")
        begins[line.stream] = not line.partial
        output.write(line.text)
        output.flush()


def path_of(client: Client, container: pb.Container) -> str:
    """The container's log file. Raises Failure where it has none."""
    path: str = client.call("ContainerStatus", container_id=container.id).status.log_path
    if not path:
        raise Failure(f"container {container.metadata.name} writes no log: its pod was run without a log directory")
    return path


def has_ended(client: Client, container_id: str) -> Callable[[], bool]:
    """Whether a container runs no more, or is gone, as asked of cribd."""

    def ended() -> bool:
        try:
            state = client.call("ContainerStatus", container_id=container_id).status.state
        except Failure as failed:
            if failed.code == failure.NOT_FOUND:
                return True
            raise
        return state in (pb.CONTAINER_EXITED, pb.CONTAINER_UNKNOWN)

    return ended


def logs(client: Client, options: Namespace) -> int:
    """Print a container's log."""
    container = Inventory(client).container(options.container)
    log = Log(path_of(client, container))
    try:
        past: Iterable[Line] = log.read()
        if options.tail is not None:
            past = deque(past, maxlen=options.tail)
        write(past, options.output == "json", options.timestamps)
        if options.follow:
            coming = follow(log, has_ended(client, container.id))
            write(coming, options.output == "json", options.timestamps)
    except PermissionError as error:
        raise Failure(f"cannot read the log: {error.filename}: permission denied: run it as root") from error
    finally:
        log.close()
    return 0

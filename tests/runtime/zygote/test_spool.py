"""A log on its way to a disk that is full, fails, or doesn't answer: whole lines, in order, and none lost uncounted."""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.linux.aio import Writer
from runtime.zygote.container import Container
from runtime.zygote.log import open_log
from runtime.zygote.spool import BUFFER_BYTES, STALL_S, Log, Spool
from tests.limits import scaled
from tests.runtime.zygote.test_log import content, parse

_NOTE = re.compile(rb"\S+ stderr F crib: (\d+) lines \((\d+) bytes\) of this log are missing here: [^\n]+\n")


def settle(spool: Spool) -> None:
    """Until nothing is on its way."""
    deadline = time.monotonic() + scaled(20)
    while (pause_s := spool.expire()) >= 0:
        assert time.monotonic() < deadline
        threading.Event().wait(pause_s)


@pytest.fixture
def spool() -> Spool:
    return Spool(lambda _: None)


def log_at(spool: Spool, path: Path, max_bytes: int = 0) -> Log:
    return Log(spool, "c", str(path), open_log(str(path)), 0, max_bytes)


def test_lines_get_there(spool: Spool, tmp_path: Path) -> None:
    log = log_at(spool, tmp_path / "log")
    lines = b"".join(b"%d\n" % number for number in range(5000))
    for at in range(0, len(lines), 1000):
        end = lines.rfind(b"\n", 0, at + 1000) + 1
        log.write(lines[lines.rfind(b"\n", 0, at) + 1 : end])
    log.write(b"x" * (3 * BUFFER_BYTES) + b"\n")
    done: list[int] = []
    log.flush(done.append)
    settle(spool)
    assert done == [0]
    log.close()
    assert (tmp_path / "log").read_bytes() == lines + b"x" * (3 * BUFFER_BYTES) + b"\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640 & ~_umask()
    assert log.lost_lines == 0


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_nothing_goes_to_the_old_file_once_reopened(spool: Spool, tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    log = log_at(spool, path)
    log.write(b"old\n")
    log.write(b"whichever\n")
    path.rename(old)
    done: list[int] = []
    log.reopen(open_log(str(path)), 0, done.append)
    while not done:
        spool.expire()
    before = old.read_bytes()
    log.write(b"new\n")
    settle(spool)
    log.close()
    assert done == [0]
    assert old.read_bytes() == before
    assert before + path.read_bytes() == b"old\nwhichever\nnew\n"
    assert path.read_bytes().endswith(b"new\n")


def test_what_a_full_disk_refuses_is_counted(tmp_path: Path) -> None:
    told: list[str] = []
    spool = Spool(told.append)
    log = Log(spool, "c", "/dev/full", os.open("/dev/full", os.O_WRONLY), 0, 0)
    log.write(b"lost\nas well\n")
    settle(spool)
    assert (log.lost_lines, log.lost_bytes, log.lost_why) == (2, 13, "no space left on device")
    assert told == ["c"]
    log.write(b"and this\n")
    log.reopen(open_log(str(tmp_path / "log")), 0, lambda _: None)
    settle(spool)
    log.write(b"kept\n")
    settle(spool)
    log.close()
    note, _, rest = (tmp_path / "log").read_bytes().partition(b"\n")
    found = _NOTE.fullmatch(note + b"\n")
    assert found
    assert (int(found[1]), int(found[2])) == (3, 22)
    assert rest == b"kept\n"


def test_a_log_that_grows_to_its_limit_is_told_of(tmp_path: Path) -> None:
    told: list[str] = []
    spool = Spool(told.append)
    log = log_at(spool, tmp_path / "log", 100)
    log.write(b"x" * 49 + b"\n")
    settle(spool)
    assert told == []
    log.write(b"x" * 49 + b"\n")
    settle(spool)
    assert told == ["c"]
    assert log.full
    log.reopen(open_log(str(tmp_path / "new")), 0, lambda _: None)
    assert not log.full
    log.close()


class Disk(Writer):
    """One whose behaviour is scripted: how much of each write it takes, and when."""

    __slots__ = ("content", "script")

    def __init__(self, script: Iterator[int | None]) -> None:
        self.script = script
        self.content = bytearray()

    def begin(self, fd: int, data: bytes) -> None:
        self.data = data

    def result(self) -> int | None:
        taken = next(self.script)
        if taken is None:
            return None
        if taken == 0:
            raise OSError(errno.EIO, "Input/output error")
        count = min(taken, len(self.data))
        self.content += self.data[:count]
        return count


_TEXT = st.text("abc", max_size=12).map(lambda text: f"T stdout F {text}\n".encode())


@given(
    steps=st.lists(st.lists(_TEXT, min_size=1, max_size=6).map(b"".join) | st.none(), max_size=30),
    script=st.lists(st.none() | st.just(0) | st.integers(1, 40) | st.just(1 << 20), max_size=60),
)
def test_no_line_is_torn_or_lost_uncounted(steps: list[bytes | None], script: list[int | None]) -> None:
    def behaviour() -> Iterator[int | None]:
        yield from script
        while True:
            yield 1 << 20

    disk = Disk(behaviour())
    spool = Spool(lambda _: None, lambda: disk)
    log = Log(spool, "c", "", -1, 0, 0)
    written = b""
    for lines in steps:
        if lines is None:
            spool.expire()
        else:
            written += lines
            log.write(lines)
    while log.busy:
        log.poll()
    for _ in range(len(script) + 2):  # then the disk is well, and the file says what it lacks
        written += b"T stdout F last\n"
        log.write(b"T stdout F last\n")
        while log.busy:
            log.poll()
    kept: list[bytes] = []
    missing_lines = missing_bytes = 0
    for line in bytes(disk.content).splitlines(keepends=True):
        if note := _NOTE.fullmatch(line):
            missing_lines += int(note[1])
            missing_bytes += int(note[2])
        else:
            kept.append(line)
    assert (missing_lines, missing_bytes) == (log.lost_lines, log.lost_bytes)
    assert len(kept) + log.lost_lines == written.count(b"\n")
    assert sum(map(len, kept)) + log.lost_bytes == len(written)
    remaining = iter(written.splitlines(keepends=True))
    assert all(line in remaining for line in kept), "in order"


def test_a_disk_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """First what fits is kept and output is left alone, then it is dropped; the file says where."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    answers: list[int | None] = [None]
    disk = Disk(iter(lambda: answers[0], "never"))
    spool = Spool(lambda _: None, lambda: disk)
    log = Log(spool, "c", "", -1, 0, 0)
    room: list[str] = []
    part = b"x" * 65535 + b"\n"

    def offer(count: int) -> Callable[[], None]:
        for _ in range(count):
            log.write(part)
        return lambda: room.append("read on")

    assert not log.crowded(offer(1))
    now[0] += 1  # before that it is only slow, and less is kept
    kept = BUFFER_BYTES // len(part) + 1  # and one that is on its way
    assert not log.crowded(offer(kept - 2))
    assert log.crowded(offer(1))
    assert spool.expire() > 0
    assert room == []
    now[0] += STALL_S
    spool.expire()
    assert room == ["read on"]
    assert not log.crowded(offer(7))
    assert (log.lost_lines, log.lost_bytes) == (7, 7 * len(part))
    answers[0] = 1 << 30
    while log.busy:
        log.poll()
    log.write(b"last\n")
    while log.busy:
        log.poll()
    text = bytes(disk.content)
    assert text[: kept * len(part)] == part * kept
    note, _, rest = text[kept * len(part) :].partition(b"\n")
    found = _NOTE.fullmatch(note + b"\n")
    assert found
    assert (int(found[1]), int(found[2])) == (7, 7 * len(part))
    assert rest == b"last\n"


def test_who_waits_for_a_disk_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    answers: list[int | None] = [None]
    spool = Spool(lambda _: None, lambda: Disk(iter(lambda: answers[0], "never")))
    log = Log(spool, "c", "", open_log(str(tmp_path / "old")), 0, 0)
    log.write(b"x\n")
    flushed: list[int] = []
    reopened: list[int] = []
    log.flush(flushed.append)
    log.reopen(open_log(str(tmp_path / "new")), 0, reopened.append)
    spool.expire()
    assert (flushed, reopened) == ([], [])
    now[0] += 2.5
    spool.expire()
    assert (flushed, reopened) == ([errno.EBUSY], [errno.EBUSY])
    assert spool.idle
    log.flush(flushed.append)
    assert flushed == [errno.EBUSY] * 2, "at once, now that it is known"
    answers[0] = 10
    spool.expire()
    log.flush(flushed.append)
    assert flushed[-1] == 0
    log.close()


def test_an_unfinished_line_is_there_when_the_end_is_told(spool: Spool, tmp_path: Path) -> None:
    mine, theirs = socket.socketpair()
    fields = {"id": "c", "own_pid": True, "watches": False, "cgroup": "", "kill_dirs": [], "memory_events": ""}
    container = Container(theirs, 1, mine, fields | {"stdin": False, "stdin_once": False})
    container.log = log_at(spool, tmp_path / "0.log")
    pipes = [os.pipe(), os.pipe()]
    for (reading, writing), name in zip(pipes, (b"stdout", b"stderr"), strict=True):
        container.add_stream(reading, name)
        os.write(writing, b"last words")
    os.close(pipes[0][1])
    container.drain()
    settle(spool)
    said = (tmp_path / "0.log").read_bytes()
    assert parse(said) == [(b"stdout", b"P", b"last words")]  # the other pipe's holder may go on with its line
    os.close(pipes[1][1])
    container.drain()
    settle(spool)
    assert content((tmp_path / "0.log").read_bytes()[len(said) :]) == b"last words"
    container.log.close()
    container.close()
    theirs.close()
    for reading, _ in pipes:
        os.close(reading)

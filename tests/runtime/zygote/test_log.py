"""The CRI log format: every byte can be told, lines are split at 16 KiB, times are one read's."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from runtime.zygote.container import Container
from runtime.zygote.log import LINE_BYTES, Log, Stream

_LINE = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([FP]) (.*)\n", re.DOTALL)


def parse(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """(stream, tag, text) of each line; fails on a line of another form."""
    found = []
    for line in re.findall(rb"[^\n]*\n", data):
        match = _LINE.fullmatch(line)
        assert match, line
        found.append((match[2], match[3], match[4]))
    return found


def content(data: bytes) -> bytes:
    """What was written, put together as a log reader does."""
    return b"".join(text + (b"\n" if tag == b"F" else b"") for _, tag, text in parse(data))


def test_lines_and_an_unfinished_one(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "0.log"))
    stream = Stream(log, b"stdout")
    stream.feed(b"one\ntwo\n\nthr")
    stream.feed(b"ee\nend")
    stream.finish()
    log.close()
    data = (tmp_path / "0.log").read_bytes()
    assert parse(data) == [
        (b"stdout", b"F", b"one"),
        (b"stdout", b"F", b"two"),
        (b"stdout", b"F", b""),
        (b"stdout", b"F", b"three"),
        (b"stdout", b"P", b"end"),
    ]
    assert os.stat(tmp_path / "0.log").st_mode & 0o777 == 0o640 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_long_line_is_split_at_16_kib(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "0.log"))
    stream = Stream(log, b"stderr")
    stream.feed(b"x" * (2 * LINE_BYTES + 5) + b"\nshort\n")
    log.close()
    lines = parse((tmp_path / "0.log").read_bytes())
    assert [(tag, len(text)) for _, tag, text in lines] == [
        (b"P", LINE_BYTES),
        (b"P", LINE_BYTES),
        (b"F", 5),
        (b"F", 5),
    ]


def test_reopen_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    log = Log(str(path))
    stream = Stream(log, b"stdout")
    stream.feed(b"old\n")
    path.rename(tmp_path / "0.log.1")
    log.reopen()
    stream.feed(b"new\n")
    log.close()
    assert content((tmp_path / "0.log.1").read_bytes()) == b"old\n"
    assert content(path.read_bytes()) == b"new\n"


def test_what_a_full_disk_refuses_is_counted() -> None:
    log = Log("/dev/full")
    Stream(log, b"stdout").feed(b"lost\n")
    log.close()
    assert log.dropped_bytes > len(b"lost\n")


@given(
    chunks=st.lists(
        st.binary(max_size=64) | st.integers(1, 3 * LINE_BYTES).map(lambda n: b"y" * n) | st.just(b"\n"), max_size=12
    )
)
def test_every_byte_can_be_told(chunks: list[bytes]) -> None:
    fd = os.memfd_create("log")
    log = MemoryLog(fd)
    stream = Stream(log, b"stdout")
    for chunk in chunks:
        if chunk:
            stream.feed(chunk)
    stream.finish()
    data = os.pread(fd, 1 << 22, 0)
    os.close(fd)
    assert content(data) == b"".join(chunks)
    assert all(len(text) <= LINE_BYTES for _, _, text in parse(data))


class MemoryLog(Log):
    """A log whose file is a memfd."""

    __slots__ = ("_memory",)

    def __init__(self, fd: int) -> None:
        self._memory = fd
        super().__init__("memory")

    def _open(self) -> int:
        return self._memory


def test_an_unfinished_line_is_there_when_the_end_is_told(tmp_path: Path) -> None:
    mine, theirs = socket.socketpair()
    fields = {"id": "c", "own_pid": True, "watches": False, "cgroup": "", "kill_dirs": [], "memory_events": ""}
    container = Container(1, 0, os.dup(0), mine, fields | {"stdin": False, "stdin_once": False})
    container.log = Log(str(tmp_path / "0.log"))
    pipes = [os.pipe(), os.pipe()]
    for (reading, writing), name in zip(pipes, (b"stdout", b"stderr"), strict=True):
        container.add_stream(reading, name)
        os.write(writing, b"last words")
    os.close(pipes[0][1])
    container.drain()
    said = (tmp_path / "0.log").read_bytes()
    assert parse(said) == [(b"stdout", b"P", b"last words")]  # the other pipe's holder may go on with its line
    os.close(pipes[1][1])
    container.drain()
    assert parse((tmp_path / "0.log").read_bytes()[len(said) :]) == [(b"stderr", b"P", b"last words")]
    container.log.close()
    container.close()
    theirs.close()
    for reading, _ in pipes:
        os.close(reading)

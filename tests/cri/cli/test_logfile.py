"""A container's log as its reader sees it: whole lines, rotation, and the end."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.cli.failure import Failure
from cri.cli.logfile import Line, Log, follow, parse

TIME = b"2026-11-22T10:00:00.000000000Z"


def line(text: str) -> bytes:
    return TIME + b" stdout F " + text.encode() + b"\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "0.log"


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    log = Log(str(path))
    yield log
    log.close()


def texts(log: Log) -> list[str]:
    return [line.content.decode() for line in log.read()]


@given(st.binary().filter(lambda content: b"\n" not in content), st.sampled_from(["stdout", "stderr"]), st.booleans())
def test_parse_gives_back_what_was_written(content: bytes, stream: str, partial: bool) -> None:
    tags = b"P" if partial else b"F"
    raw = TIME + b" " + stream.encode() + b" " + tags + b" " + content
    assert parse(raw) == Line(TIME.decode(), stream, partial, content)


@pytest.mark.parametrize("raw", [b"", b"x", TIME + b" stdin F x", TIME + b" stdout"])
def test_parse_refuses_other_formats(raw: bytes) -> None:
    with pytest.raises(Failure, match="not in the CRI's format"):
        parse(raw)


def test_a_line_is_told_once_and_whole(path: Path, log: Log) -> None:
    assert texts(log) == []
    whole = line("one") + line("two")
    with path.open("ab", buffering=0) as writer:
        for at in range(len(whole)):
            writer.write(whole[at : at + 1])
            before = len(texts(log))
            assert before <= 1
        writer.write(line("three"))
        assert texts(log) == ["three"]


def test_rotation_loses_nothing(path: Path, log: Log) -> None:
    """The kubelet's way: rename, then ReopenContainerLog; the writer stays on the old file until it is answered."""
    with path.open("ab", buffering=0) as old:
        old.write(line("1"))
        assert texts(log) == ["1"]
        old.write(line("2"))
        path.rename(f"{path}.20261122")
        assert texts(log) == ["2"]
        with path.open("ab", buffering=0) as new:
            old.write(line("3"))
            assert texts(log) == ["3"]
            old.write(line("4"))
            new.write(line("5"))
            assert texts(log) == ["4", "5"]
            new.write(line("6"))
            assert texts(log) == ["6"]


def rotate(path: Path, second: int, *, compress: bool = False) -> None:
    """As the kubelet does, which compresses all but the newest."""
    for old in path.parent.glob(f"{path.name}.*[0-9]"):
        if compress:
            Path(f"{old}.gz").write_bytes(gzip.compress(old.read_bytes()))
            old.unlink()
    path.rename(f"{path}.20261122-1000{second:02d}")


@pytest.mark.parametrize("compress", [False, True])
def test_rotations_between_two_looks_lose_nothing(path: Path, log: Log, compress: bool) -> None:
    path.write_bytes(line("1"))
    assert texts(log) == ["1"]
    with path.open("ab") as writer:
        writer.write(line("2"))
    rotate(path, 1)
    for number in range(3, 7):
        path.write_bytes(line(str(number)))
        rotate(path, number, compress=compress)
    path.write_bytes(line("7"))
    assert texts(log) == ["2", "3", "4", "5", "6", "7"]
    rotate(path, 8, compress=compress)
    assert texts(log) == []
    path.write_bytes(line("8"))
    assert texts(log) == ["8"]


def written(path: Path, files: list[int], compress: bool) -> list[str]:
    """A log of so many lines in each of its files; the lines."""
    number = 0
    for second, size in enumerate(files):
        if path.exists():
            rotate(path, second, compress=compress)
        path.write_bytes(b"".join(line(f"{n} {'x' * (n * 37 % 9000)}") for n in range(number, number + size)))
        number += size
    return [f"{n} {'x' * (n * 37 % 9000)}" for n in range(number)]


@pytest.mark.parametrize("compress", [False, True])
def test_what_was_rotated_before_is_read_first(path: Path, log: Log, compress: bool) -> None:
    lines = written(path, [3, 1, 200, 2], compress)
    assert texts(log) == lines


@settings(max_examples=40)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(0, 130), st.booleans())
def test_the_tail_is_that_of_all_files_together(files: list[int], wanted: int, compress: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "0.log")
        lines = written(path, files, compress)
        log = Log(str(path))
        log.start_at_tail(wanted)
        assert texts(log) == lines[len(lines) - min(wanted, len(lines)) :]
        log.close()


def test_files_that_are_older_are_left_out(path: Path, log: Log) -> None:
    written(path, [1, 1, 1], False)
    for file in path.parent.glob("*.20*"):
        os.utime(file, (1000, 1000))
    log.start_after(2000)
    assert texts(log) == ["2 " + "x" * 74]


def test_a_file_cut_short_is_read_from_its_start(path: Path, log: Log) -> None:
    path.write_bytes(line("a long first line"))
    assert texts(log) == ["a long first line"]
    with path.open("r+b") as writer:
        writer.truncate()
        writer.write(line("b"))
    assert texts(log) == ["b"]


def test_follow_tells_what_was_written_before_the_end(path: Path, log: Log) -> None:
    asked = 0

    def ended() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            path.write_bytes(line("last words"))
        return asked == 2

    assert [line.content for line in follow(log, ended)] == [b"last words"]

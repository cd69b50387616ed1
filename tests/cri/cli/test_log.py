"""A container's log as its reader sees it: whole lines, rotation, and the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.cli.failure import Failure
from cri.cli.log import Line, Log, follow, parse

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


def test_two_rotations_between_two_looks_lose_only_what_is_not_to_be_seen(path: Path, log: Log) -> None:
    path.write_bytes(line("1"))
    assert texts(log) == ["1"]
    path.rename(f"{path}.1")
    path.write_bytes(line("2"))
    assert texts(log) == ["2"]
    path.rename(f"{path}.2")
    path.write_bytes(line("3"))
    assert texts(log) == ["3"]


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

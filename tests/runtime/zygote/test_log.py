"""The CRI log format: every byte can be told, lines are split at 16 KiB, times are one read's."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from runtime.zygote.log import LINE_BYTES, Stream

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


class Written:
    """A stream, and what comes out of it."""

    def __init__(self, name: bytes = b"stdout") -> None:
        self.parts: list[bytes] = []
        self.stream = Stream(self.parts.append, name)

    @property
    def data(self) -> bytes:
        return b"".join(self.parts)


def test_lines_and_an_unfinished_one() -> None:
    written = Written()
    written.stream.feed(b"one\ntwo\n\nthr")
    written.stream.feed(b"ee\nend")
    written.stream.finish()
    assert parse(written.data) == [
        (b"stdout", b"F", b"one"),
        (b"stdout", b"F", b"two"),
        (b"stdout", b"F", b""),
        (b"stdout", b"F", b"three"),
        (b"stdout", b"P", b"end"),
    ]


def test_a_long_line_is_split_at_16_kib() -> None:
    written = Written(b"stderr")
    written.stream.feed(b"x" * (2 * LINE_BYTES + 5) + b"\nshort\n")
    assert [(tag, len(text)) for _, tag, text in parse(written.data)] == [
        (b"P", LINE_BYTES),
        (b"P", LINE_BYTES),
        (b"F", 5),
        (b"F", 5),
    ]


@given(
    chunks=st.lists(
        st.binary(max_size=64)
        | st.integers(1, 3 * LINE_BYTES).map(lambda n: b"y" * n)
        | st.just(b"\n")
        | st.just(b"over\r\n"),  # a terminal's
        max_size=12,
    )
)
def test_every_byte_can_be_told(chunks: list[bytes]) -> None:
    written = Written()
    for chunk in chunks:
        if chunk:
            written.stream.feed(chunk)
    written.stream.finish()
    assert content(written.data) == b"".join(chunks)
    assert all(len(text) <= LINE_BYTES for _, _, text in parse(written.data))
    assert all(part.endswith(b"\n") for part in written.parts), "a log takes whole lines"

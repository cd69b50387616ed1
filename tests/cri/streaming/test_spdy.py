"""The SPDY machine against frames made by hand and by chance."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.streaming import spdy
from cri.streaming.spdy import Spdy
from cri.streaming.wire import UNLIMITED, Data, Ended, Event, Opened, Reset, Room, WireError
from tests.cri.streaming import frames


class Pair:
    """A server's machine, and the client's half of its compression."""

    def __init__(self) -> None:
        self.server = Spdy()
        self.compressor = frames.Compressor()
        self.reader = frames.Reader()
        self.said()

    def feed(self, data: bytes) -> list[Event]:
        return self.server.feed(data)

    def open(self, stream: int, flags: int = 0, **headers: str) -> list[Event]:
        return self.feed(self.compressor.syn_stream(stream, headers, flags))

    def said(self) -> list[frames.Frame]:
        return list(self.reader.feed(self.server.take()))


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_a_connection_starts_with_the_windows_it_gives() -> None:
    said = list(frames.Reader().feed(Spdy().take()))
    assert [(frame.kind, frame.stream) for frame in said] == [(frames.SETTINGS, 1), (frames.WINDOW_UPDATE, 0)]
    assert said[0].word(2) == spdy.WINDOW_BYTES


def test_a_stream_opens_answers_and_ends_in_halves(pair: Pair) -> None:
    assert pair.open(1, streamtype="stdin", Port="80") == [Opened(1, {"streamtype": "stdin", "port": "80"}, False)]
    pair.server.reply(1)
    pair.server.send(1, b"out")
    assert pair.feed(frames.data(1, b"in") + frames.data(1, b"!", frames.FIN)) == [
        Data(1, b"in"),
        Data(1, b"!"),
        Ended(1),
    ]
    pair.server.end(1)
    pair.server.send(1, b"after the end")
    assert [(f.kind, f.flags, f.body if not f.kind else b"") for f in pair.said()] == [
        (frames.SYN_REPLY, 0, b""),
        (0, 0, b"out"),
        (0, frames.FIN, b""),
    ]
    assert pair.server.streams == 0
    assert pair.feed(frames.data(1, b"late")) == []


def test_headers_share_one_compression(pair: Pair) -> None:
    for stream in range(1, 200, 2):
        (opened,) = pair.open(stream, streamtype="data", requestid=str(stream))
        assert isinstance(opened, Opened)
        assert opened.headers["requestid"] == str(stream)


def test_a_client_without_windows_is_not_held_to_any(pair: Pair) -> None:
    pair.open(1, streamtype="stdout")
    assert pair.server.room(1) == 64 << 10
    pair.server.send(1, bytes(64 << 10))
    pair.said()
    assert pair.server.room(1) == 0
    (probe,) = pair.said()
    assert probe.kind == frames.PING
    assert pair.server.room(1) == 0
    assert pair.said() == [], "asked once"
    assert pair.feed(frames.ping(probe.word(0))) == [Room()]
    assert pair.server.room(1) == UNLIMITED


@pytest.mark.parametrize("sign", [frames.settings(1000), frames.window_update(0, 1)])
def test_a_client_with_windows_is(pair: Pair, sign: bytes) -> None:
    pair.feed(sign)
    pair.open(1, streamtype="stdout")
    room = pair.server.room(1)
    assert room == (1000 if sign == frames.settings(1000) else 64 << 10)
    pair.server.send(1, bytes(room))
    assert pair.server.room(1) == 0
    assert pair.said()[-1].kind == 0, "nobody is asked"
    assert Room() in pair.feed(frames.window_update(1, 10))
    assert pair.server.room(1) == (10 if room == 1000 else 1), "the session's window counts as well"


def test_settings_change_the_windows_of_open_streams(pair: Pair) -> None:
    pair.open(1, streamtype="stdout")
    pair.server.send(1, bytes(100))
    pair.feed(frames.settings(150))
    assert pair.server.room(1) == 50
    pair.feed(frames.settings(50))
    assert pair.server.room(1) == 0, "a window may be below zero"
    pair.feed(frames.window_update(1, 60))
    assert pair.server.room(1) == 10


def test_what_was_consumed_may_be_sent_again(pair: Pair) -> None:
    pair.feed(frames.settings(1 << 20))
    pair.open(1, streamtype="stdin")
    half = spdy.WINDOW_BYTES // 2
    assert pair.feed(frames.data(1, bytes(2 * half))) == [Data(1, bytes(2 * half))]
    pair.server.consumed(1, half - 1)
    assert pair.said() == []
    pair.server.consumed(1, 1)
    (update,) = pair.said()
    assert (update.kind, update.stream, update.word(1)) == (frames.WINDOW_UPDATE, 1, half)
    assert isinstance(pair.feed(frames.data(1, bytes(half)))[0], Data)
    assert pair.feed(frames.data(1, b"!")) == [Reset(1)], "more than the window of one that keeps windows"
    assert pair.said()[-1].word(1) == spdy.FLOW_CONTROL_ERROR


def test_a_window_can_overflow(pair: Pair) -> None:
    pair.open(1)
    assert pair.feed(frames.window_update(1, 0x7FFFFFFF)) == [Reset(1)]
    with pytest.raises(WireError, match="overflow"):
        pair.feed(frames.window_update(0, 0x7FFFFFFF))
    assert pair.said()[-1].kind == frames.GOAWAY


def test_pings_are_answered(pair: Pair) -> None:
    pair.feed(frames.ping(7))
    (answer,) = pair.said()
    assert (answer.kind, answer.word(0)) == (frames.PING, 7)
    pair.feed(frames.ping(2))
    assert pair.said() == [], "never asked"


def test_a_stream_opened_twice_is_over(pair: Pair) -> None:
    pair.open(1, streamtype="stdin")
    assert pair.open(1, streamtype="stdin") == [Reset(1)]
    assert pair.said()[-1].word(1) == spdy.PROTOCOL_ERROR
    assert pair.server.streams == 0


def test_streams_out_of_order_are_taken(pair: Pair) -> None:
    assert isinstance(pair.open(5)[0], Opened)
    assert isinstance(pair.open(3)[0], Opened)


def test_too_many_streams_are_refused(pair: Pair) -> None:
    for number in range(spdy.STREAMS_LIMIT):
        pair.open(2 * number + 1)
    pair.said()
    assert pair.open(2 * spdy.STREAMS_LIMIT + 1) == []
    assert pair.said()[-1].word(1) == spdy.REFUSED_STREAM


def bomb() -> bytes:
    """Under 32 KiB that decompress to 20 MiB."""
    return frames.Compressor().syn_stream_of(1, struct.pack(">I", 1) + bytes(20 << 20))


@pytest.mark.parametrize(
    "bad",
    [
        struct.pack(">HHI", 0x8002, frames.PING, 4) + b"\0\0\0\1",
        struct.pack(">HHI", 0x8003, frames.SYN_STREAM, spdy.CONTROL_LIMIT_BYTES + 1),
        struct.pack(">HHI", 0x8003, frames.SYN_STREAM, 10) + bytes(10),
        frames.control(frames.SYN_STREAM, b"\0\0"),
        frames.control(frames.SYN_STREAM, bytes(10) + b"no zlib"),
        frames.control(frames.SYN_REPLY, bytes(8)),
        frames.control(frames.SETTINGS, struct.pack(">II", 1000, 7)),
        frames.settings(0xFFFFFFFF),
        frames.control(frames.WINDOW_UPDATE, b"\0"),
        frames.control(frames.RST_STREAM, b""),
        frames.data(0, b"x"),
        frames.data(77, b"x"),
        frames.Compressor().syn_stream(2, {"streamtype": "stdin"}),
        frames.Compressor().syn_stream_of(1, struct.pack(">I", 0xFFFFFFFF)),
        frames.Compressor().syn_stream_of(1, struct.pack(">III", 1, 0xFFFFFFF0, 3) + b"abc"),
        frames.Compressor().syn_stream_of(1, struct.pack(">II", 1, 2) + b"\xff\xfe" + struct.pack(">I", 0)),
        frames.Compressor().syn_stream_of(1, struct.pack(">I", 1000) + bytes(8 * 1000)),
        bomb(),
    ],
)
def test_a_broken_connection_is_told_and_takes_nothing_more(pair: Pair, bad: bytes) -> None:
    with pytest.raises(WireError):
        pair.feed(bad)
    assert pair.said()[-1].kind == frames.GOAWAY
    assert pair.feed(frames.ping(1)) == []
    assert pair.said() == []


def test_frames_of_unknown_kinds_are_passed_over(pair: Pair) -> None:
    assert pair.feed(frames.control(200, b"whatever") + frames.control(frames.GOAWAY, bytes(8))) == []
    assert isinstance(pair.open(1)[0], Opened)


Action = tuple[str, int, bytes]
_actions = st.lists(
    st.tuples(
        st.sampled_from(("open", "data", "fin", "rst", "ping", "settings", "update", "headers")),
        st.integers(0, 6).map(lambda n: 2 * n + 1),
        st.binary(max_size=3000),
    ),
    max_size=40,
)


def client_bytes(actions: list[Action]) -> bytes:
    compressor = frames.Compressor()
    parts = []
    opened: set[int] = set()
    for what, stream, body in actions:
        if what == "open":
            parts.append(compressor.syn_stream(stream, {"streamtype": "x", "y": body[:20].hex()}))
            opened.add(stream)
        elif what in ("data", "fin") and stream <= max(opened, default=0):
            parts.append(frames.data(stream, body, frames.FIN if what == "fin" else 0))
        elif what == "rst":
            parts.append(frames.rst(stream))
        elif what == "ping":
            parts.append(frames.ping(stream))
        elif what == "settings":
            parts.append(frames.settings(len(body)))
        elif what == "update":
            parts.append(frames.window_update(stream, len(body) + 1))
        elif what == "headers":
            block = compressor(frames.headers_block({"a": "b"}))
            parts.append(frames.control(frames.HEADERS, struct.pack(">I", stream) + block))
    return b"".join(parts)


def merged(events: list[Event]) -> list[Event]:
    """With neighbouring data joined: how bytes are cut is no matter."""
    out: list[Event] = []
    for event in events:
        if isinstance(event, Data) and out and isinstance(out[-1], Data) and out[-1].stream == event.stream:
            out[-1] = Data(event.stream, out[-1].data + event.data)
        else:
            out.append(event)
    return out


@given(_actions, st.lists(st.integers(1, 700), max_size=30))
def test_it_does_not_matter_how_bytes_arrive(actions: list[Action], cuts: list[int]) -> None:
    sent = client_bytes(actions)
    whole, parts = Spdy(), Spdy()
    expected = merged(whole.feed(sent))
    events: list[Event] = []
    at = 0
    for cut in [*cuts, len(sent)]:
        events += parts.feed(sent[at : at + cut])
        at += cut
    assert merged(events) == expected
    assert parts.take() == whole.take()
    assert parts.streams == whole.streams


@given(_actions)
def test_streams_tell_a_story_that_makes_sense(actions: list[Action]) -> None:
    opened: set[int] = set()
    ended: set[int] = set()
    for event in Spdy().feed(client_bytes(actions)):
        if isinstance(event, Opened):
            assert event.stream not in opened
            opened.add(event.stream)
            ended.discard(event.stream)
        elif isinstance(event, Data | Ended):
            assert event.stream in opened
            assert event.stream not in ended
            if isinstance(event, Ended):
                ended.add(event.stream)
        elif isinstance(event, Reset):
            assert event.stream in opened
            opened.discard(event.stream)


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=10), _actions)
def test_garbage_ends_in_one_way_only(garbage: list[bytes], actions: list[Action]) -> None:
    machine = Spdy()
    broken = False
    for data in [client_bytes(actions), *garbage]:
        try:
            machine.feed(data)
            assert not broken or machine.feed(data) == []
        except WireError:
            assert not broken
            broken = True
    machine.close()
    assert list(frames.Reader().feed(machine.take()))[-1].kind == frames.GOAWAY

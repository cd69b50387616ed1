"""The WebSocket machines against wsproto's client half, whole and in pieces."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage

from cri.streaming import websocket
from cri.streaming.websocket import Channels, Tunnel
from cri.streaming.wire import Closed, Data, Ended, Event, Opened, WireError
from tests.cri.streaming import frames


class Client:
    def __init__(self) -> None:
        self.connection = Connection(ConnectionType.CLIENT)

    def binary(self, data: bytes, finished: bool = True) -> bytes:
        return self.connection.send(BytesMessage(data=data, message_finished=finished))

    def text(self, data: str) -> bytes:
        return self.connection.send(TextMessage(data=data))

    def events(self, data: bytes) -> list[object]:
        self.connection.receive_data(data)
        return list(self.connection.events())


@pytest.fixture
def client() -> Client:
    return Client()


def test_messages_are_their_channels_bytes(client: Client) -> None:
    wire = Channels(5, text=False, closes=True)
    assert wire.feed(client.binary(b"\0in") + client.binary(b"\4{}")) == [Data(0, b"in"), Data(4, b"{}")]
    wire.send(1, b"out")
    wire.send(3, b"")
    assert client.events(wire.take()) == [BytesMessage(data=b"\1out"), BytesMessage(data=b"\3")]


def test_parts_of_a_message_belong_to_one_channel(client: Client) -> None:
    wire = Channels(5, text=False, closes=False)
    sent = client.binary(b"", False) + client.binary(b"\0", False) + client.binary(b"a", False) + client.binary(b"\1b")
    assert wire.feed(sent) == [Data(0, b"a"), Data(0, b"\1b")]


def test_a_closed_channel_is_ended_once(client: Client) -> None:
    wire = Channels(5, text=False, closes=True)
    assert wire.feed(client.binary(b"\xff\0") + client.binary(b"\xff\0") + client.binary(b"\0more")) == [Ended(0)]


def test_version_4_has_no_word_for_it(client: Client) -> None:
    with pytest.raises(WireError, match="no channel 255"):
        Channels(5, text=False, closes=False).feed(client.binary(b"\xff\0"))


def test_base64(client: Client) -> None:
    wire = Channels(5, text=True, closes=False)
    assert wire.feed(client.text("0" + base64.b64encode(b"in\0").decode())) == [Data(0, b"in\0")]
    wire.send(1, b"\xffout")
    assert client.events(wire.take()) == [TextMessage(data="1" + base64.b64encode(b"\xffout").decode())]


@pytest.mark.parametrize(
    ("text", "message"),
    [(False, b"\5x"), (False, b"\xff\x09"), (True, b"0!!!"), (True, b"9YQ=="), (True, b"\xf0YQ==")],
)
def test_what_makes_no_sense_ends_it(client: Client, text: bool, message: bytes) -> None:
    wire = Channels(5, text=text, closes=True)
    with pytest.raises(WireError):
        wire.feed(client.binary(message))
    (closed,) = client.events(wire.take())
    assert isinstance(closed, CloseConnection)
    assert closed.code == 1003


def test_a_base64_message_has_a_limit(client: Client) -> None:
    wire = Channels(5, text=True, closes=False)
    wire.feed(client.binary(b"0" * websocket.TEXT_LIMIT_BYTES, False))
    with pytest.raises(WireError, match="more than"):
        wire.feed(client.binary(b"0", False))


def test_pings_and_the_close_are_answered(client: Client) -> None:
    wire = Channels(5, text=False, closes=True)
    assert wire.feed(client.connection.send(Ping(payload=b"x"))) == []
    assert client.events(wire.take()) == [Pong(payload=b"x")]
    assert wire.feed(client.connection.send(CloseConnection(code=1000))) == [Closed()]
    assert [type(event) for event in client.events(wire.take())] == [CloseConnection]
    assert wire.feed(b"more") == []


@pytest.mark.parametrize("bad", [b"\x82\x03abc", b"\xf2\x80abcd", b"\x89\xfe\x01\x00abcd", b"\x83\x80abcd"])
def test_broken_frames_end_it(bad: bytes) -> None:
    with pytest.raises(WireError):
        Channels(5, text=False, closes=True).feed(bad)


def test_a_tunnel_carries_spdy(client: Client) -> None:
    wire = Tunnel()
    sent = frames.Compressor().syn_stream(1, {"streamtype": "data", "port": "80"}) + frames.data(1, b"hello")
    events: list[Event] = []
    for at in range(0, len(sent), 7):
        events += wire.feed(client.binary(sent[at : at + 7]))
    assert events[0] == Opened(1, {"streamtype": "data", "port": "80"}, False)
    assert b"".join(event.data for event in events if isinstance(event, Data)) == b"hello"
    wire.send(1, b"answer")
    reader = frames.Reader()
    said = [frame for part in client.events(wire.take()) for frame in reader.feed(bytes(part.data))]  # type: ignore[attr-defined]
    assert said[-1].body == b"answer"
    with pytest.raises(WireError, match="text in a tunnel"):
        wire.feed(client.text("hello"))


_messages = st.lists(st.tuples(st.integers(0, 4), st.binary(min_size=1, max_size=300)), max_size=20)


@given(_messages, st.lists(st.integers(1, 90), max_size=20), st.booleans())
def test_it_does_not_matter_how_bytes_arrive(messages: list[tuple[int, bytes]], cuts: list[int], text: bool) -> None:
    client = Client()
    wire = Channels(5, text=text, closes=True)
    sent = b"".join(
        client.text(f"{channel}{base64.b64encode(body).decode()}") if text else client.binary(bytes((channel,)) + body)
        for channel, body in messages
    )
    got: dict[int, bytes] = {}
    at = 0
    for cut in [*cuts, len(sent)]:
        for event in wire.feed(sent[at : at + cut]):
            assert isinstance(event, Data)
            got[event.stream] = got.get(event.stream, b"") + event.data
        at += cut
    expected: dict[int, bytes] = {}
    for channel, body in messages:
        expected[channel] = expected.get(channel, b"") + body
    assert got == expected


@given(st.lists(st.binary(max_size=300), max_size=10), st.booleans(), st.booleans())
def test_garbage_is_refused_or_waited_for(garbage: list[bytes], text: bool, tunnel: bool) -> None:
    wire = Tunnel() if tunnel else Channels(5, text=text, closes=True)
    for data in garbage:
        try:
            wire.feed(data)
        except WireError:
            break
    wire.close()
    wire.take()

"""From request to protocol, and the tokens that requests carry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.streaming import tokens
from cri.streaming.spdy import Spdy
from cri.streaming.tokens import Tokens
from cri.streaming.upgrade import Refused, Upgrade, Upgrader
from cri.streaming.websocket import Channels, Tunnel
from runtime.errors import Exhausted

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455, 1.3
SOCKET = {"Connection": "keep-alive, Upgrade", "Upgrade": "WebSocket", "Sec-WebSocket-Version": "13"}
SOCKET |= {"Sec-WebSocket-Key": KEY}
SPDY = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1"}


def request(path: str, headers: dict[str, str], method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{key}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def accepted(path: str, headers: dict[str, str], method: str = "GET") -> Upgrade:
    found = Upgrader().feed(request(path, headers, method))
    assert found is not None
    assert found.response.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    return found


def refused(path: str, headers: dict[str, str], method: str = "GET") -> bytes:
    with pytest.raises(Refused) as caught:
        Upgrader().feed(request(path, headers, method))
    return caught.value.response


@pytest.mark.parametrize(
    ("offer", "chosen", "version"),
    [
        ("v5.channel.k8s.io, v4.channel.k8s.io", b"v5.channel.k8s.io", 5),
        ("v4.channel.k8s.io,v3.channel.k8s.io", b"v4.channel.k8s.io", 4),
        ("v99.channel.k8s.io, v2.channel.k8s.io", b"v2.channel.k8s.io", 2),
        ("channel.k8s.io", b"channel.k8s.io", 1),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_spdy_commands(offer: str, chosen: bytes, version: int, method: str) -> None:
    found = accepted("/exec/abc", SPDY | {"X-Stream-Protocol-Version": offer}, method)
    assert (found.kind, found.token, found.version, found.channels) == ("exec", "abc", version, False)
    assert isinstance(found.wire, Spdy)
    assert b"x-stream-protocol-version: " + chosen + b"\r\n" in found.response.lower()


def test_a_client_that_names_no_version_gets_the_first() -> None:
    assert accepted("/attach/abc", SPDY).version == 1


def test_what_follows_the_request_is_the_protocols() -> None:
    upgrader = Upgrader()
    sent = request("/exec/abc", SPDY) + b"frames"
    assert upgrader.feed(sent[:30]) is None
    found = upgrader.feed(sent[30:])
    assert found is not None
    assert found.trailing == b"frames"


@pytest.mark.parametrize(
    ("path", "protocol", "version", "kind"),
    [
        ("/exec/t", "v5.channel.k8s.io", 5, Channels),
        ("/attach/t", "v4.channel.k8s.io", 4, Channels),
        ("/exec/t", "v4.base64.channel.k8s.io", 4, Channels),
        ("/exec/t", "base64.channel.k8s.io", 1, Channels),
        ("/exec/t", "", 1, Channels),
        ("/portforward/t", "SPDY/3.1+portforward.k8s.io", 1, Tunnel),
        ("/portforward/t", "v4.channel.k8s.io", 1, Channels),
    ],
)
def test_websockets(path: str, protocol: str, version: int, kind: type) -> None:
    headers = SOCKET | ({"Sec-WebSocket-Protocol": f"other, {protocol}"} if protocol else {})
    found = accepted(path, headers)
    assert found.version == version
    assert type(found.wire) is kind
    assert found.channels is (kind is Channels)
    assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in found.response
    assert (b"\r\nsec-websocket-protocol: %b\r\n" % protocol.lower().encode() in found.response.lower()) is bool(
        protocol
    )


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", SPDY, 404),
        ("/exec/", SPDY, 404),
        ("/exec/a/b", SPDY, 404),
        ("/logs/a", SPDY, 404),
        ("/exec/a", {}, 400),
        ("/exec/a", {"Upgrade": "SPDY/3.1"}, 400),
        ("/exec/a", {"Connection": "Upgrade", "Upgrade": "h2c"}, 400),
        ("/exec/a", SPDY | {"X-Stream-Protocol-Version": "v9.channel.k8s.io"}, 403),
        ("/portforward/a", SPDY | {"X-Stream-Protocol-Version": "v4.channel.k8s.io"}, 403),
        ("/exec/a", SOCKET | {"Sec-WebSocket-Protocol": "chat"}, 400),
        ("/portforward/a", SOCKET, 400),
        ("/exec/a", SOCKET | {"Sec-WebSocket-Version": "8"}, 426),
        ("/exec/a", {key: value for key, value in SOCKET.items() if key != "Sec-WebSocket-Key"}, 426),
        ("/exec/a", {"Content-Length": "3"}, 400),
    ],
)
def test_refusals(path: str, headers: dict[str, str], status: int) -> None:
    if "Content-Length" in headers:
        with pytest.raises(Refused) as caught:
            Upgrader().feed(request(path, SPDY | headers, "POST") + b"abc")
        answer = caught.value.response
    else:
        answer = refused(path, headers)
    assert answer.split()[1] == str(status).encode()


def test_a_request_has_a_limit() -> None:
    with pytest.raises(Refused) as caught:
        Upgrader().feed(request("/exec/a", {"X": "y" * 40000})[:39000])
    assert caught.value.response.split()[1] == b"431"


def test_other_methods_are_refused() -> None:
    assert refused("/exec/a", SPDY, "PUT").split()[1] == b"405"


@given(st.binary(max_size=400))
def test_garbage_is_refused_or_waited_for(data: bytes) -> None:
    response = b"HTTP/1.1 4"
    try:
        assert Upgrader().feed(data) is None
    except Refused as refusal:
        response = refusal.response
    assert response.startswith(b"HTTP/1.1 4")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_token_works_once_and_for_a_minute() -> None:
    clock = Clock()
    made: Tokens[str] = Tokens(clock)
    first, second = made.issue("a"), made.issue("b")
    assert first != second
    assert made.take(first) == "a"
    assert made.take(first) is None
    assert made.take("guess") is None
    clock.now = tokens.LIFETIME_S
    assert made.take(second) is None


def test_so_many_tokens_and_no_more() -> None:
    clock = Clock()
    made: Tokens[int] = Tokens(clock)
    for number in range(tokens.PENDING_LIMIT):
        made.issue(number)
    with pytest.raises(Exhausted):
        made.issue(0)
    clock.now = tokens.LIFETIME_S
    made.issue(0)

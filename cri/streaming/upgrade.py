"""From an HTTP request to one of the streaming protocols, sans I/O."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Final

import h11

from cri.streaming.spdy import Spdy
from cri.streaming.websocket import Channels, Tunnel
from cri.streaming.wire import Wire

REQUEST_LIMIT_BYTES: Final = 32 << 10
EXEC, ATTACH, PORT_FORWARD = "exec", "attach", "portforward"
_COMMAND_VERSIONS: Final = {f"v{number}.channel.k8s.io": number for number in (5, 4, 3, 2)} | {"channel.k8s.io": 1}
_FORWARD: Final = "portforward.k8s.io"
_TUNNEL: Final = "SPDY/3.1+portforward.k8s.io"
_SOCKET_COMMANDS: Final[dict[str, tuple[int, bool]]] = {  # version, text
    "v5.channel.k8s.io": (5, False),
    "v4.channel.k8s.io": (4, False),
    "v4.base64.channel.k8s.io": (4, True),
    "channel.k8s.io": (1, False),
    "base64.channel.k8s.io": (1, True),
    "": (1, False),
}
_SOCKET_FORWARDS: Final = {"v4.channel.k8s.io": False, "v4.base64.channel.k8s.io": True}
_COMMAND_CHANNELS: Final = 5
PORTS_LIMIT: Final = 100
_FORWARD_CHANNELS: Final = 2 * PORTS_LIMIT
_WEBSOCKET_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Refused(Exception):
    """The request can't be served; `response` is the whole answer."""

    def __init__(self, status: int, why: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(why)
        body = f"{why}\n".encode()
        connection = h11.Connection(h11.SERVER)
        fields = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
        answer = h11.Response(status_code=status, headers=[*fields, ("Connection", "close"), *headers])
        self.response = (connection.send(answer) or b"") + (connection.send(h11.Data(data=body)) or b"")


@dataclass(frozen=True, slots=True)
class Upgrade:
    """An accepted request. `kind` is exec, attach or portforward; `version` that of the protocol, `channels` whether
    streams are WebSocket channels, there from the start. `trailing` are the new protocol's first bytes."""

    kind: str
    token: str
    version: int
    channels: bool
    wire: Wire
    response: bytes
    trailing: bytes


class Upgrader:
    """Reads one request."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_LIMIT_BYTES)
        self._request: h11.Request | None = None

    def feed(self, data: bytes) -> Upgrade | None:
        """The upgrade, once the request is complete. Raises Refused."""
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.EndOfMessage):
                    assert self._request is not None
                    return self._upgrade(self._request)
                elif event is h11.NEED_DATA:
                    return None
                else:
                    raise Refused(400, "a streaming request has no body")
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint or 400, str(error)) from error

    def _upgrade(self, request: h11.Request) -> Upgrade:
        parts = request.target.decode("ascii", "replace").partition("?")[0].split("/")
        if len(parts) != 3 or parts[0] or parts[1] not in (EXEC, ATTACH, PORT_FORWARD) or not parts[2]:
            raise Refused(404, "no such path")
        if request.method not in (b"GET", b"POST"):
            raise Refused(405, "GET or POST", (("Allow", "GET, POST"),))
        wanted = [protocol.lower() for protocol in _values(request, b"upgrade")]
        if "upgrade" not in (value.lower() for value in _values(request, b"connection")):
            wanted = []
        if "websocket" in wanted:
            return self._websocket(request, parts[1], parts[2])
        if "spdy/3.1" in wanted:
            return self._spdy(request, parts[1], parts[2])
        raise Refused(400, "unable to upgrade: SPDY/3.1 or websocket is spoken here")

    def _spdy(self, request: h11.Request, kind: str, token: str) -> Upgrade:
        offered = _values(request, b"x-stream-protocol-version")
        known = {_FORWARD: 1} if kind == PORT_FORWARD else _COMMAND_VERSIONS
        chosen = next((name for name in offered if name in known), "")
        if offered and not chosen:
            accepted = tuple(("X-Accepted-Stream-Protocol-Versions", name) for name in known)
            text = f"unable to upgrade: unable to negotiate protocol: client supports {offered}, server {list(known)}"
            raise Refused(403, text, accepted)
        headers = [("X-Stream-Protocol-Version", chosen)] if chosen else []
        response = self._switch([("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), *headers])
        return self._upgraded(kind, token, known.get(chosen, 1), False, Spdy(), response)

    def _websocket(self, request: h11.Request, kind: str, token: str) -> Upgrade:
        keys = _values(request, b"sec-websocket-key")
        if len(keys) != 1 or _values(request, b"sec-websocket-version") != ["13"]:
            raise Refused(426, "WebSocket version 13 is spoken here", (("Sec-WebSocket-Version", "13"),))
        offered = _values(request, b"sec-websocket-protocol")
        wire: Wire
        version, channels = 1, True
        if kind == PORT_FORWARD:
            chosen = next((name for name in offered if name == _TUNNEL or name in _SOCKET_FORWARDS), None)
            if chosen == _TUNNEL:
                wire, channels = Tunnel(), False
            elif chosen is not None:
                wire = Channels(_FORWARD_CHANNELS, text=_SOCKET_FORWARDS[chosen], closes=False)
        else:
            chosen = next((name for name in offered or [""] if name in _SOCKET_COMMANDS), None)
            if chosen is not None:
                version, text = _SOCKET_COMMANDS[chosen]
                wire = Channels(_COMMAND_CHANNELS, text=text, closes=version >= 5)
        if chosen is None:
            raise Refused(400, f"unable to upgrade: none of {offered} is spoken here")
        accept = base64.b64encode(hashlib.sha1(keys[0].encode() + _WEBSOCKET_GUID).digest()).decode("ascii")
        headers = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept)]
        if chosen:
            headers.append(("Sec-WebSocket-Protocol", chosen))
        return self._upgraded(kind, token, version, channels, wire, self._switch(headers))

    def _switch(self, headers: list[tuple[str, str]]) -> bytes:
        answer = h11.InformationalResponse(status_code=101, headers=headers, reason=b"Switching Protocols")
        return self._http.send(answer) or b""

    def _upgraded(self, kind: str, token: str, version: int, channels: bool, wire: Wire, response: bytes) -> Upgrade:
        return Upgrade(kind, token, version, channels, wire, response, self._http.trailing_data[0])


def _values(request: h11.Request, name: bytes) -> list[str]:
    """All values of a header, from its lines and the commas in them."""
    lines = [value.decode("latin-1") for key, value in request.headers if key == name]
    return [word.strip() for line in lines for word in line.split(",") if word.strip()]

"""The server's side of Kubernetes' uses of WebSocket, sans I/O: channels in messages, and SPDY as a tunnel's bytes.

A message of the channel protocols starts with its channel, as a byte or, in the base64 ones, as a digit. Version 5 has
one more, 255: its message names a channel that the client sends no more on. The handshake has been made before.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final, TypeAlias

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

from cri.streaming.spdy import Spdy
from cri.streaming.wire import UNLIMITED, Closed, Data, Ended, Event, WireError

CLOSE_CHANNEL: Final = 255
TEXT_LIMIT_BYTES: Final = 1 << 20
"""Of a base64 message, which has to be taken as a whole."""
_UNEXPECTED: Final = 1003  # RFC 6455, 7.4.1
_Part: TypeAlias = BytesMessage | TextMessage


class Socket:
    """Frames of one connection: messages' parts in and out, pings and the close answered."""

    def __init__(self) -> None:
        self._frames = Connection(ConnectionType.SERVER)
        self._out: list[bytes] = []
        self._closed = False

    def feed(self, data: bytes) -> list[_Part | None]:
        """Parts of messages, in order; None at the end of the connection. Raises WireError."""
        found: list[_Part | None] = []
        if self._closed:
            return found
        self._frames.receive_data(data)
        for event in self._frames.events():
            if isinstance(event, BytesMessage | TextMessage):
                found.append(event)
            elif isinstance(event, Ping):
                if self._frames.state is ConnectionState.OPEN:
                    self._out.append(self._frames.send(event.response()))
            elif isinstance(event, CloseConnection):
                self._closed = True
                if self._frames.state is ConnectionState.OPEN:  # it has broken the protocol
                    self._out.append(self._frames.send(event))
                    raise WireError(f"websocket: {event.reason or 'protocol error'}")
                if self._frames.state is ConnectionState.REMOTE_CLOSING:
                    self._out.append(self._frames.send(event.response()))
                found.append(None)
                break
        return found

    def send(self, message: _Part) -> None:
        if self._frames.state is ConnectionState.OPEN:
            self._out.append(self._frames.send(message))

    def ping(self) -> None:
        if self._frames.state is ConnectionState.OPEN:
            self._out.append(self._frames.send(Ping()))

    def close(self, code: int = 1000) -> None:
        if self._frames.state is ConnectionState.OPEN:
            self._out.append(self._frames.send(CloseConnection(code=code)))

    def take(self) -> bytes:
        out, self._out = self._out, []
        return b"".join(out)


class Channels:
    """A `Wire` whose streams are channels, there from the start. `count` of them; `closes`: whether it is version 5."""

    def __init__(self, count: int, *, text: bool, closes: bool) -> None:
        self._socket = Socket()
        self._text = text
        self._closes = closes
        self._count = count
        self._channel = -1  # of the message under way
        self._parts: list[bytes] = []  # of one that has to be taken as a whole
        self._parts_bytes = 0
        self._ended: set[int] = set()

    def feed(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        for part in self._socket.feed(data):
            if part is None:
                events.append(Closed())
                break
            body = part.data.encode() if isinstance(part, TextMessage) else bytes(part.data)
            if self._text:
                self._gather(body, part.message_finished, events)
            else:
                self._part(body, part.message_finished, events)
        return events

    def _part(self, body: bytes, finished: bool, events: list[Event]) -> None:
        if self._channel < 0 and body:
            self._channel, body = body[0], body[1:]
        if body and self._channel == CLOSE_CHANNEL and self._closes:
            self._close(body[0], events)
        elif body:
            self._data(self._channel, body, events)
        if finished:
            self._channel = -1

    def _gather(self, body: bytes, finished: bool, events: list[Event]) -> None:
        if body:
            self._parts.append(body)
            self._parts_bytes += len(body)
        if self._parts_bytes > TEXT_LIMIT_BYTES:
            self._refuse(f"message of more than {TEXT_LIMIT_BYTES} bytes")
        if finished:
            message = b"".join(self._parts)
            self._parts, self._parts_bytes = [], 0
            if message:
                try:
                    decoded = base64.b64decode(message[1:], validate=True)
                except binascii.Error:
                    self._refuse("message is not base64")
                self._data(message[0] - ord("0"), decoded, events)

    def _data(self, channel: int, body: bytes, events: list[Event]) -> None:
        if not 0 <= channel < self._count:
            self._refuse(f"no channel {channel}")
        if channel not in self._ended and body:
            events.append(Data(channel, body))

    def _close(self, channel: int, events: list[Event]) -> None:
        if channel >= self._count:
            self._refuse(f"no channel {channel}")
        if channel not in self._ended:
            self._ended.add(channel)
            events.append(Ended(channel))

    def _refuse(self, why: str) -> None:
        self._socket.close(_UNEXPECTED)
        raise WireError(f"websocket: {why}")

    def take(self) -> bytes:
        return self._socket.take()

    def paced(self) -> bool:
        return False

    def room(self, stream: int) -> int:
        return UNLIMITED

    def send(self, stream: int, data: bytes) -> None:
        """One message. Without data, too: it tells a client that the connection stands."""
        if self._text:
            self._socket.send(TextMessage(data=f"{stream}{base64.b64encode(data).decode('ascii')}"))
        else:
            self._socket.send(BytesMessage(data=bytes((stream,)) + data))

    def end(self, stream: int) -> None:
        """The protocol has no word for it: the end of the connection is that of its channels."""

    def reset(self, stream: int) -> None:
        self._ended.add(stream)

    def consumed(self, stream: int, size: int) -> None:
        pass

    def ping(self) -> None:
        self._socket.ping()

    def close(self) -> None:
        self._socket.close()


class Tunnel(Spdy):
    """SPDY whose bytes travel in binary messages (KEP-4006)."""

    def __init__(self) -> None:
        super().__init__()
        self._socket = Socket()

    def feed(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        for part in self._socket.feed(data):
            if part is None:
                events.append(Closed())
                break
            if not isinstance(part, BytesMessage):
                self._socket.close(_UNEXPECTED)
                raise WireError("websocket: text in a tunnel")
            events += super().feed(bytes(part.data))
        return events

    def take(self) -> bytes:
        if data := super().take():
            self._socket.send(BytesMessage(data=data))
        return self._socket.take()

    def close(self) -> None:
        super().close()
        if data := super().take():
            self._socket.send(BytesMessage(data=data))
        self._socket.close()

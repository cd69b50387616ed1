"""The server's side of SPDY/3.1, sans I/O: draft-mbelshe-httpbis-spdy-00, and session windows of 3.1.

What Kubernetes' clients (moby/spdystream) leave out decides how windows are kept: they send no WINDOW_UPDATE and heed
none. So a peer's windows hold from the first sign that it keeps them, SETTINGS or WINDOW_UPDATE; one that has used up
the initial 64 KiB without a sign is sent a PING, and if the answer comes before a sign it keeps none; nor does one that
sends more than our windows allow. Then what slows a writer, on either side, is the connection, which its reader must
stop reading when enough is waiting.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from struct import Struct
from struct import error as StructError
from typing import Final

from cri.streaming.dictionary import DICTIONARY
from cri.streaming.wire import UNLIMITED, Data, Ended, Event, Opened, Reset, Room, WireError

CONTROL_LIMIT_BYTES: Final = 32 << 10
"""Of a control frame. Headers of a stream are a few dozen bytes."""
HEADERS_LIMIT_BYTES: Final = 8 << 10
"""Of a header block once it is decompressed: a thousandth of that may blow up to any size."""
HEADERS_LIMIT: Final = 100
STREAMS_LIMIT: Final = 2000
WINDOW_BYTES: Final = 256 << 10
"""How much of a stream the peer may send ahead of its consumption."""
_INITIAL_WINDOW: Final = 64 << 10
_MAX_WINDOW: Final = 0x7FFFFFFF
_SESSION_UPDATE_BYTES: Final = 64 << 20
_FRAME_BYTES: Final = 0xFFFFFF

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FLAG_FIN: Final = 0x01
FLAG_UNIDIRECTIONAL: Final = 0x02
_VERSION: Final = 0x8003
PROTOCOL_ERROR, INVALID_STREAM, REFUSED_STREAM, CANCEL, FLOW_CONTROL_ERROR = 1, 2, 3, 5, 7
_SETTINGS_WINDOW: Final = 7
_PROBE: Final = 2
"""The PING that asks whether the peer keeps windows: even, as ours have to be."""
_PING: Final = 4

_HEAD: Final = Struct(">HHI")  # control: version, type, flags and length
_DATA_HEAD: Final = Struct(">II")  # stream, flags and length
_U32: Final = Struct(">I")
_PAIR: Final = Struct(">II")


class Stream:
    """`credit_bytes` is by how much its window differs from what all start with, which settings may change."""

    __slots__ = ("credit_bytes", "local_open", "remote_open", "to_receive", "unacknowledged")

    def __init__(self, remote_open: bool, local_open: bool) -> None:
        self.credit_bytes = 0
        self.to_receive = WINDOW_BYTES
        self.unacknowledged = 0
        self.remote_open = remote_open
        self.local_open = local_open


class Spdy:
    """One connection. A `Wire`; `ended` streams are forgotten."""

    _peers_parity = 1

    def __init__(self) -> None:
        self._out: list[bytes] = []
        self._streams: dict[int, Stream] = {}
        self._last = 0
        self._buffer = b""
        self._data_stream = 0  # of the data frame that is under way
        self._data_left = 0
        self._data_fin = False
        # The least memory zlib can do with: what is compressed here are a few empty blocks.
        self._deflate = zlib.compressobj(1, zlib.DEFLATED, 9, 1, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._keeps_windows: bool | None = None
        self._probed = False
        self._initial_window = _INITIAL_WINDOW
        self._session_window = _INITIAL_WINDOW
        self._session_received = 0
        self._over = False
        self._control(SETTINGS, 0, _U32.pack(1) + _PAIR.pack(_SETTINGS_WINDOW, WINDOW_BYTES))
        self._control(WINDOW_UPDATE, 0, _PAIR.pack(0, _MAX_WINDOW - _INITIAL_WINDOW))

    @property
    def streams(self) -> int:
        """How many are open."""
        return len(self._streams)

    # From the peer

    def feed(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        if self._over:
            return events
        try:
            self._parse(data, events)
        except (WireError, StructError, zlib.error, UnicodeDecodeError) as error:
            self._over = True
            self._control(GOAWAY, 0, _PAIR.pack(self._last, 1))
            raise WireError(f"spdy: {error}") from error
        return events

    def _parse(self, data: bytes, events: list[Event]) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        at, size = 0, len(data)
        while at < size:
            if self._data_left:
                part = data[at : at + self._data_left] if at or size > self._data_left else data
                at += len(part)
                self._data_left -= len(part)
                self._received(part, events)
                continue
            if size - at < 8:
                break
            if data[at] & 0x80:
                version, kind, rest = _HEAD.unpack_from(data, at)
                length = rest & _FRAME_BYTES
                if version != _VERSION:
                    raise WireError(f"control frame of version {version & 0x7FFF}")
                if length > CONTROL_LIMIT_BYTES:
                    raise WireError(f"control frame of {length} bytes")
                if size - at < 8 + length:
                    break
                at += 8
                self._control_received(kind, rest >> 24, data[at : at + length], events)
                at += length
            else:
                self._data_stream, rest = _DATA_HEAD.unpack_from(data, at)
                self._data_left = rest & _FRAME_BYTES
                self._data_fin = bool(rest >> 24 & FLAG_FIN)
                at += 8
                if not self._data_left:
                    self._received(b"", events)
        self._buffer = data[at:]

    def _received(self, data: bytes, events: list[Event]) -> None:
        number = self._data_stream
        self._session_received += len(data)
        if self._session_received >= _SESSION_UPDATE_BYTES:
            self._control(WINDOW_UPDATE, 0, _PAIR.pack(0, self._session_received))
            self._session_received = 0
        stream = self._streams.get(number)
        if stream is None or not stream.remote_open:
            if number == 0 or number > self._last:
                raise WireError(f"data on stream {number}, which was never opened")
            return  # it was on its way when the stream ended here
        stream.to_receive -= len(data)
        if stream.to_receive < 0 and self.paced():
            self._forget(number)
            self._control(RST_STREAM, 0, _PAIR.pack(number, FLOW_CONTROL_ERROR))
            events.append(Reset(number))
            return
        if data:
            events.append(Data(number, data))
        if self._data_fin and not self._data_left:
            self._remote_ended(number, stream, events)

    def _control_received(self, kind: int, flags: int, body: bytes, events: list[Event]) -> None:
        handler = _HANDLERS.get(kind)
        if handler:  # a frame of another kind is to be ignored (2.2.1)
            handler(self, flags, body, events)

    def _syn_stream(self, flags: int, body: bytes, events: list[Event]) -> None:
        number = _U32.unpack_from(body)[0] & 0x7FFFFFFF
        headers = self._headers(body[10:])  # always: the compression's state goes through all blocks
        if number % 2 == 0:
            raise WireError(f"a client opened stream {number}")
        if number in self._streams:
            self._forget(number)
            self._control(RST_STREAM, 0, _PAIR.pack(number, PROTOCOL_ERROR))
            events.append(Reset(number))
            return
        # Not checked to be greater than the last: spdystream takes numbers before it takes the lock for writing.
        self._last = max(self._last, number)
        if len(self._streams) >= STREAMS_LIMIT:
            self._control(RST_STREAM, 0, _PAIR.pack(number, REFUSED_STREAM))
            return
        ended = bool(flags & FLAG_FIN)
        self._streams[number] = Stream(not ended, not flags & FLAG_UNIDIRECTIONAL)
        events.append(Opened(number, headers, ended))

    def _syn_reply(self, flags: int, body: bytes, events: list[Event]) -> None:
        self._replied(_U32.unpack_from(body)[0] & 0x7FFFFFFF)
        self._headers(body[4:])

    def _replied(self, number: int) -> None:
        raise WireError("a reply to a stream that was not opened here")

    def _headers_received(self, flags: int, body: bytes, events: list[Event]) -> None:
        number = _U32.unpack_from(body)[0] & 0x7FFFFFFF
        self._headers(body[4:])
        stream = self._streams.get(number)
        if stream and stream.remote_open and flags & FLAG_FIN:
            self._remote_ended(number, stream, events)

    def _rst_stream(self, flags: int, body: bytes, events: list[Event]) -> None:
        number = _U32.unpack_from(body)[0] & 0x7FFFFFFF
        if self._streams.pop(number, None):
            events.append(Reset(number))

    def _settings(self, flags: int, body: bytes, events: list[Event]) -> None:
        (count,) = _U32.unpack_from(body)
        if len(body) != 4 + 8 * count:
            raise WireError("settings of another length than they say")
        for at in range(4, len(body), 8):
            identity, value = _PAIR.unpack_from(body, at)
            if identity & 0xFFFFFF == _SETTINGS_WINDOW:
                if value > _MAX_WINDOW:
                    raise WireError(f"initial window of {value} bytes")
                self._initial_window = value
        self._keeps_windows = True
        events.append(Room())

    def _ping(self, flags: int, body: bytes, events: list[Event]) -> None:
        (number,) = _U32.unpack_from(body)
        if number % 2 == self._peers_parity:
            self._control(PING, 0, body[:4])
        elif number == _PROBE and self._probed and self._keeps_windows is None:
            self._keeps_windows = False
            events.append(Room())

    def _goaway(self, flags: int, body: bytes, events: list[Event]) -> None:
        """The peer takes no new streams; there are none from this side."""

    def _window_update(self, flags: int, body: bytes, events: list[Event]) -> None:
        number, delta = _PAIR.unpack_from(body)
        number &= 0x7FFFFFFF
        delta &= 0x7FFFFFFF
        self._keeps_windows = True
        if number == 0:
            self._session_window += delta
            if self._session_window > _MAX_WINDOW:
                raise WireError("session window overflow")
        elif stream := self._streams.get(number):
            stream.credit_bytes += delta
            if self._initial_window + stream.credit_bytes > _MAX_WINDOW:
                self._forget(number)
                self._control(RST_STREAM, 0, _PAIR.pack(number, FLOW_CONTROL_ERROR))
                events.append(Reset(number))
                return
        events.append(Room())

    def _remote_ended(self, number: int, stream: Stream, events: list[Event]) -> None:
        stream.remote_open = False
        if not stream.local_open:
            self._forget(number)
        events.append(Ended(number))

    def _headers(self, block: bytes) -> dict[str, str]:
        """Decompress and parse a block. Raises WireError, zlib.error, StructError or UnicodeDecodeError."""
        text = self._inflate.decompress(block, HEADERS_LIMIT_BYTES)
        if len(text) >= HEADERS_LIMIT_BYTES or self._inflate.unconsumed_tail:
            raise WireError(f"headers of more than {HEADERS_LIMIT_BYTES} bytes")
        (count,) = _U32.unpack_from(text)
        if count > HEADERS_LIMIT:
            raise WireError(f"{count} headers")
        at = 4
        words = []
        for _ in range(2 * count):
            (length,) = _U32.unpack_from(text, at)
            at += 4 + length
            if at > len(text):
                raise WireError("headers end early")
            words.append(text[at - length : at].decode())
        return {name.lower(): value for name, value in zip(words[::2], words[1::2], strict=True)}

    # To the peer

    def take(self) -> bytes:
        out, self._out = self._out, []
        return out[0] if len(out) == 1 else b"".join(out)

    def reply(self, stream: int) -> None:
        """Accept a stream that the peer opened."""
        self._control(SYN_REPLY, 0, _U32.pack(stream) + self._compressed({}))

    def paced(self) -> bool:
        """Whether the peer keeps windows; one that has given no sign of it by the time this matters doesn't."""
        if self._keeps_windows is None:
            self._keeps_windows = False
        return self._keeps_windows

    def room(self, stream: int) -> int:
        found = self._streams.get(stream)
        if found is None or self._keeps_windows is False:
            return UNLIMITED
        room = min(self._initial_window + found.credit_bytes, self._session_window)
        if room <= 0 and self._keeps_windows is None and not self._probed:
            self._probed = True
            self._control(PING, 0, _U32.pack(_PROBE))
        return max(room, 0)

    def send(self, stream: int, data: bytes) -> None:
        found = self._streams.get(stream)
        if found and found.local_open and data:
            assert len(data) <= _FRAME_BYTES
            found.credit_bytes -= len(data)
            self._session_window -= len(data)
            self._out += (_DATA_HEAD.pack(stream, len(data)), data)

    def end(self, stream: int) -> None:
        found = self._streams.get(stream)
        if found and found.local_open:
            found.local_open = False
            self._out.append(_DATA_HEAD.pack(stream, FLAG_FIN << 24))
            if not found.remote_open:
                self._forget(stream)

    def reset(self, stream: int) -> None:
        if stream in self._streams:
            self._forget(stream)
            self._control(RST_STREAM, 0, _PAIR.pack(stream, CANCEL))

    def consumed(self, stream: int, size: int) -> None:
        found = self._streams.get(stream)
        if found and found.remote_open:
            found.unacknowledged += size
            if found.unacknowledged >= WINDOW_BYTES // 2:
                self._control(WINDOW_UPDATE, 0, _PAIR.pack(stream, found.unacknowledged))
                found.to_receive += found.unacknowledged
                found.unacknowledged = 0

    def ping(self) -> None:
        if not self._over:
            self._control(PING, 0, _U32.pack(_PING))

    def close(self) -> None:
        if not self._over:
            self._over = True
            self._control(GOAWAY, 0, _PAIR.pack(self._last, 0))

    def _forget(self, stream: int) -> None:
        del self._streams[stream]

    def _control(self, kind: int, flags: int, body: bytes) -> None:
        self._out += (_HEAD.pack(_VERSION, kind, flags << 24 | len(body)), body)

    def _compressed(self, headers: Mapping[str, str]) -> bytes:
        words = [word.encode() for pair in headers.items() for word in pair]
        text = _U32.pack(len(headers)) + b"".join(_U32.pack(len(word)) + word for word in words)
        return self._deflate.compress(text) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


_HANDLERS: Final[dict[int, Callable[[Spdy, int, bytes, list[Event]], None]]] = {
    SYN_STREAM: Spdy._syn_stream,
    SYN_REPLY: Spdy._syn_reply,
    RST_STREAM: Spdy._rst_stream,
    SETTINGS: Spdy._settings,
    PING: Spdy._ping,
    GOAWAY: Spdy._goaway,
    HEADERS: Spdy._headers_received,
    WINDOW_UPDATE: Spdy._window_update,
}

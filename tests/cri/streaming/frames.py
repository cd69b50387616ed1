"""SPDY/3.1 frames as a client makes and reads them, written from the draft and not from the server's code."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from cri.streaming.dictionary import DICTIONARY

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN = 1


@dataclass(frozen=True)
class Frame:
    """`kind` 0 is data, whose `stream` is its own; of a control frame it is the first word of the body."""

    kind: int
    flags: int
    body: bytes
    stream: int

    def word(self, number: int) -> int:
        value: int = struct.unpack_from(">I", self.body, 4 * number)[0]
        return value


def control(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack(">HHBBH", 0x8003, kind, flags, len(body) >> 16, len(body) & 0xFFFF) + body


def data(stream: int, body: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">IBBH", stream, flags, len(body) >> 16, len(body) & 0xFFFF) + body


def rst(stream: int, status: int = 5) -> bytes:
    return control(RST_STREAM, struct.pack(">II", stream, status))


def window_update(stream: int, delta: int) -> bytes:
    return control(WINDOW_UPDATE, struct.pack(">II", stream, delta))


def settings(window: int) -> bytes:
    return control(SETTINGS, struct.pack(">III", 1, 7, window))


def ping(number: int) -> bytes:
    return control(PING, struct.pack(">I", number))


def headers_block(headers: dict[str, str]) -> bytes:
    words = [word.encode() for pair in headers.items() for word in pair]
    return struct.pack(">I", len(headers)) + b"".join(struct.pack(">I", len(word)) + word for word in words)


class Compressor:
    """The header compression of one connection's client side."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 8, 0, DICTIONARY)

    def __call__(self, block: bytes) -> bytes:
        return self._deflate.compress(block) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def syn_stream(self, stream: int, headers: dict[str, str], flags: int = 0) -> bytes:
        return self.syn_stream_of(stream, headers_block(headers), flags)

    def syn_stream_of(self, stream: int, block: bytes, flags: int = 0) -> bytes:
        return control(SYN_STREAM, struct.pack(">IIH", stream, 0, 0) + self(block), flags)


class Reader:
    """Frames out of bytes, as they complete; headers' blocks are checked to decompress."""

    def __init__(self) -> None:
        self._buffer = b""
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def feed(self, received: bytes) -> Iterator[Frame]:
        self._buffer += received
        while len(self._buffer) >= 8:
            first, flags, high, low = struct.unpack_from(">IBBH", self._buffer)
            length = high << 16 | low
            if len(self._buffer) < 8 + length:
                return
            body, self._buffer = self._buffer[8 : 8 + length], self._buffer[8 + length :]
            if not first >> 31:
                yield Frame(0, flags, body, first)
                continue
            assert first >> 16 == 0x8003, "version"
            kind = first & 0xFFFF
            stream = struct.unpack_from(">I", body)[0] & 0x7FFFFFFF
            if kind == SYN_REPLY:
                assert self._inflate.decompress(body[4:]) == b"\0\0\0\0"
            yield Frame(kind, flags, body, stream)

"""How a layer's tar is put together again from its unpacked files: everything that isn't file data, and where that is.

Compressed blobs aren't kept, which would nearly double what an image takes. The recipe (headers and padding, compressed
to a few per cent) gives the very bytes of the diff id back: `save` writes them, `check` hashes them.

Frames of zstd with records: kind (0 bytes, 1 file data), length, and either the bytes or offset, length and path.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import zstandard

from runtime.images.unpack.errors import BadLayer

if TYPE_CHECKING:
    from pathlib import Path  # costs each fork

_RECORD = struct.Struct("<BI")
_PLACE = struct.Struct("<QQ")
_BYTES, _DATA = 0, 1
_FLUSH_BYTES = 1 << 18
_READ = 1 << 20
_PATH_LIMIT = 1 << 16


class Recorder:
    """Writes a recipe to the descriptor `file`. `spoilt` once an entry took another's place: its data are gone then."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._plain: list[bytes] = []
        self._plain_bytes = 0
        self._records: list[bytes] = []
        self._records_bytes = 0
        self.spoilt = False

    def plain(self, data: bytes) -> None:
        self._plain.append(data)
        self._plain_bytes += len(data)
        if self._plain_bytes > _FLUSH_BYTES:
            self._end_plain()

    def data(self, path: bytes, offset: int, length: int) -> None:
        self._end_plain()
        place = _PLACE.pack(offset, length) + path
        self._record(_RECORD.pack(_DATA, len(place)), place)

    def finish(self) -> None:
        self._end_plain()
        self._flush()

    def _end_plain(self) -> None:
        if self._plain:
            self._record(_RECORD.pack(_BYTES, self._plain_bytes), *self._plain)
            self._plain, self._plain_bytes = [], 0

    def _record(self, *parts: bytes) -> None:
        self._records += parts
        self._records_bytes += sum(map(len, parts))
        if self._records_bytes > _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        frame = memoryview(self._compressor.compress(b"".join(self._records)))
        while frame:
            frame = frame[os.write(self._file, frame) :]
        self._records, self._records_bytes = [], 0


def _records(recipe: Path) -> Iterator[tuple[int, bytes]]:
    decompressor = zstandard.ZstdDecompressor()
    with open(recipe, "rb") as file, decompressor.stream_reader(file, read_across_frames=True) as reader:

        def exactly(size: int) -> bytes:
            data = b""
            while len(data) < size and (more := reader.read(size - len(data))):
                data += more
            return data

        try:
            while head := exactly(_RECORD.size):
                kind, length = _RECORD.unpack(head)
                body = exactly(length)
                if len(body) != length or kind not in (_BYTES, _DATA):
                    raise BadLayer("the layer's recipe is damaged")
                yield kind, body
        except (zstandard.ZstdError, struct.error) as error:
            raise BadLayer(f"the layer's recipe is damaged: {error}") from error


def size_of(recipe: Path) -> int:
    """How long the tar is. Raises BadLayer, OSError."""
    return sum(len(body) if kind == _BYTES else _PLACE.unpack_from(body)[1] for kind, body in _records(recipe))


def rebuild(recipe: Path, layer: Path) -> Iterator[bytes]:
    """The tar of the unpacked `layer`, whose bytes are as good as the files are. Raises BadLayer, OSError."""
    root = os.fsencode(layer)
    for kind, body in _records(recipe):
        if kind == _BYTES:
            yield body
            continue
        offset, length = _PLACE.unpack_from(body)
        path = body[_PLACE.size :]
        # Entries of a spoilt layer have no recipe, so nothing but real directories leads there.
        fd = os.open(root + b"/" + path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while length:
                data = os.pread(fd, min(length, _READ), offset)
                if not data:
                    raise BadLayer(f"{os.fsdecode(path)[:200]!r} is too short")
                yield data
                offset, length = offset + len(data), length - len(data)
        finally:
            os.close(fd)

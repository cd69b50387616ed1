"""From a blob that is arriving to plain tar bytes: decompression with limits, and the diff id."""

import hashlib
import os
import threading
from collections.abc import Iterator
from queue import Full, Queue
from typing import Any, Protocol

import zstandard

from runtime.images.unpack.errors import BadLayer, LimitReached

try:
    import isal.isal_zlib as zlib
except ImportError:
    import zlib  # type: ignore[no-redef]

CHUNK = 1 << 18
_INPUT = 1 << 18
# A layer of so little is done before a thread would have begun.
_ALONE_BYTES = 1 << 20
# What may be ahead of the writer, who waits for the disk now and then.
_CHUNKS_AHEAD = 16
# RFC 8878 recommends 8 MiB; `zstd --long` and BuildKit's best level go up to this.
_ZSTD_WINDOW = 1 << 27
_DAMAGE: Any = (zlib.error, zstandard.ZstdError)


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Blob:
    """A blob that comes from the descriptor `file`; `position` is how much of it was read."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.position = 0

    def read(self, size: int, /) -> bytes:
        data = os.read(self._file, size)
        self.position += len(data)
        return data


def _gzip(head: bytes, source: Readable) -> Iterator[bytes]:
    """Members one after the other; zero padding after the last is allowed (RFC 1952 section 2.2)."""
    data = head
    while data:
        inflate: Any = zlib.decompressobj(31)
        while not inflate.eof:
            out = inflate.decompress(data, CHUNK)
            data = inflate.unconsumed_tail
            if out:
                yield out
            if not data and not inflate.eof:
                data = source.read(_INPUT)
                if not data:
                    raise BadLayer("gzip stream ends early")
        data = inflate.unused_data.lstrip(b"\0")
        while not data:
            more = source.read(_INPUT)
            if not more:
                return
            data = more.lstrip(b"\0")


class _Prefixed:
    """`source` with the bytes that were read to recognise the format put back."""

    def __init__(self, head: bytes, source: Readable) -> None:
        self._head = head
        self._source = source

    def read(self, size: int = _INPUT, /) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._source.read(size)


def _zstd(head: bytes, source: Readable) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    reader = decompressor.stream_reader(_Prefixed(head, source), read_size=_INPUT, read_across_frames=True)  # type: ignore[arg-type]
    while data := reader.read(CHUNK):
        yield data


def _plain(head: bytes, source: Readable) -> Iterator[bytes]:
    yield head
    while data := source.read(CHUNK):
        yield data


def decompressed(source: Readable) -> Iterator[bytes]:
    """The content of `source` in chunks of at most CHUNK bytes; the format is told by its first bytes.

    What a media type claims is not looked at, as in the established runtimes. Raises BadLayer.
    """
    head = b""
    while len(head) < 4 and (more := source.read(_INPUT)):
        head += more
    if head[:2] == b"\x1f\x8b":
        chunks = _gzip(head, source)
    elif head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        chunks = _zstd(head, source)  # a frame, or a skippable one before it
    else:
        chunks = _plain(head, source)
    try:
        yield from chunks
    except _DAMAGE as error:
        raise BadLayer(f"damaged compression: {error}") from error


class Pipeline:
    """Decompresses and hashes in a thread while the caller works on what came before; iterate to get the chunks.

    `diff_id` and `size` are final when the iteration has ended. `ratio` bounds plain bytes per compressed byte once
    `ratio_from` bytes have come out, `limit` bounds them absolutely.
    """

    def __init__(self, blob: Blob, limit: int, ratio: int, ratio_from: int) -> None:
        self._blob = blob
        self._limit = limit
        self._ratio = ratio
        self._ratio_from = ratio_from
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def diff_id(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def __iter__(self) -> Iterator[bytes]:
        chunks = self._chunks()
        for chunk in chunks:
            yield chunk
            if self.size > _ALONE_BYTES:
                yield from self._ahead(chunks)

    def _ahead(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        self._queue: Queue[bytes | BaseException | None] = Queue(_CHUNKS_AHEAD)
        self._stopped = threading.Event()
        thread = threading.Thread(target=self._produce, args=(chunks,), daemon=True)
        thread.start()
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
            thread.join()
        finally:
            self._stopped.set()

    def _chunks(self) -> Iterator[bytes]:
        for chunk in decompressed(self._blob):
            self._hash.update(chunk)
            self.size += len(chunk)
            if self.size > self._limit:
                raise LimitReached(f"layer unpacks to more than {self._limit} bytes")
            if self.size > self._ratio_from and self.size > self._blob.position * self._ratio:
                raise LimitReached(f"layer unpacks to more than {self._ratio} times its size")
            yield chunk

    def _produce(self, chunks: Iterator[bytes]) -> None:
        try:
            for chunk in chunks:
                self._put(chunk)
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: bytes | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=1)
                return
            except Full:
                continue

"""A streaming reader of tar archives: ustar, PAX and GNU, sparse files included. Every length is bounded.

The standard library's tarfile reads PAX headers of any size into memory and takes most of the time of unpacking a layer
of small files; this one knows only what a layer needs. Formats: POSIX.1-2017 pax(1), GNU tar manual "Tar Internals".
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from zlib import adler32

from runtime.images.unpack.errors import BadLayer

BLOCK = 512
_ZERO = bytes(BLOCK)
# Names are bounded by PATH_MAX; extended attributes (64 KiB each at most) are what makes a PAX header long.
_EXTENDED_LIMIT = 1 << 20
_SPARSE_LIMIT = 1 << 18
FILE, HARDLINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = b"0123456"
_HEADER_ONLY = b"123456"
_REGULAR = b"0\x007"
_XATTR = b"SCHILY.xattr."


@dataclass(slots=True)
class Entry:
    """One member; `kind` is FILE, HARDLINK and so on.

    `size` is that of the file as it is to be; its data in the stream are `extents` of (offset, length), one for a file
    without holes. `mtime_ns` may be negative.
    """

    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: bytes = b""
    major: int = 0
    minor: int = 0
    atime_ns: int | None = None
    xattrs: list[tuple[bytes, bytes]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)


class Stream:
    """Exact reads from an iterable of chunks. Raises BadLayer when it ends early.

    `record` gets everything that isn't read by `pieces`, in order.
    """

    def __init__(self, chunks: Iterable[bytes], record: Callable[[bytes], None] = lambda data: None) -> None:
        self._chunks = iter(chunks)
        self._record = record
        self._chunk = b""
        self._at = 0
        self.position = 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end <= len(self._chunk):
            data = self._chunk[self._at : end]
            self._at = end
            self.position += size
        else:
            data = b"".join(self.pieces(size))
        self._record(data)
        return data

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes as they come; the caller exhausts the iterator."""
        while size:
            if self._at == len(self._chunk) and not self._next():
                raise BadLayer("archive ends in the middle of an entry")
            piece = memoryview(self._chunk)[self._at : self._at + size]
            self._at += len(piece)
            self.position += len(piece)
            size -= len(piece)
            yield piece

    def skip_to(self, position: int) -> None:
        for piece in self.pieces(position - self.position):
            self._record(bytes(piece))

    def ended(self) -> bool:
        return self._at == len(self._chunk) and not self._next()

    def drain(self) -> None:
        self._record(self._chunk[self._at :])
        while self._next():
            self._record(self._chunk)

    def _next(self) -> bool:
        for chunk in self._chunks:
            if chunk:
                self._chunk, self._at = chunk, 0
                return True
        self._chunk, self._at = b"", 0
        return False


def _text(data: bytes) -> bytes:
    return data.partition(b"\0")[0]


@lru_cache(4096)
def _number(data: bytes) -> int:
    """An octal number, or a base-256 one (GNU) when the top bit is set."""
    if data[0] & 0x80:
        value = int.from_bytes(data, "big", signed=False) & ~(0x80 << 8 * (len(data) - 1))
        return value - (1 << 8 * len(data) - 1) if data[0] & 0x40 else value
    digits = data.strip(b" \0").partition(b"\0")[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        raise BadLayer(f"header holds {digits!r} where a number belongs") from None


def _sum(block: bytes) -> int:
    """Of a header's bytes: the lower half of adler32 is that and 1, as long as it can't overflow, and it is fast."""
    return (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise BadLayer(f"extended header holds {value[:32]!r} where a number belongs")
    return int(value)


def _time_ns(value: bytes) -> int:
    whole, _, fraction = value.partition(b".")
    negative = whole.startswith(b"-")
    nanos = _decimal((fraction[:9] or b"0").ljust(9, b"0"))
    seconds = _decimal(whole.lstrip(b"-") or b"0") * 1_000_000_000
    return -(seconds + nanos) if negative else seconds + nanos


def _records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The records of a PAX extended header: `length key=value\\n`."""
    records = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 16)
        length = _decimal(data[at:space]) if space > at else 0
        end = at + length
        equals = data.find(b"=", space, end)
        if length < 5 or end > len(data) or equals < 0 or data[end - 1] != 0x0A:
            raise BadLayer("malformed extended header")
        records.append((data[space + 1 : equals], data[equals + 1 : end - 1]))
        at = end
    return records


class Reader:
    """Iterates over a stream's entries. The data of an entry are read from `stream` before the next is asked for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Entry]:
        stream = self.stream
        extended: dict[bytes, bytes] = {}
        sparse_pairs: list[bytes] = []
        xattrs: list[tuple[bytes, bytes]] = []
        left = _EXTENDED_LIMIT
        while not stream.ended():
            block = stream.take(BLOCK)
            if block == _ZERO:
                break
            stored = _number(block[148:156])
            if _sum(block) - sum(block[148:156]) + 256 != stored:
                raise BadLayer("header checksum does not match: not a tar archive, or a damaged one")
            kind = block[156:157]
            size = _number(block[124:136])
            if size < 0:
                raise BadLayer("entry of negative size")
            if kind in b"xgLK":
                left -= size
                if left < 0:
                    raise BadLayer(f"extended headers of more than {_EXTENDED_LIMIT} bytes for one entry")
                body = self._extension(kind, size)
                if kind == b"L":
                    extended[b"path"] = _text(body)
                elif kind == b"K":
                    extended[b"linkpath"] = _text(body)
                elif kind == b"x":
                    for key, value in _records(body):
                        if key.startswith(_XATTR):
                            xattrs.append((key[len(_XATTR) :], value))
                        elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                            sparse_pairs.append(value)
                        else:
                            extended[key] = value
                continue
            entry = self._entry(block, kind, size, extended, xattrs)
            data_end = stream.position
            if entry.kind == FILE:
                data_end += -(-entry.size // BLOCK) * BLOCK
                data_end += self._sparse(entry, block, extended, sparse_pairs)
            yield entry
            stream.skip_to(data_end)
            extended, xattrs, sparse_pairs, left = {}, [], [], _EXTENDED_LIMIT
        stream.drain()

    def _extension(self, kind: bytes, size: int) -> bytes:
        data = self.stream.take(-(-size // BLOCK) * BLOCK)
        return b"" if kind == b"g" else data[:size]

    def _entry(
        self, block: bytes, kind: bytes, size: int, extended: dict[bytes, bytes], xattrs: list[tuple[bytes, bytes]]
    ) -> Entry:
        name = extended.get(b"path")
        if b"GNU.sparse.name" in extended:
            name = extended[b"GNU.sparse.name"]
        if name is None:
            name = _text(block[:100])
            # The prefix belongs to POSIX archives only; GNU ones ("ustar  ") keep other things there.
            if block[257:263] == b"ustar\0" and block[345]:
                name = _text(block[345:500]) + b"/" + name
        if kind in _REGULAR or kind == b"S":
            kind = b"5" if kind == b"\0" and name.endswith(b"/") else b"0"
        elif kind not in _HEADER_ONLY:
            raise BadLayer(f"entry {name[:200]!r} is of unknown type {kind!r}")
        entry = Entry(
            name=name,
            kind=kind[0],
            mode=_number(block[100:108]) & 0o7777,
            uid=_number(block[108:116]),
            gid=_number(block[116:124]),
            size=size if kind == b"0" else 0,
            mtime_ns=_number(block[136:148]) * 1_000_000_000,
            link=_text(block[157:257]),
        )
        if kind in b"34":
            entry.major, entry.minor = _number(block[329:337]), _number(block[337:345])
        if extended:
            entry.link = extended.get(b"linkpath", entry.link)
            if b"uid" in extended:
                entry.uid = _decimal(extended[b"uid"])
            if b"gid" in extended:
                entry.gid = _decimal(extended[b"gid"])
            if b"mtime" in extended:
                entry.mtime_ns = _time_ns(extended[b"mtime"])
            if b"atime" in extended:
                entry.atime_ns = _time_ns(extended[b"atime"])
            if b"size" in extended and kind == b"0":
                entry.size = _decimal(extended[b"size"])
        entry.xattrs = xattrs
        if b"\0" in entry.name or b"\0" in entry.link:
            raise BadLayer(f"entry {entry.name[:200]!r} has a zero byte in its name or link")
        return entry

    def _sparse(self, entry: Entry, block: bytes, extended: dict[bytes, bytes], pairs: list[bytes]) -> int:
        """Fill in extents, and the size of a file with holes; returns how many bytes of header came before the data."""
        stream = self.stream
        before = stream.position
        stored = entry.size
        real = extended.get(b"GNU.sparse.realsize") or extended.get(b"GNU.sparse.size")
        if block[156:157] == b"S":
            numbers = self._old_gnu_map(block)
            entry.size = _number(block[483:495])
            skipped = stream.position - before
        elif b"GNU.sparse.major" in extended and real is not None:
            numbers = self._map_in_data(stored)
            entry.size = _decimal(real)
            stored -= stream.position - before
            skipped = 0  # the map is part of the stored size
        elif real is not None:
            if b"GNU.sparse.map" in extended:
                pairs = extended[b"GNU.sparse.map"].split(b",")
            numbers = [_decimal(pair) for pair in pairs if pair]
            entry.size = _decimal(real)
            skipped = 0
        else:
            entry.extents = [(0, stored)] if stored else []
            return 0
        if len(numbers) % 2 or len(numbers) > 2 * _SPARSE_LIMIT:
            raise BadLayer(f"entry {entry.name[:200]!r} has a malformed map of holes")
        entry.extents = [(o, n) for o, n in zip(numbers[::2], numbers[1::2], strict=True) if n]
        end = 0
        for offset, length in entry.extents:
            if offset < end or length < 0:
                raise BadLayer(f"entry {entry.name[:200]!r} has a malformed map of holes")
            end = offset + length
        if end > entry.size or sum(length for _, length in entry.extents) != stored:
            raise BadLayer(f"entry {entry.name[:200]!r} has a map of holes that does not match its size")
        return skipped

    def _old_gnu_map(self, block: bytes) -> list[int]:
        numbers: list[int] = []
        table, more = block[386:482], block[482]
        while True:
            for at in range(0, len(table), 12):
                if table[at] == 0:
                    break
                numbers.append(_number(table[at : at + 12]))
            if not more:
                return numbers
            if len(numbers) > 2 * _SPARSE_LIMIT:
                raise BadLayer("sparse entry with too many extents")
            extension = self.stream.take(BLOCK)
            table, more = extension[:504], extension[504]

    def _map_in_data(self, stored: int) -> list[int]:
        """GNU sparse 1.0: decimal lines before the data, their number first, padded to a block."""
        numbers: list[int] = []
        rest = b""
        left = min(stored, 32 * _SPARSE_LIMIT)
        while not numbers or len(numbers) <= 2 * numbers[0]:
            left -= BLOCK
            if left < 0 or len(rest) > 20:
                raise BadLayer("sparse entry with a map that does not end")
            *lines, rest = (rest + self.stream.take(BLOCK)).split(b"\n")
            numbers += [_decimal(line) for line in lines]
        return numbers[1 : 2 * numbers[0] + 1]

"""The tar reader: what Python's tarfile and GNU tar write it reads alike, and hostile bytes end in BadLayer."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from runtime.images.unpack.errors import BadLayer
from runtime.images.unpack.stream import CHUNK, decompressed
from runtime.images.unpack.tar import DIRECTORY, FILE, HARDLINK, SYMLINK, Entry, Reader, Stream
from tests.runtime.images.given import Layer

FORMATS = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]


def chunks(data: bytes, size: int = 700) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def read(data: bytes, size: int = 700) -> list[tuple[Entry, bytes]]:
    """Entries with their contents, holes as zeros."""
    stream = Stream(chunks(data, size))
    found = []
    for entry in Reader(stream):
        content = bytearray(entry.size if entry.size < 1 << 24 else 0)
        for offset, length in entry.extents:
            content[offset : offset + length] = b"".join(stream.pieces(length))
        found.append((entry, bytes(content)))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1, 512, 1 << 20])
def test_as_tarfile_writes_it(format: int, size: int) -> None:
    deep = "/".join(["directory"] * 8)
    layer = Layer(format)
    layer.directory(deep + "/", uid=5, gid=6).file(f"{deep}/file", b"x" * 1000, mode=0o4755, uid=1000, mtime=7)
    layer.hardlink("hard", f"{deep}/file").symlink("soft", "../" + deep).file("empty")
    if format != tarfile.USTAR_FORMAT:
        layer.file("x/" * 150 + "long", b"1").symlink("to", "y" * 300).file("big-id", uid=(1 << 32) - 2, gid=1 << 30)
    if format == tarfile.PAX_FORMAT:
        layer.file("ütf", mtime=1.25, pax_headers={"SCHILY.xattr.user.a": "b=\nc"}).file("old", mtime=-1.5)
    data = layer.tar()
    entries = read(data, size)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        assert len(entries) == len(members)
        for (entry, content), member in zip(entries, members, strict=True):
            assert entry.name.rstrip(b"/") == os.fsencode(member.name)
            assert (entry.mode, entry.uid, entry.gid) == (member.mode, member.uid, member.gid)
            assert entry.mtime_ns == member.mtime * 1_000_000_000
            assert bytes([entry.kind]) == member.type
            assert entry.link == os.fsencode(member.linkname)
            assert entry.size == member.size
            if member.isreg():
                extracted = archive.extractfile(member)
                assert extracted is not None
                assert content == extracted.read()
    if format == tarfile.PAX_FORMAT:
        assert entries[-2][0].xattrs == [(b"user.a", b"b=\nc")]
        assert entries[-1][0].mtime_ns == -1_500_000_000


@pytest.mark.parametrize("how", ["--format=gnu", "--format=posix", "--sparse-version=0.0", "--sparse-version=0.1"])
def test_holes_as_gnu_tar_writes_them(how: str, tmp_path: Path) -> None:
    pieces = [(number * 65536, bytes([number]) * 4096) for number in range(1, 60)]
    with open(tmp_path / "holes", "wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.truncate(1 << 22)
    (tmp_path / "after").write_text("after")
    options = ["--sparse", "--hole-detection=raw", how, *(["--format=posix"] if "version" in how else [])]
    done = subprocess.run(
        ["tar", "-C", str(tmp_path), "-cf", "-", *options, "holes", "after"], capture_output=True, check=True
    )
    assert len(done.stdout) < 1 << 20
    (holes, content), (_, after) = read(done.stdout)
    assert holes.name == b"holes"
    assert content == (tmp_path / "holes").read_bytes()
    assert after == b"after"


def header(**fields: object) -> bytes:
    """One header block as tarfile makes it, for `mend`."""
    info = tarfile.TarInfo("name")
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def mend(block: bytes, at: int, value: bytes) -> bytes:
    """The block with some bytes changed and its checksum right again."""
    changed = bytearray(block)
    changed[at : at + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def pax(body: bytes) -> bytes:
    return mend(header(size=len(body)), 156, b"x") + body.ljust(-(-len(body) // 512) * 512, b"\0")


def sparse(map: str | None = None, **keys: object) -> bytes:
    """A PAX header about holes."""
    records = {f"GNU.sparse.{key}": str(value) for key, value in keys.items()} | (
        {"GNU.sparse.map": map} if map else {}
    )
    body = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 2
        body += str(length + (length > 99)).encode() + rest
    return pax(body)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"not a tar archive".ljust(512), "checksum|number"),
        (header(size=1000)[:300], "ends in the middle"),
        (header(size=1000) + bytes(512), "ends in the middle"),
        (mend(header(), 124, b"\xff" * 12), "negative size"),
        (mend(header(), 108, b"12x4567\0"), "number"),
        (mend(header(), 156, b"Z"), "unknown type"),
        (mend(header(size=2 << 20), 156, b"x"), "extended headers of more than 1048576 bytes"),
        (mend(header(size=2 << 20), 156, b"L"), "extended headers of more than 1048576 bytes"),
        (pax(b"5 a=b\n"), "malformed extended"),
        (pax(b"99 a=b\n"), "malformed extended"),
        (pax(b"0 a=b\n"), "malformed extended"),
        (pax(b"6 abc\n"), "malformed extended"),
        (pax(b"x a=b\n"), "number"),
        (pax(b"14 path=a\0bcd\n") + header(), "zero byte"),
        (pax(b"12 size=1e9\n") + header(), "number"),
        (pax(b"12 uid=-100\n") + header(), "number"),
        (sparse(major=1, realsize=1000000) + header(size=512) + b"9" * 512, "map that does not end"),
        (sparse(major=1, realsize=1000000) + header(size=512) + b"9\n" * 256, "map"),
        (sparse("5,1,0", size=100000) + header(size=512), "malformed map"),
        (sparse("5,1,0,1", size=100000) + header(size=2), "malformed map"),
        (sparse("50,512", size=100) + header(size=512), "does not match"),
        (sparse("50,5", size=100) + header(size=512), "does not match"),
    ],
)
def test_malformed(data: bytes, match: str) -> None:
    with pytest.raises(BadLayer, match=match):
        read(data + bytes(1024) if "middle" not in match else data)


def test_a_global_header_is_left_out() -> None:
    assert [e.name for e, _ in read(mend(pax(b"10 path=x\n")[:512], 156, b"g") + bytes(512) + header())] == [b"name"]


def test_the_end() -> None:
    whole = Layer().file("a", "1").tar()
    assert len(read(whole + b"trailing" * 1000)) == 1
    assert len(read(whole[:1536])) == 1, "the end mark may be missing"
    assert read(b"") == []


@given(st.binary(max_size=2000), st.integers(0, 511), st.binary(min_size=1, max_size=12))
def test_only_bad_layer(junk: bytes, at: int, value: bytes) -> None:
    for data in (junk, mend(header(size=100), min(at, 500), value) + junk, pax(junk) + header()):
        try:
            for entry, _ in read(data):
                assert entry.kind in (FILE, HARDLINK, SYMLINK, DIRECTORY, *b"346")
        except BadLayer:
            pass


def test_compressions() -> None:
    plain = os.urandom(1000) + bytes(3 * CHUNK) + os.urandom(1000)
    members = gzip.compress(plain[:999]) + gzip.compress(plain[999:])
    frames = zstandard.compress(plain[:999]) + zstandard.compress(plain[999:])
    for data in (plain, gzip.compress(plain), members, members + bytes(700), zstandard.compress(plain), frames):
        out = list(decompressed(io.BytesIO(data)))
        assert b"".join(out) == plain
        assert max(map(len, out)) <= CHUNK


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_damaged_compression(compress: Callable[[bytes], bytes]) -> None:
    good = compress(os.urandom(5000))
    bad = [good + b"garbage"]
    if compress is gzip.compress:  # for zstd it is the diff id that tells
        bad += [good[:3] + b"x" + good[4:], good[:-20], good[:3000] + b"x" + good[3001:]]
    for data in bad:
        with pytest.raises(BadLayer, match=r"damaged|ends early"):
            list(decompressed(io.BytesIO(data)))

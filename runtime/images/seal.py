"""What `check` goes by where a layer's recipe can't tell: how the layer was when it was finished.

That is everything in a layer without a recipe; in others the directories that only the layers below could complete, and
copies of files of theirs. A zstd stream of records: length of the path, digest, path.
"""

import errno
import hashlib
import io
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from runtime.images.layers import Unpacked
from runtime.images.unpack.errors import BadLayer

_RECORD = struct.Struct("<I16s")
_READ = 1 << 20
_BLOCK = 4096
# The host's business, which may come and go.
FOREIGN_XATTRS = ("security.selinux", "security.ima", "security.evm")


def finish(layer: Path, recipe: Path, seal: Path, unpacked: Unpacked) -> tuple[int, int]:
    """Seal the layer, in which nothing changes any more, as far as its recipe doesn't tell of it.

    Returns bytes and inodes of recipe and seal.
    """
    names = [os.fsencode(path) for path in (*unpacked.implied, *(name for name, _ in unpacked.lower_links))]
    whole = not recipe.exists()
    if whole or names:
        root = os.fsencode(layer)
        with open(seal, "wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as writer:
            for name, told in digests(root, [b"", *_walk(root)] if whole else names):
                writer.write(_RECORD.pack(len(name), told) + name)
    sizes = [path.stat().st_size for path in (recipe, seal) if path.exists()]
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes), len(sizes)


def read(seal: Path) -> Iterator[tuple[bytes, bytes]]:
    """Each path and its digest. Raises BadLayer, OSError."""
    try:
        with open(seal, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as packed:
            reader = io.BufferedReader(packed)
            while head := reader.read(_RECORD.size):
                length, told = _RECORD.unpack(head)
                name = reader.read(length)
                if len(name) != length:
                    raise BadLayer("the layer's seal is damaged")
                yield name, told
    except (zstandard.ZstdError, struct.error) as error:
        raise BadLayer(f"the layer's seal is damaged: {error}") from error


def digests(root: bytes, names: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """For each path what is to be known of it, as a digest; links to one file read it once. Raises OSError."""
    inodes: set[int] = set()
    for name in names:
        path = root + b"/" + name
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        size = 0 if kind == stat.S_IFDIR else status.st_size
        told = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, size, status.st_mtime_ns)
        hashed = hashlib.blake2b(repr((told, sorted(xattrs(path).items()))).encode(), digest_size=16)
        if kind == stat.S_IFLNK:
            hashed.update(os.readlink(path))
        elif kind == stat.S_IFREG and status.st_ino not in inodes:
            inodes.add(status.st_ino)
            for data in _content(path):
                hashed.update(data)
        yield name, hashed.digest()


def _content(path: bytes) -> Iterator[bytes]:
    """What a file holds and where, in pieces; those of zeros are left out."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        position = 0
        while True:
            try:
                # To whole pieces: where exactly holes begin and end is the file system's affair.
                position = os.lseek(fd, position, os.SEEK_DATA) // _READ * _READ
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole from here on
                    return
                raise
            data = os.pread(fd, _READ, position)
            if data.strip(b"\0"):
                yield position.to_bytes(8, "big") + data
            position += _READ
    finally:
        os.close(fd)


def xattrs(path: bytes) -> dict[str, bytes]:
    """All but those that the host puts there by itself."""
    return {
        key: os.getxattr(path, key, follow_symlinks=False)
        for key in os.listxattr(path, follow_symlinks=False)
        if key not in FOREIGN_XATTRS
    }


def _walk(root: bytes) -> Iterable[bytes]:
    """The paths of everything below `root`, relative to it."""
    pending = [b""]
    while pending:
        directory = pending.pop()
        with os.scandir(root + b"/" + directory) as entries:
            for entry in entries:
                name = directory + b"/" + entry.name if directory else entry.name
                yield name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)


def strangers(root: bytes, known: set[bytes]) -> Iterator[bytes]:
    """The paths below `root` that aren't `known`."""
    return (name for name in _walk(root) if name not in known)

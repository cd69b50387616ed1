"""Whether what lies on the disk is still what was unpacked: every byte by the layer's diff id, and every attribute.

Nothing in a layer with a recipe lies behind a symlink (see `runtime.images.unpack.apply`): paths are taken as they are.
"""

import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.images import seal as seals
from runtime.images.merged import Merged
from runtime.images.unpack.apply import clean
from runtime.images.unpack.errors import BadLayer
from runtime.images.unpack.form import OPAQUE, OPAQUE_MARK, REFUSED_XATTRS, ROOT_LISTED, WHITEOUT
from runtime.images.unpack.recipe import rebuild
from runtime.images.unpack.tar import BLOCKDEV, CHAR, DIRECTORY, FIFO, FILE, HARDLINK, SYMLINK, Entry, Reader, Stream

_KINDS = {
    FILE: stat.S_IFREG,
    SYMLINK: stat.S_IFLNK,
    CHAR: stat.S_IFCHR,
    BLOCKDEV: stat.S_IFBLK,
    DIRECTORY: stat.S_IFDIR,
    FIFO: stat.S_IFIFO,
}
_SECOND_NS = 1_000_000_000
# What every file system takes.
_TIME_LIMIT_NS = (1 << 31) * _SECOND_NS
_NOT_HERE = (errno.ENOTSUP, errno.EPERM, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one layer. `problem` is "" when it is whole; `repaired` tells that it was fetched again."""

    layer: str
    diff_id: str
    images: tuple[str, ...]
    problem: str
    repaired: bool = False


def problem_of(layer: Path, recipe: Path, seal: Path, diff_id: str) -> str:
    """What is wrong with the layer; "" if nothing. Reads all of it."""
    root = os.fsencode(layer)
    if not layer.is_dir():
        return "its directory is missing"
    if not recipe.exists() and not seal.exists():
        return "what it is compared with is missing"
    try:
        sealed = dict(seals.read(seal)) if seal.exists() else {}
        for name, found in seals.digests(root, sealed):
            if found != sealed[name]:
                return f"{_shown(name)} is not as it was"
        known = _Known(root, sealed)
        if recipe.exists() and (problem := known.problem_of(recipe, layer, diff_id)):
            return problem
        stranger = next(seals.strangers(root, known.names), None)
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{_shown(os.fsencode(error.filename or b'?').removeprefix(root + b'/'))} is missing"
    except (BadLayer, OSError) as error:
        return str(error)
    return "" if stranger is None else f"{_shown(stranger)} does not belong to it"


def _shown(name: bytes) -> str:
    return repr(os.fsdecode(name)[:200])


class _Known:
    """What the entries of a layer say that there is, compared with it as they come."""

    def __init__(self, root: bytes, sealed: dict[bytes, bytes]) -> None:
        self._root = root
        self._view = Merged((Path(os.fsdecode(root)),), itertools.count())
        self._sealed = sealed
        self.names = set(sealed)
        # What comes more than once, or speaks of others, is looked at when all has been seen.
        self._directories: dict[bytes, Entry] = {}
        self._opaque: set[bytes] = set()

    def problem_of(self, recipe: Path, layer: Path, diff_id: str) -> str:
        algorithm, _, wanted = diff_id.partition(":")
        hashed = hashlib.new(algorithm)
        stream = Stream(_hashing(rebuild(recipe, layer), hashed))
        for entry in Reader(stream):
            if problem := self._entry(clean(entry.name), entry):
                return problem
            for _, length in entry.extents:
                for _ in stream.pieces(length):
                    pass
        if hashed.hexdigest() != wanted:
            return "a file holds something else"
        for name, entry in self._directories.items():
            if problem := self._differs(name, entry):
                return problem
        if b"" in self._opaque - self._directories.keys():  # the root, which nobody needs to list
            os.getxattr(self._root, OPAQUE)
        return ""

    def _entry(self, name: bytes, entry: Entry) -> str:
        parent, _, base = name.rpartition(b"/")
        if base.startswith(WHITEOUT):
            return self._whiteout(parent, base)
        self.names.add(name)
        if entry.kind == DIRECTORY:
            before = self._directories.get(name)
            entry.xattrs = [*(before.xattrs if before else ()), *entry.xattrs]
            self._directories[name] = entry
            return ""
        if entry.kind == HARDLINK:
            return self._link(name, clean(entry.link))
        return self._differs(name, entry)

    def _whiteout(self, parent: bytes, base: bytes) -> str:
        hidden = base[len(WHITEOUT) :]
        if base == OPAQUE_MARK:
            self._opaque.add(parent)
        elif not hidden.startswith(WHITEOUT):
            name = parent + b"/" + hidden if parent else hidden
            self.names.add(name)
            if stat.S_ISDIR(os.lstat(self._root + b"/" + name).st_mode):
                self._opaque.add(name)
        return ""

    def _link(self, name: bytes, target: bytes) -> str:
        if name in self._sealed:
            return ""
        status = os.lstat(self._root + b"/" + name)
        # The layer's symlinks may lead to it.
        other = self._view.lookup(os.fsdecode(target), follow=False)
        same = other is not None and status.st_ino == other.status.st_ino
        return "" if same else f"{_shown(name)} is no link to {_shown(target)}"

    def _differs(self, name: bytes, entry: Entry) -> str:
        path = self._root + b"/" + name
        status = os.lstat(path)
        wanted = (_KINDS[entry.kind], entry.uid, entry.gid)
        if (stat.S_IFMT(status.st_mode), status.st_uid, status.st_gid) != wanted:
            return f"{_shown(name)} has another owner or is of another kind"
        if entry.kind == SYMLINK:
            if os.readlink(path) != entry.link:
                return f"{_shown(name)} leads elsewhere"
        elif stat.S_IMODE(status.st_mode) != entry.mode:
            return f"{_shown(name)} has mode {stat.S_IMODE(status.st_mode):o} instead of {entry.mode:o}"
        if entry.kind in (CHAR, BLOCKDEV) and status.st_rdev != os.makedev(entry.major, entry.minor):
            return f"{_shown(name)} is another device"
        if entry.kind == FILE and status.st_size != entry.size:
            return f"{_shown(name)} has {status.st_size} bytes instead of {entry.size}"
        if not _same_time(status.st_mtime_ns, entry.mtime_ns):
            return f"{_shown(name)} was modified"
        return self._attributes(name, entry)

    def _attributes(self, name: bytes, entry: Entry) -> str:
        path = self._root + b"/" + name
        there = seals.xattrs(path)
        there.pop(ROOT_LISTED, None)
        if (there.pop(OPAQUE, None) is not None) != (name in self._opaque):
            return f"{_shown(name)} hides what is below it, or does so no more"
        for raw, value in dict(entry.xattrs).items():
            key = os.fsdecode(raw)
            if raw.startswith(REFUSED_XATTRS):
                continue
            if there.pop(key, value if _impossible(path, key, entry.kind) else None) != value:
                return f"{_shown(name)} has lost its attribute {key}"
        return f"{_shown(name)} has an attribute {min(there)} that it had not" if there else ""


def _impossible(path: bytes, key: str, kind: int) -> bool:
    """Whether the file can't have this attribute: the file system has none of its kind, or keeps it elsewhere."""
    if key.startswith("system.") or (key.startswith("user.") and kind not in (FILE, DIRECTORY)):
        return True
    try:
        os.getxattr(path, key, follow_symlinks=False)
    except OSError as error:
        return error.errno in _NOT_HERE
    return False


def _same_time(found_ns: int, wanted_ns: int) -> bool:
    """File systems without fractions of seconds cut them off."""
    if not 0 <= wanted_ns < _TIME_LIMIT_NS:
        return True
    return found_ns in (wanted_ns, wanted_ns // _SECOND_NS * _SECOND_NS)


def _hashing(chunks: Iterable[bytes], hashed: Any) -> Iterator[bytes]:
    for chunk in chunks:
        hashed.update(chunk)
        yield chunk

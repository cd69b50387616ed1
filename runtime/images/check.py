"""Whether what lies on the disk is still what was unpacked: every byte by the layer's diff id, and every attribute."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.images.merged import Merged
from runtime.images.unpack.errors import BadLayer
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


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one layer. `problem` is "" when it is whole; without `verified` only its presence is known.

    `repaired` tells that it was fetched again.
    """

    layer: str
    diff_id: str
    images: tuple[str, ...]
    verified: bool
    problem: str
    repaired: bool = False


def problem_of(layer: Path, recipe: Path, diff_id: str) -> str:
    """What is wrong with the layer, "" if nothing. Reads all of it."""
    hashed = hashlib.new(diff_id.partition(":")[0])
    view = Merged((layer,))
    try:
        stream = Stream(_hashing(rebuild(recipe, layer), hashed))
        for entry in Reader(stream):
            if problem := _differs(layer, view, entry):
                return problem
            _skip(stream, entry)
    except FileNotFoundError as error:
        return f"{os.fsdecode(error.filename or '?')} is missing"
    except (BadLayer, OSError) as error:
        return str(error)
    return "" if f"{diff_id.partition(':')[0]}:{hashed.hexdigest()}" == diff_id else "a file holds something else"


def _hashing(chunks: Iterable[bytes], hashed: Any) -> Iterator[bytes]:
    for chunk in chunks:
        hashed.update(chunk)
        yield chunk


def _skip(stream: Stream, entry: Entry) -> None:
    for _, length in entry.extents:
        for _ in stream.pieces(length):
            pass


def _differs(layer: Path, view: Merged, entry: Entry) -> str:
    name = os.fsdecode(b"/".join(part for part in entry.name.split(b"/") if part not in (b"", b".")))
    if os.path.basename(name).startswith(".wh."):
        return ""
    if not name:
        status = os.lstat(layer)
    elif (found := view.lookup(name, follow=False)) is not None:
        status = found.status
    elif entry.kind == CHAR and entry.major == entry.minor == 0:
        return ""  # a whiteout as overlay has it, which the view doesn't show
    else:
        return f"{name[:200]!r} is missing"
    if entry.kind == HARDLINK:
        return ""
    wanted = (_KINDS[entry.kind], entry.uid, entry.gid)
    if (stat.S_IFMT(status.st_mode), status.st_uid, status.st_gid) != wanted:
        return f"{name[:200]!r} has another owner or is of another kind"
    if entry.kind == SYMLINK:
        same = found is not None and os.readlink(found.path) == os.fsdecode(entry.link)
        return "" if same else f"{name[:200]!r} leads elsewhere"
    if stat.S_IMODE(status.st_mode) != entry.mode:
        return f"{name[:200]!r} has mode {stat.S_IMODE(status.st_mode):o} instead of {entry.mode:o}"
    if entry.kind == FILE and status.st_size != entry.size:
        return f"{name[:200]!r} has {status.st_size} bytes instead of {entry.size}"
    return ""

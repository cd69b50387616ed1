"""The merged view of stacked layers, as overlayfs would show it, without mounting anything.

Layers are hostile but at rest: nobody else writes below them, so a path whose components were found to be real
directories stays one, and symlinks are only ever followed here, inside the view.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENAMETOOLONG, ENOENT, ENOTDIR
from pathlib import Path

from runtime.errors import Exhausted, NotFound
from runtime.images.unpack.form import OPAQUE, is_whiteout

_LINKS = 40
# Some ten seconds.
_STEPS = 2_000_000
_PATH_LIMIT = 4096
_NOTHING_THERE = (ENOENT, ENOTDIR, ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class Found:
    """What is at a path of the view: the real path of the topmost, and for directories those merged below it."""

    path: str
    status: os.stat_result
    directories: tuple[str, ...]


class Merged:
    """Layers, topmost first, as one tree. Paths are `/`-separated and relative to its root.

    `steps` runs out when enough was looked at: a small image can have deep names, many of them, and in each layer.
    Then it is Exhausted. While a view is in use no directory that it has shown goes away.
    """

    def __init__(self, layers: tuple[Path, ...], steps: Iterator[int] | None = None) -> None:
        self._roots = tuple(str(layer) for layer in layers)
        self._steps = iter(range(_STEPS)) if steps is None else steps
        # Where the last path led; the next one is often near.
        self._trail: tuple[list[Found], list[str]] = [self._root()], []

    def lookup(self, path: str, follow: bool = True) -> Found | None:
        """What is at `path`, None if nothing. Symlinks are followed inside the view, the last one if `follow`."""
        found, _ = self._walk(path, follow)
        return found

    def resolve(self, path: str) -> str | None:
        """`path` without symlinks, relative to the root; None if it leads nowhere."""
        found, where = self._walk(path, True)
        return "/".join(where) if found else None

    def _walk(self, path: str, follow: bool) -> tuple[Found | None, list[str]]:
        parts = _parts(path)
        # The directories that were entered, root first, and their names; `..` goes back.
        entered, names = self._trail
        shared = 0
        while shared < min(len(names), len(parts) - 1) and names[shared] == parts[shared]:
            shared += 1
        self._trail = entered, names = entered[: shared + 1], names[:shared]
        pending = parts[shared:][::-1]
        links = 0
        while pending:
            name = pending.pop()
            if name == "..":
                if names:
                    names.pop()
                    entered.pop()
                continue
            found = self._child(entered[-1].directories, name)
            if found is None:
                return None, names
            if stat.S_ISLNK(found.status.st_mode) and (pending or follow):
                links += 1
                target = os.readlink(found.path)
                if links > _LINKS or len(target) + sum(map(len, pending)) > 2 * _PATH_LIMIT:
                    return None, names
                if target.startswith("/"):
                    entered, names = entered[:1], []
                pending += _parts(target)[::-1]
                continue
            names.append(name)
            entered.append(found)
            if pending and not found.directories:
                return None, names
        return entered[-1], names

    def _root(self) -> Found:
        directories: list[str] = []
        for root in self._roots:
            directories.append(root)
            if _is_opaque(root):
                break
        return Found(directories[0], os.lstat(directories[0]), tuple(directories))

    def _child(self, directories: tuple[str, ...], name: str) -> Found | None:
        """What the merged `directories`, topmost first, show as `name`."""
        top: os.stat_result | None = None
        merged: list[str] = []
        for directory in directories:
            if next(self._steps, None) is None:
                raise Exhausted("image: too many names lead through too many layers")
            path = f"{directory}/{name}"
            try:
                status = os.lstat(path)
            except OSError as error:
                if error.errno not in _NOTHING_THERE:
                    raise
                continue
            if stat.S_ISDIR(status.st_mode):
                top = top or status
                merged.append(path)
                if _is_opaque(path):
                    break
            elif top is None and not is_whiteout(status):
                return Found(path, status, ())
            else:
                break  # a whiteout, or a file below a directory: hides what is under it
        return Found(merged[0], top, tuple(merged)) if top else None


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part and part != "."]


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def read_file(view: Merged, path: str, limit_bytes: int) -> bytes:
    """A regular file of the view. Raises NotFound; Exhausted if it is larger than `limit_bytes`."""
    if len(path) > _PATH_LIMIT or "\0" in path:
        raise NotFound(f"{path[:200]!r} is not a path")
    try:
        found = view.lookup(path)
        if found is None or not stat.S_ISREG(found.status.st_mode):
            raise NotFound(f"{path} is not a file of the image")
        fd = os.open(found.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"{path}: {(error.strerror or str(error)).lower()}") from error
    with os.fdopen(fd, "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise Exhausted(f"{path} is larger than {limit_bytes} bytes")
    return data

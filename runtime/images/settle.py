"""What a layer leaves to the layers below it, filled in when those are there.

A layer may hold entries in directories that it doesn't list, and hard links to files that only a lower layer holds.
As if it had been unpacked on top of them, such directories take owner, mode, times and attributes from below; where
there is a symlink to a directory below (/bin to /usr/bin), the entries go where it leads; and links become copies with
everything that the file below has.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import Exhausted
from runtime.images.errors import BadImage
from runtime.images.layers import Unpacked, usage_of
from runtime.images.merged import Found, Merged
from runtime.removal import remove_tree

_BLOCK = 4096
_CHUNK = 1 << 20


def settle(
    layer: Path, below: tuple[Path, ...], unpacked: Unpacked, recipe: Path, limit_bytes: int, steps: Iterator[int]
) -> tuple[int, int]:
    """Complete `layer`, which lies on top of `below` (topmost first). Returns the bytes and inodes that it takes then.

    The recipe goes when files are moved. Links to one file stay links to one copy. Raises BadImage for a hard link to
    what isn't there, Exhausted for copies of more than `limit_bytes` or when `steps` run out (see `Merged`), OSError.
    """
    settling = _Settling(layer, below, steps)
    settling.complete(unpacked.implied)
    if settling.moved:
        recipe.unlink(missing_ok=True)
    grown, copies = settling.link(unpacked.lower_links, limit_bytes)
    if settling.moved:  # what was in both places is gone
        return usage_of([str(layer)])
    return unpacked.bytes_used + grown, unpacked.inodes + copies


class _Settling:
    """One layer; `moved` are its directories of which those below it have a symlink, with where that leads."""

    def __init__(self, layer: Path, below: tuple[Path, ...], steps: Iterator[int]) -> None:
        self._layer = layer
        self._steps = steps
        self._own = Merged((layer,), steps)
        self._below = Merged(below, steps) if below else None
        self.moved: dict[str, str] = {}

    def complete(self, implied: Iterable[str]) -> None:
        """The directories that the layer doesn't list, parents first, become what they are below."""
        if self._below is None:
            return
        fresh: list[str] = []
        for path in implied:
            path = _where(path, self.moved)
            here, there = self._own.lookup(path, follow=False), self._below.lookup(path, follow=False)
            if here is None or not stat.S_ISDIR(here.status.st_mode):
                continue
            if there is None:
                fresh.append(path)
            elif stat.S_ISDIR(there.status.st_mode):
                _adopt(here.path, there)
            elif stat.S_ISLNK(there.status.st_mode):
                self._move(path, here, self._below)
        # After all moves: only then has each its parent.
        for path in sorted(fresh, key=lambda path: path.count("/")):
            if (here := self._own.lookup(_where(path, self.moved), follow=False)) is not None:
                _inherit(here.path)

    def _move(self, path: str, here: Found, below: Merged) -> None:
        """What is in a directory goes where the symlink below leads, if that is to a directory."""
        target = below.resolve(path)
        if not target or (directory := _directory(self._layer, self._own, below, target)) is None:
            return
        with _times_kept(os.path.dirname(here.path)):
            _merge(here.path, directory)
        self.moved[path] = target
        self._own = Merged((self._layer,), self._steps)

    def link(self, lower_links: Iterable[tuple[str, str]], limit_bytes: int) -> tuple[int, int]:
        """Make the hard links, of copies of what is below. Returns bytes and number of the copies."""
        grown = 0
        copies: dict[str, str] = {}
        linked: set[str] = set()
        for name, target in lower_links:
            name, target = _where(name, self.moved), _where(target, self.moved)
            mine = self._own.lookup(target, follow=False)
            there = self._below.lookup(target, follow=False) if self._below else None
            # What was not there when the link was come to has come later, if it is no link and nothing was moved.
            source = (mine or there) if self.moved or target in linked else (there or mine)
            linked.add(name)
            parent = self._own.lookup(os.path.dirname(name))
            if source is None or parent is None or stat.S_ISDIR(source.status.st_mode):
                raise BadImage(
                    f"hard link {name[:200]!r} to {target[:200]!r}, which neither the layer nor those below hold"
                )
            path = os.path.join(parent.path, os.path.basename(name))
            with _times_kept(parent.path):
                if source is mine or source.path in copies:
                    _link(copies.get(source.path, source.path), path)
                else:
                    copies[source.path] = path
                    grown += _copy(source, path, limit_bytes - grown)
        return grown, len(copies)


@contextmanager
def _times_kept(directory: str) -> Iterator[None]:
    """What is added to a directory afterwards leaves it with the times that the layer, or one below, gave it."""
    status = os.lstat(directory)
    yield
    os.utime(directory, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _where(path: str, moved: dict[str, str]) -> str:
    """`path` after the moves so far, each of which is to where there is no symlink, and so nothing that was moved."""
    if not moved:
        return path
    where, _, rest = path.partition("/")
    while rest:
        where = moved.get(where, where)
        name, _, rest = rest.partition("/")
        where = f"{where}/{name}"
    return where


def _directory(layer: Path, own: Merged, view: Merged, target: str) -> str | None:
    """The layer's own directory `target`, which below is one without symlinks; made as below where it is missing.

    None if the layer has something else there.
    """
    path = str(layer)
    done = ""
    for name in target.split("/"):
        done = f"{done}/{name}" if done else name
        path = f"{path}/{name}"
        there = view.lookup(done, follow=False)
        if there is None or not stat.S_ISDIR(there.status.st_mode):
            return None
        here = own.lookup(done, follow=False)
        if here is None:
            with _times_kept(os.path.dirname(path)):
                os.mkdir(path)
            _adopt(path, there)
        elif not stat.S_ISDIR(here.status.st_mode):
            return None
    return path


def _merge(source: str, target: str) -> None:
    """Move everything in the directory `source` into `target`, where it wins; removes `source`."""
    pending, done = [(source, target)], []
    while pending:
        source, target = pending.pop()
        done.append((source, target, os.lstat(target)))
        for entry in list(os.scandir(source)):
            there = f"{target}/{entry.name}"
            in_place = os.path.isdir(there) and not os.path.islink(there)
            if in_place and entry.is_dir(follow_symlinks=False):
                pending.append((entry.path, there))
                continue
            if in_place:
                remove_tree(Path(there))
            elif os.path.lexists(there):
                os.unlink(there)
            os.rename(entry.path, there)
    for source, target, before in reversed(done):
        os.rmdir(source)
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns), follow_symlinks=False)


def _adopt(path: str, there: Found) -> None:
    status = there.status
    os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
    os.chmod(path, stat.S_IMODE(status.st_mode))
    _copy_xattrs(there.path, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _inherit(path: str) -> None:
    """A directory that nobody lists gets what mkdir(2) would have given it here, where its parent looks as below."""
    parent = os.lstat(os.path.dirname(path))
    if parent.st_mode & stat.S_ISGID:
        os.chown(path, -1, parent.st_gid, follow_symlinks=False)
        os.chmod(path, stat.S_IMODE(os.lstat(path).st_mode) | stat.S_ISGID)


def _link(source: str, path: str) -> None:
    try:
        os.link(source, path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EMLINK:
            raise BadImage(f"{os.path.basename(source)[:200]!r} has too many hard links") from error
        raise


def _copy(source: Found, path: str, limit_bytes: int) -> int:
    """Returns how many bytes it takes."""
    status = source.status
    written = 0
    if stat.S_ISREG(status.st_mode):
        with open(source.path, "rb", buffering=0) as reader, open(path, "xb", buffering=0) as writer:
            written = _copy_data(reader.fileno(), writer.fileno(), status.st_size, limit_bytes)
    elif stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(source.path), path)
    else:
        os.mknod(path, status.st_mode, status.st_rdev)
    os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(path, stat.S_IMODE(status.st_mode))
    _copy_xattrs(source.path, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
    return -(-written // _BLOCK) * _BLOCK


def _copy_data(reader: int, writer: int, size: int, limit_bytes: int) -> int:
    """Holes stay holes. Returns how many bytes are none."""
    written = position = 0
    os.ftruncate(writer, size)
    while position < size:
        try:
            position = os.lseek(reader, position, os.SEEK_DATA)
            end = os.lseek(reader, position, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                break
            raise
        while position < end:
            data = os.pread(reader, min(end - position, _CHUNK), position)
            if not data:
                return written
            written += len(data)
            if written > limit_bytes:
                raise Exhausted(f"hard links to files of lower layers take more than {limit_bytes} bytes")
            left = memoryview(data)
            while left:
                done = os.pwrite(writer, left, position)
                left, position = left[done:], position + done
    return written


def _copy_xattrs(source: str, path: str) -> None:
    for key in os.listxattr(source, follow_symlinks=False):
        if not key.startswith(("trusted.overlay.", "security.selinux")):
            os.setxattr(path, key, os.getxattr(source, key, follow_symlinks=False), follow_symlinks=False)

"""Writes a layer's entries into the current root directory, in the form that overlayfs takes as a lower layer.

Threat model: entries are hostile. The process is already confined: the layer's directory is its root, so no name,
symlink or hard link reaches anything else, and symlinks in a name resolve as they would in the container. What is
left to defend here is the form itself: `..` is refused, a layer can't plant overlay's own attributes, every count and
size is bounded, and the work is linear in the size of the archive.

Whiteouts (OCI image-spec, layer.md) become character devices 0:0 and the attribute trusted.overlay.opaque. They hide
what lower layers hold and never what their own layer holds, in whatever order the archive lists them.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from runtime.images.unpack.errors import BadLayer, LimitReached
from runtime.images.unpack.form import OPAQUE, OPAQUE_MARK, REFUSED_XATTRS, ROOT_LISTED, WHITEOUT, is_whiteout
from runtime.images.unpack.recipe import Recorder
from runtime.images.unpack.tar import BLOCKDEV, CHAR, DIRECTORY, FIFO, FILE, HARDLINK, SYMLINK, Entry, Stream
from runtime.linux import files

# The host has names below the layer's directory, and PATH_MAX of them.
_NAME_LIMIT = 4096 - 512
_BLOCK = 4096
# After so much of a file the disk begins to write it: the sync at the end has less to wait for.
_EARLY_BYTES = 1 << 20
# What ext4 keeps of a symlink in its inode.
_LINK_INLINE = 59
_ID_LIMIT = (1 << 32) - 1
_TIME_LIMIT_NS = (1 << 63) - 1
# A bound on what is reported for the parent to settle against lower layers.
_UNSETTLED_LIMIT_BYTES = 8 << 20


@dataclass(slots=True)
class Applied:
    """What was written. `implied` are directories that the layer holds entries in but doesn't list, parents first;
    `lower_links` are (name, target) of hard links whose target must be in a lower layer."""

    bytes_used: int = 0
    inodes: int = 0
    implied: list[bytes] = field(default_factory=list)
    lower_links: list[tuple[bytes, bytes]] = field(default_factory=list)


def clean(name: bytes) -> bytes:
    """`name` relative to the root, b"" for the root itself. Raises BadLayer if it holds `..` or is too long."""
    parts = [part for part in name.split(b"/") if part and part != b"."]
    if b".." in parts:
        raise BadLayer(f"name {name[:200]!r} leads out of the layer")
    cleaned = b"/".join(parts)
    if len(cleaned) > _NAME_LIMIT:
        raise BadLayer(f"name {name[:200]!r}: file name too long")
    return cleaned


def _blocks(target: bytes | int) -> int:
    return (os.fstat(target) if isinstance(target, int) else os.lstat(target)).st_blocks


class Applier:
    """Applies entries one by one; `finish` sets the directories' times and returns the sums."""

    def __init__(self, stream: Stream, entries_limit: int, recorder: Recorder) -> None:
        self._stream = stream
        self._recorder = recorder
        self._left = entries_limit
        self._limit = entries_limit
        self._root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # Paths known to lead to directories. Forgotten as a whole when a directory or symlink is replaced; what is then
        # looked at again counts as entries, or a deep name and a symlink in turns would cost its depth each time.
        self._known = {b""}
        self._implied: dict[bytes, None] = {}
        self._times: dict[bytes, tuple[int, int]] = {}
        self._setgid = False
        # What of the layers below is gone by now, and what hides all that they have below it.
        self._removed: set[bytes] = set()
        self._opaque: set[bytes] = set()
        self._done = Applied()

    def apply(self, entries: Iterable[Entry]) -> Applied:
        for entry in entries:
            self._count()
            name = clean(entry.name)
            parent, _, base = name.rpartition(b"/")
            if parent not in self._known:
                self._make_parents(parent)
            if base.startswith(WHITEOUT):
                self._whiteout(parent, base)
            else:
                try:
                    self._entry(name, entry)
                except ValueError as error:  # a number that no system call takes
                    raise BadLayer(f"entry {entry.name[:200]!r}: {error}") from error
        return self._finish()

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise LimitReached(f"layer has more than {self._limit} entries")

    def _finish(self) -> Applied:
        for path, times in self._times.items():
            try:
                os.utime(path or b".", ns=times, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                pass  # replaced by a later entry
        self._count_directories()
        self._done.implied = list(self._implied)
        unsettled = sum(map(len, self._implied)) + sum(len(a) + len(b) for a, b in self._done.lower_links)
        if unsettled > _UNSETTLED_LIMIT_BYTES:
            raise LimitReached("layer leaves too many directories or links to the layers below")
        os.close(self._root)
        return self._done

    def _count_directories(self) -> None:
        """A directory takes as much as its file system thinks that so many names do; a block was assumed."""
        self._done.inodes += 1
        self._done.bytes_used += _BLOCK
        for path in {b"", *self._times, *self._implied}:
            try:
                status = os.lstat(path or b".")
            except (FileNotFoundError, NotADirectoryError):
                continue
            if stat.S_ISDIR(status.st_mode):
                self._done.bytes_used += status.st_blocks * 512 - _BLOCK

    def _entry(self, name: bytes, entry: Entry) -> None:
        kind = entry.kind
        if not 0 <= entry.uid < _ID_LIMIT or not 0 <= entry.gid < _ID_LIMIT:
            raise BadLayer(f"entry {entry.name[:200]!r} has owner {entry.uid}:{entry.gid}")
        if kind == DIRECTORY:
            self._directory(name, entry)
            return
        if not name:
            raise BadLayer("the root is not a directory")
        if kind == HARDLINK:
            self._hardlink(name, entry)
            return
        if kind == FILE:
            self._file(name, entry)
            return
        mode = entry.mode
        if kind == SYMLINK:
            if not entry.link:
                raise BadLayer(f"symlink {name[:200]!r} leads nowhere")
            self._create(name, lambda: os.symlink(entry.link, name))
            if len(entry.link) > _LINK_INLINE:
                self._done.bytes_used += _BLOCK
        elif kind == FIFO:
            self._create(name, lambda: os.mkfifo(name, mode))
        else:
            mode |= stat.S_IFCHR if kind == CHAR else stat.S_IFBLK if kind == BLOCKDEV else 0
            device = os.makedev(entry.major, entry.minor)
            self._create(name, lambda: os.mknod(name, mode, device))
        self._done.inodes += 1
        if entry.uid or entry.gid or self._setgid:
            os.chown(name, entry.uid, entry.gid, follow_symlinks=False)
            if kind != SYMLINK and mode & 0o6000:
                os.chmod(name, entry.mode)
        self._set_xattrs(name, entry)
        os.utime(name, ns=self._entry_times(entry), follow_symlinks=False)

    def _file(self, name: bytes, entry: Entry) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, entry.mode)
        except FileExistsError:
            self._remove(name)
            fd = os.open(name, flags, entry.mode)
        try:
            written = position = fresh = 0
            for offset, length in entry.extents:
                if offset != position:
                    os.lseek(fd, offset, os.SEEK_SET)
                self._recorder.data(name, offset, length)
                for piece in self._stream.pieces(length):
                    while piece:
                        done = os.write(fd, piece)
                        piece = piece[done:]
                        fresh += done
                    if fresh >= _EARLY_BYTES:
                        files.start_writeback(fd)
                        fresh = 0
                position = offset + length
                written += length
            if position != entry.size:
                os.ftruncate(fd, entry.size)
            if entry.uid or entry.gid or self._setgid:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.mode & 0o6000:
                os.fchmod(fd, entry.mode)
            self._set_xattrs(fd, entry)
            os.utime(fd, ns=self._entry_times(entry))
        finally:
            os.close(fd)
        self._done.inodes += 1
        self._done.bytes_used += -(-written // _BLOCK) * _BLOCK

    def _directory(self, name: bytes, entry: Entry) -> None:
        path = name or b"."
        if name:
            self._make_directory(name, entry.mode, follow=False)
        else:
            os.setxattr(path, ROOT_LISTED, b"y")
        self._implied.pop(name, None)
        os.chown(path, entry.uid, entry.gid)
        os.chmod(path, entry.mode)
        self._setgid = self._setgid or bool(entry.mode & stat.S_ISGID)
        self._set_xattrs(path, entry)
        self._known.add(name)
        self._times[name] = self._entry_times(entry)

    def _hardlink(self, name: bytes, entry: Entry) -> None:
        target = clean(entry.link)
        if target == name:
            return
        try:
            if target in self._removed and is_whiteout(os.lstat(target)):
                raise FileNotFoundError
            self._create(name, lambda: os.link(target, name, follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            if self._gone(target):
                raise BadLayer(f"hard link {name[:200]!r} to {target[:200]!r}, which the layer removes") from None
            self._done.lower_links.append((name, target))
        except PermissionError as error:  # what link(2) says of a directory
            raise BadLayer(f"hard link {name[:200]!r} to {target[:200]!r}, which is a directory") from error
        except OSError as error:
            if error.errno == errno.EMLINK:
                raise BadLayer(f"{target[:200]!r} has too many hard links") from error
            raise

    def _gone(self, path: bytes) -> bool:
        """Whether an earlier entry of this layer has removed what the layers below may have at `path`.

        Each directory that is looked at counts as an entry, or links with deep targets would cost their depth.
        """
        if path in self._removed:
            return True
        at = len(path)
        while at >= 0:
            self._count()
            at = path.rfind(b"/", 0, at)
            above = path[: max(at, 0)]
            if above in self._removed or above in self._opaque:
                return True
        return False

    def _create(self, name: bytes, make: Callable[[], None]) -> None:
        try:
            make()
        except FileExistsError:
            self._remove(name)
            make()

    def _make_parents(self, parent: bytes) -> None:
        at = 0
        while at != len(parent):
            at = parent.find(b"/", at + 1)
            at = len(parent) if at < 0 else at
            path = parent[:at]
            if path not in self._known:
                self._count()
                if self._make_directory(path, 0o755, follow=True):
                    self._implied[path] = None
                self._known.add(path)

    def _make_directory(self, path: bytes, mode: int, follow: bool) -> bool:
        """Make sure that `path` is a directory; True if it was made. `follow`: a symlink that leads to one will do."""
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            there = os.lstat(path)
            if stat.S_ISDIR(there.st_mode):
                return False
            if follow and stat.S_ISLNK(there.st_mode):
                self._recorder.spoilt = True
                # Dangling in this layer, as its target may be in a lower one: made here, inside the root.
                os.close(files.make_directories(self._root, os.fsdecode(path), made=self._led_to))
                return False
            self._remove(path)
            os.mkdir(path, mode)
            if is_whiteout(there):
                os.setxattr(path, OPAQUE, b"y")
        self._done.inodes += 1
        self._done.bytes_used += _BLOCK
        return True

    def _led_to(self, path: str) -> None:
        """A directory was made because a symlink leads there, or further."""
        self._count()
        self._implied[os.fsencode(os.path.normpath(path).lstrip("/"))] = None
        self._done.inodes += 1
        self._done.bytes_used += _BLOCK

    def _whiteout(self, parent: bytes, base: bytes) -> None:
        if base == OPAQUE_MARK:
            os.setxattr(parent or b".", OPAQUE, b"y")
            self._opaque.add(parent)
            return
        if base.startswith(WHITEOUT + WHITEOUT):
            return  # AUFS's own bookkeeping
        hidden = base[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise BadLayer(f"whiteout of {hidden!r}")
        path = parent + b"/" + hidden if parent else hidden
        self._removed.add(path)
        try:
            os.mknod(path, stat.S_IFCHR, 0)
            self._done.inodes += 1
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                os.setxattr(path, OPAQUE, b"y")

    def _set_xattrs(self, target: bytes | int, entry: Entry) -> None:
        if not entry.xattrs:
            return
        before = _blocks(target)
        for key, value in entry.xattrs:
            if key.startswith(REFUSED_XATTRS):
                continue
            try:
                if isinstance(target, int):
                    os.setxattr(target, key, value)
                else:
                    os.setxattr(target, key, value, follow_symlinks=False)
            except OSError as error:
                # user.* exists on files and directories alone, and not every file system has every kind.
                if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                    what = entry.name + b" (attribute %s of %d bytes)" % (key, len(value))
                    raise OSError(error.errno, error.strerror, what) from error
        if entry.kind != DIRECTORY:  # which are looked at in the end
            self._done.bytes_used += (_blocks(target) - before) * 512

    def _entry_times(self, entry: Entry) -> tuple[int, int]:
        mtime = max(-_TIME_LIMIT_NS, min(entry.mtime_ns, _TIME_LIMIT_NS))
        if entry.atime_ns is None:
            return mtime, mtime
        return max(-_TIME_LIMIT_NS, min(entry.atime_ns, _TIME_LIMIT_NS)), mtime

    def _remove(self, path: bytes) -> None:
        """Remove what an earlier entry left at `path`, a whole tree if need be, without recursion."""
        self._recorder.spoilt = True
        there = os.lstat(path)
        if stat.S_ISDIR(there.st_mode) or stat.S_ISLNK(there.st_mode):
            self._known = {b""}
        if not stat.S_ISDIR(there.st_mode):
            self._unlink(path)
            return
        pending = [path]
        while pending:
            directory = pending[-1]
            before = len(pending)
            with os.scandir(directory) as children:
                for child in children:
                    if child.is_dir(follow_symlinks=False):
                        pending.append(child.path)
                    else:
                        self._unlink(child.path)
            if len(pending) == before:
                os.rmdir(directory)
                pending.pop()
                self._implied.pop(directory, None)
                self._times.pop(directory, None)
                self._done.inodes -= 1
                self._done.bytes_used -= _BLOCK

    def _unlink(self, path: bytes) -> None:
        there = os.lstat(path)
        os.unlink(path)
        if there.st_nlink == 1:
            self._done.inodes -= 1
            if stat.S_ISREG(there.st_mode):
                self._done.bytes_used -= -(-min(there.st_size, there.st_blocks * 512) // _BLOCK) * _BLOCK

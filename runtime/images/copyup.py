"""The program that copies what an image has in its VOLUMEs into the directories that a container gets for them.

Started by `runtime.images.volumes`, with the job as JSON on standard input; its report is a line of JSON.

Threat model: names, links, contents and sizes are the image's. The program mounts the image's layers as one read-only
overlay that nobody else sees, and has that as its root before it resolves the first name of the image's, by openat2
with RESOLVE_IN_ROOT (CVE-2022-23648); below a VOLUME it goes name by name and follows no link. What it writes to was
opened before, is new and known to nobody else. It reads no content, has few capabilities, copies no more than it may,
and dies with cribd.
"""

import errno
import json
import os
import resource
import stat
import sys
from typing import Any, Final

from runtime.images.unpack.errors import text_of
from runtime.images.unpack.form import REFUSED_XATTRS
from runtime.linux import caps
from runtime.linux.files import open_in_root
from runtime.linux.process import PR_SET_NO_NEW_PRIVS, die_with, prctl
from runtime.plan.layers import overlay

# SYS_ADMIN is what trusted.* attributes need.
_KEEP: Final = caps.mask(
    ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP", "CAP_SYS_ADMIN")
)
_MEMORY_LIMIT_BYTES: Final = 512 << 20
_CHUNK: Final = 64 << 20
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LimitReached(Exception):
    """There is more than may be copied."""


class Copier:
    """Copies directories of the image at `root`; counts what they take against `limit_bytes`, an entry as
    `entry_bytes`."""

    def __init__(self, root: int, limit_bytes: int, entry_bytes: int) -> None:
        self._root = root
        self._entry_bytes = entry_bytes
        self._limit_bytes = self._left = limit_bytes

    def copy(self, path: str, target: int) -> None:
        """Make the empty directory `target` what the image has at `path`, with all below. Raises OSError."""
        source = open_in_root(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
        links: dict[tuple[int, int], str] = {}
        # A directory comes twice: for what is in it, and when that is made, for what it is itself.
        pending: list[tuple[str, os.stat_result | None]] = [(".", None)]
        while pending:
            below, status = pending.pop()
            here = os.open(below, _DIRECTORY, dir_fd=source)
            there = os.open(below, _DIRECTORY, dir_fd=target)
            try:
                if status is not None:
                    self._dress(here, there, status)
                    continue
                pending.append((below, os.fstat(here)))
                with os.scandir(here) as entries:
                    for entry in entries:
                        if self._entry(here, there, target, entry.name, f"{below}/{entry.name}", links):
                            pending.append((f"{below}/{entry.name}", None))
            finally:
                os.close(here)
                os.close(there)
        os.close(source)

    def _entry(
        self, here: int, there: int, target: int, name: str, path: str, links: dict[tuple[int, int], str]
    ) -> bool:
        """Copy what is called `name`; a directory is only made, and True returned."""
        self._count(self._entry_bytes)
        status = os.stat(name, dir_fd=here, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=there)
            return True
        if status.st_nlink > 1:
            first = links.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                os.link(first, name, src_dir_fd=target, dst_dir_fd=there, follow_symlinks=False)
                return False
        if stat.S_ISREG(status.st_mode):
            self._file(here, there, name, status)
            return False
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=here), name, dir_fd=there)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=there)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=there, follow_symlinks=False)
        os.fchdir(here)
        found = self._xattrs(name)
        os.fchdir(there)
        _set_xattrs(name, found)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode))
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
        return False

    def _file(self, here: int, there: int, name: str, status: os.stat_result) -> None:
        """A regular file, holes left out. Across file systems, as here, the kernel shares no blocks (FICLONE,
        copy_file_range); it moves the pages itself."""
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
        made = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=there)
        try:
            at, size = 0, status.st_size
            while at < size:
                try:
                    at = os.lseek(source, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    break
                end = os.lseek(source, at, os.SEEK_HOLE)
                self._count(end - at)
                os.lseek(made, at, os.SEEK_SET)
                while at < end:
                    moved = os.sendfile(made, source, at, min(end - at, _CHUNK))
                    if not moved:
                        raise OSError(errno.EIO, "a file of the image is shorter than it says", name)
                    at += moved
            os.ftruncate(made, size)
            self._dress(source, made, status)
        finally:
            os.close(source)
            os.close(made)

    def _dress(self, source: int, made: int, status: os.stat_result) -> None:
        """Owner, attributes, mode and times, in the order in which the one leaves the other alone."""
        os.fchown(made, status.st_uid, status.st_gid)
        _set_xattrs(made, self._xattrs(source))
        os.fchmod(made, stat.S_IMODE(status.st_mode))
        os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _xattrs(self, source: int | str) -> list[tuple[str, bytes]]:
        follow = isinstance(source, int)  # a descriptor is no link
        kept = (key for key in os.listxattr(source, follow_symlinks=follow) if not _refused(key))
        found = [(key, os.getxattr(source, key, follow_symlinks=follow)) for key in kept]
        self._count(sum(len(value) for _, value in found))
        return found

    def _count(self, size_bytes: int) -> None:
        self._left -= size_bytes
        if self._left < 0:
            raise LimitReached(f"more than {self._limit_bytes} bytes, the limit for this image")


def _refused(key: str) -> bool:
    return os.fsencode(key).startswith(REFUSED_XATTRS)


def _set_xattrs(made: int | str, attributes: list[tuple[str, bytes]]) -> None:
    for key, value in attributes:
        try:
            os.setxattr(made, key, value, follow_symlinks=isinstance(made, int))
        except OSError as error:
            # Not every file system has every kind.
            if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                raise


def _root(lowers: list[str], user: str, at: str) -> int:
    """The image's layers as one mount, in a mount namespace of this process's own."""
    mapping = os.open(user, os.O_RDONLY | os.O_CLOEXEC) if user else -1
    tree = overlay(lowers, mapping, None, at)
    if mapping >= 0:
        os.close(mapping)
    return tree


def _confine(root: int) -> None:
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES)):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    last = caps.last_cap()
    os.umask(0)
    os.fchdir(root)
    os.chroot(".")  # noqa: TID251 (this is the program that is to be confined, not cribd)
    # What was not imported yet never is: the image has files at the interpreter's paths.
    sys.path.clear()
    sys.meta_path.clear()
    caps.drop_bounding(_KEEP, last)
    caps.capset(_KEEP, _KEEP, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _work(job: dict[str, Any]) -> dict[str, object]:
    path = ""
    try:
        made = os.open(job["directory"], _DIRECTORY)
        root = _root(job["lowers"], job["user"], job["at"])
        _confine(root)
        copier = Copier(root, job["limit_bytes"], job["entry_bytes"])
        for path, name in job["volumes"]:
            target = os.open(name, _DIRECTORY, dir_fd=made)
            copier.copy(path, target)
            os.close(target)
        return {}
    except LimitReached as error:
        return _failure("limit", path, str(error))
    except MemoryError:
        return _failure("limit", path, f"takes more than {_MEMORY_LIMIT_BYTES} bytes of memory")
    except OSError as error:
        return _failure("system", path, text_of(error), error.errno or 0)
    except Exception as error:  # a defect; a traceback would read source files by name, inside the image
        return _failure("defect", path, f"{type(error).__name__}: {error}")


def _failure(kind: str, path: str, message: str, errno: int = 0) -> dict[str, object]:
    return {"failed": kind, "message": f"{path[:200]!r}: {message}", "errno": errno}


def serve(parent: int) -> None:
    """Do the one job, report and end."""
    die_with(parent)
    report = json.dumps(_work(json.load(sys.stdin))).encode() + b"\n"
    os.write(1, report)
    os._exit(0)

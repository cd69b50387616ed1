"""Files reached safely: openat2 keeps a path inside its root whatever symlinks a hostile image holds."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from runtime.linux.lib import SyscallError, check, function, syscall

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Final

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_IN_ROOT: Final = 0x10
_IN_ROOT: Final = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
SYNC_FILE_RANGE_WRITE: Final = 2
_MISSING: Final = 40  # directories and dangling links, for one path
_sync_file_range: Final = function("sync_file_range", 4)
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_TOPDIR: Final = 0x00020000  # ext4 alone knows it


def open_in_root(root: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` as a process whose / is the directory `root` would see it (openat2(2), RESOLVE_IN_ROOT).

    Raises SyscallError.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, _IN_ROOT)
    encoded = os.fsencode(path) or b"."
    while True:
        try:
            return syscall("openat2", root, encoded, how, len(how), path=path)
        except SyscallError as error:
            if error.errno != errno.EAGAIN:  # a rename raced with "..": the man page says to try again
                raise


def open_directory(root: int, path: str) -> int:
    """An O_PATH descriptor of the directory `path` below `root`. Raises SyscallError."""
    return open_in_root(root, path, os.O_PATH | os.O_DIRECTORY)


def make_directories(root: int, path: str, mode: int = 0o755, made: Callable[[str], None] = lambda path: None) -> int:
    """Open the directory `path` below `root`, making what is missing of it; returns an O_PATH descriptor.

    Symlinks are followed inside the root; the target of a dangling one is made. `made` is told of each new directory.
    Raises SyscallError.
    """
    return _make_directories(root, path, mode, iter(range(_MISSING)), made)


def _make_directories(root: int, path: str, mode: int, turns: Iterator[int], made: Callable[[str], None]) -> int:
    try:
        return open_directory(root, path)
    except SyscallError as error:
        if error.errno != errno.ENOENT:
            raise
    if next(turns, None) is None:
        raise SyscallError("openat2", errno.ELOOP, path)
    parent, _, name = path.rstrip("/").rpartition("/")
    directory = _make_directories(root, parent or "/", mode, turns, made)
    try:
        if name not in ("", ".", ".."):
            try:
                os.mkdir(name, mode, dir_fd=directory)
                made(path)
                return _as_made(directory, name, mode)
            except FileExistsError:  # now, or it is a dangling link
                target = _link(directory, name)
            if target:
                where = target if target.startswith("/") else f"{parent}/{target}"
                os.close(_make_directories(root, where, mode, turns, made))
    finally:
        os.close(directory)
    return open_directory(root, path)  # by the kernel's judgement: a link of /proc's is not what it reads as


def make_source(path: str) -> None:
    """Make a directory of the host's, and what is missing above it: 0755, whatever the umask. Raises OSError."""
    umask = os.umask(0o022)
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    finally:
        os.umask(umask)


def make_file(root: int, path: str, mode: int = 0o644) -> int:
    """Open the file `path` below `root` for use as a mount target, making it empty (and its parents) if missing.

    Returns an O_PATH descriptor of whatever is there, which may be no regular file. Raises SyscallError.
    """
    try:
        return open_in_root(root, path, os.O_PATH)
    except SyscallError as error:
        if error.errno != errno.ENOENT:
            raise
    os.close(make_directories(root, os.path.dirname(path)))
    # O_CREAT without O_EXCL: a dangling link's target is made, inside the root.
    os.close(open_in_root(root, path, os.O_CREAT | os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK, mode))
    return open_in_root(root, path, os.O_PATH)


def _as_made(directory: int, name: str, mode: int) -> int:
    """An O_PATH descriptor of the new directory `name`, whose mode is this one whatever umask and parent say."""
    flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    made = os.open(name, os.O_PATH | flags, dir_fd=directory)
    if stat.S_IMODE(os.fstat(made).st_mode) != mode:
        readable = os.open(name, os.O_RDONLY | flags, dir_fd=directory)
        os.fchmod(readable, mode)
        os.close(readable)
    return made


def _link(directory: int, name: str) -> str:
    """Where the symlink `name` leads to; "" for what is none."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        return ""


def spread(directory: str) -> None:
    """Say that directories in this one have nothing to do with each other, for ext4 to lay them apart (chattr(1), T).

    Nothing happens on other file systems. Raises OSError where there is no such directory.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        (flags,) = struct.unpack("I", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(4)))
        if not flags & _TOPDIR:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("I", flags | _TOPDIR))
    except OSError:
        pass
    finally:
        os.close(fd)


def start_writeback(file: int) -> None:
    """Let the disk begin with what was written to the file, without waiting for it. Raises SyscallError."""
    check("sync_file_range", _sync_file_range(file, 0, 0, SYNC_FILE_RANGE_WRITE))

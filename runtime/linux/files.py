"""Files reached safely: openat2 keeps a path inside its root whatever symlinks a hostile image holds."""

from __future__ import annotations

import errno
import os
import stat
import struct

from runtime.linux.lib import SyscallError, check, function, syscall

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_IN_ROOT: Final = 0x10
_IN_ROOT: Final = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
SYNC_FILE_RANGE_WRITE: Final = 2
_sync_file_range: Final = function("sync_file_range", 4)


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


def make_directories(root: int, path: str, mode: int = 0o755) -> int:
    """Open the directory `path` below `root`, making what is missing of it; returns an O_PATH descriptor.

    Symlinks are followed inside the root; the target of a dangling one is made. Raises SyscallError.
    """
    for _ in range(40):  # each turn makes one directory or follows one dangling link
        try:
            return open_directory(root, path)
        except SyscallError as error:
            if error.errno != errno.ENOENT:
                raise
        _make_first_missing(root, path, mode)
    raise SyscallError("openat2", errno.ELOOP, path)


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


def _make_first_missing(root: int, path: str, mode: int) -> None:
    done = ""
    for name in path.split("/"):
        if not name or name == ".":
            continue
        parent, done = done, f"{done}/{name}"
        try:
            os.close(open_in_root(root, done, os.O_PATH))
            continue
        except SyscallError as error:
            if error.errno != errno.ENOENT:
                raise
        directory = open_directory(root, parent or "/")
        try:
            if _is_link(directory, name):
                target = os.readlink(name, dir_fd=directory)
                where = target if target.startswith("/") else f"{parent}/{target}"
                _make_first_missing(root, where, mode)
            else:
                os.mkdir(name, mode, dir_fd=directory)
                # mkdir honours the umask; what a mount point looks like shall not depend on it.
                child = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
                os.fchmod(child, mode)
                os.close(child)
        except FileExistsError:
            pass
        finally:
            os.close(directory)
        return


def _is_link(directory: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=directory).st_mode)
    except FileNotFoundError:
        return False


def start_writeback(file: int) -> None:
    """Let the disk begin with what was written to the file, without waiting for it. Raises SyscallError."""
    check("sync_file_range", _sync_file_range(file, 0, 0, SYNC_FILE_RANGE_WRITE))

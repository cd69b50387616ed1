"""Mounts: mount(2) and the descriptor based calls (open_tree, move_mount, mount_setattr, fsopen)."""

from __future__ import annotations

import os
import struct
from enum import IntFlag

from runtime.linux.lib import check, function, syscall

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000
OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_SET_FD: Final = 5
FSCONFIG_CMD_CREATE: Final = 6
MNT_DETACH: Final = 2


class MS(IntFlag):
    """Flags of mount(2)."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    SYNCHRONOUS = 16
    REMOUNT = 32
    DIRSYNC = 128
    NOSYMFOLLOW = 256
    NOATIME = 1024
    NODIRATIME = 2048
    BIND = 4096
    MOVE = 8192
    REC = 16384
    SILENT = 32768
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20
    RELATIME = 1 << 21
    STRICTATIME = 1 << 24
    LAZYTIME = 1 << 25


class MountAttr(IntFlag):
    """Attributes of mount_setattr(2) and fsmount(2)."""

    RDONLY = 0x01
    NOSUID = 0x02
    NODEV = 0x04
    NOEXEC = 0x08
    NOATIME = 0x10
    STRICTATIME = 0x20
    ATIME_MASK = 0x70
    NODIRATIME = 0x80
    IDMAP = 0x00100000
    NOSYMFOLLOW = 0x00200000


_mount = function("mount", 5)
_umount2 = function("umount2", 2)


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2). Raises SyscallError with the target."""
    encoded = os.fsencode(data) if data else None
    check("mount", _mount(os.fsencode(source), os.fsencode(target), os.fsencode(fstype), int(flags), encoded), target)


def umount(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2), lazily by default. Raises SyscallError."""
    check("umount2", _umount2(os.fsencode(target), flags), target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2). Raises SyscallError."""
    syscall("pivot_root", os.fsencode(new_root), os.fsencode(put_old), path=new_root)


def is_mount_point(path: str) -> bool:
    """Whether something is mounted at the directory `path`, a bind of the same file system too. Raises OSError."""
    return _mount_id(path) != _mount_id(f"{path}/..")


def _mount_id(path: str) -> int:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))
    finally:
        os.close(fd)


def open_tree(path: str, *, recursive: bool = False, dirfd: int = AT_FDCWD) -> int:
    """A detached copy of the mount at `path` (or of the descriptor `dirfd` when `path` is empty).

    The copy stays in the original's peer group. Raises SyscallError.
    """
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_RECURSIVE if recursive else 0) | (0 if path else AT_EMPTY_PATH)
    return syscall("open_tree", dirfd, os.fsencode(path), flags, path=path)


def move_mount(tree: int, target: int, path: str) -> None:
    """Attach the detached mount `tree` at the O_PATH descriptor `target`; `path` explains a failure."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    syscall("move_mount", tree, b"", target, b"", flags, path=path)


def mount_setattr(
    fd: int,
    path: str,
    *,
    set_: int = 0,
    clear: int = 0,
    propagation: int = 0,
    recursive: bool = False,
    userns: int = 0,
) -> None:
    """mount_setattr(2) on `path` relative to `fd`, or on `fd` itself when `path` is empty. Raises SyscallError."""
    flags = (AT_RECURSIVE if recursive else 0) | (0 if path else AT_EMPTY_PATH)
    attr = struct.pack("QQQQ", set_, clear, propagation, userns)
    syscall("mount_setattr", fd, os.fsencode(path), flags, attr, len(attr), path=path)


def idmap(tree: int, userns: int, *, recursive: bool = False) -> None:
    """Make the detached mount `tree` show its owners through the mapping of a user namespace. Raises SyscallError."""
    mount_setattr(tree, "", set_=MountAttr.IDMAP, userns=userns, recursive=recursive)


def detached(fstype: str, options: tuple[tuple[str, str | int], ...], attributes: int = 0) -> int:
    """A new file system as a detached mount (fsopen, fsconfig, fsmount). Raises SyscallError.

    An option's value is a string of at most 255 bytes, a descriptor, or "" for a flag.
    """
    context = syscall("fsopen", os.fsencode(fstype), 1, path=fstype)
    try:
        for key, value in options:
            if isinstance(value, int):
                syscall("fsconfig", context, FSCONFIG_SET_FD, os.fsencode(key), None, value, path=key)
                continue
            kind = FSCONFIG_SET_STRING if value else FSCONFIG_SET_FLAG
            argument = os.fsencode(value) if value else None
            syscall("fsconfig", context, kind, os.fsencode(key), argument, 0, path=key)
        syscall("fsconfig", context, FSCONFIG_CMD_CREATE, None, None, 0, path=fstype)
        return syscall("fsmount", context, 1, attributes, path=fstype)
    finally:
        os.close(context)

"""Pins: names under /run/netns that keep a pod's network namespace and show it to `ip netns` and CNI plugins.

A pin is an empty file with the namespace bind-mounted over it, as in ip-netns(8). It holds the namespace until it is
removed, whether or not a process is inside.
"""

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from net.errors import InvalidSpec, Unavailable

DIRECTORY: Final = Path("/run/netns")

_CLONE_NEWNET: Final = 0x40000000
_NS_GET_NSTYPE: Final = 0xB703  # ioctl_ns(2)
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_SHARED: Final = 1 << 20
_MNT_DETACH: Final = 2

Mount = Callable[[str, str, str, int], None]  # mount(2): source, target, file system type, flags; raises OSError
Umount = Callable[[str, int], None]  # umount2(2): target, flags; raises OSError


class Pins:
    """The pins in one directory. Safe to use from several threads.

    Python has no mount(2) and this room no ctypes, so the two calls come from whoever puts the rooms together.
    """

    def __init__(self, mount: Mount, umount: Umount, directory: Path = DIRECTORY) -> None:
        self._mount = mount
        self._umount = umount
        self._directory = directory
        self._lock = threading.Lock()
        self._shared = False

    def pin(self, fd: int, name: str) -> str:
        """Keep the namespace `fd` under `name`; returns the path. Pinning the same namespace again changes nothing.

        Raises InvalidSpec when `fd` is no network namespace, Unavailable when the name holds another one or the
        mount fails.
        """
        if not name or "/" in name or name in (".", ".."):
            raise InvalidSpec(f"namespace pin {name!r}: not a file name")
        path = str(self._directory / name)
        try:
            namespace = os.fstat(fd)
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
        except OSError as error:
            raise InvalidSpec(f"namespace pin {path}: descriptor {fd} is no namespace: {error}") from error
        if kind != _CLONE_NEWNET:
            raise InvalidSpec(f"namespace pin {path}: descriptor {fd} is no network namespace")
        self._prepare()
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        except FileExistsError:
            found = os.stat(path)
            if (found.st_dev, found.st_ino) == (namespace.st_dev, namespace.st_ino):
                return path
            if not _is_plain(found, self._directory):
                raise Unavailable(f"namespace pin {path}: holds another namespace") from None
        try:
            self._mount(f"/proc/self/fd/{fd}", path, "", _MS_BIND)
        except OSError as error:
            os.unlink(path)
            raise Unavailable(f"namespace pin {path}: {error}") from error
        return path

    def unpin(self, path: str) -> None:
        """Let go of the namespace and remove the name; succeeds for what is gone. Raises Unavailable."""
        try:
            self._umount(path, _MNT_DETACH)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # not a mount point, or nothing there
                raise Unavailable(f"namespace pin {path}: {error}") from error
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Unavailable(f"namespace pin {path}: {error}") from error

    def list_pins(self, prefix: str) -> list[str]:
        """Paths of the pins whose names begin with `prefix`, also of those that hold nothing."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return [str(self._directory / name) for name in sorted(names) if name.startswith(prefix)]

    def _prepare(self) -> None:
        """Make the directory a shared mount, as ip-netns(8) does.

        Otherwise the first `ip netns add` after us would cover our pins with copies that no unpin reaches.
        """
        with self._lock:
            if self._shared:
                return
            directory = str(self._directory)
            try:
                os.makedirs(directory, 0o755, exist_ok=True)
                try:
                    self._mount("", directory, "", _MS_SHARED | _MS_REC)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # EINVAL: not a mount point yet
                        raise
                    self._mount(directory, directory, "", _MS_BIND | _MS_REC)
                    self._mount("", directory, "", _MS_SHARED | _MS_REC)
            except OSError as error:
                raise Unavailable(f"namespace directory {directory}: {error}") from error
            self._shared = True


def _is_plain(found: os.stat_result, directory: Path) -> bool:
    """Whether it is a bare file, left by a pin that was interrupted before its mount."""
    return stat.S_ISREG(found.st_mode) and found.st_size == 0 and found.st_dev == os.stat(directory).st_dev

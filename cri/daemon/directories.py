"""cribd's directories, the lock that keeps a second cribd out of them, and the path of its socket."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

from cri.config import Config
from runtime.errors import Unavailable


def prepare(config: Config) -> tuple[int, ...]:
    """Make the directories, for root alone, and lock them; the locks last as long as the returned descriptors.

    Raises Unavailable when another cribd has them.
    """
    for path in (Path(config.root), Path(config.state), config.socket.parent):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (Path(config.root), Path(config.state)):
        path.chmod(0o700)
    return tuple(_lock(Path(directory, "cribd.lock")) for directory in dict.fromkeys((config.root, config.state)))


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        other = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise Unavailable(f"another cribd (pid {other or 'unknown'}) uses {path.parent}: {error.strerror}") from None
    with contextlib.suppress(OSError):  # a full disk takes it only in place of another one
        os.pwrite(fd, f"{os.getpid():<20}\n".encode(), 0)
    return fd


def clear_socket(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises Unavailable for one that answers, or for another kind of file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Unavailable(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"{path}: {error}") from error
        else:
            raise Unavailable(f"another process serves {path}")

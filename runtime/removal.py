"""Removing directories that containers or layers have filled."""

import itertools
import os
import subprocess
from pathlib import Path
from typing import Final

_FEW: Final = 64
"""Entries that are removed here. A container's writable layer has about ten: the mount points of its volumes."""


def remove_tree(path: Path) -> None:
    """Remove a directory, however deep, with all on its file system; missing is fine. Raises OSError.

    More than a few entries are left to rm(1), which walks by descriptors and without recursion; starting it costs more
    than most removals.
    """
    try:
        if _removed(str(path), None, itertools.count()):
            return
    except FileNotFoundError:
        if not os.path.lexists(path):
            return
    except OSError:
        pass  # rm tries, and says what it is
    done = subprocess.run(
        ["rm", "-rf", "--one-file-system", "--", str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    if done.returncode != 0:
        raise OSError(f"remove {path}: {done.stderr[-300:].decode(errors='replace').strip()}")


def _removed(name: str, parent: int | None, seen: "itertools.count[int]", device: int = 0) -> bool:
    """Remove the directory `name` in the open directory `parent`; False once `seen` has come to more than a few
    entries, or for another file system's. Follows no symlink.
    """
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        own = os.fstat(fd).st_dev
        if device not in (0, own):
            return False
        with os.scandir(fd) as entries:
            for entry in entries:
                if next(seen) >= _FEW:
                    return False
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=fd)
                elif not _removed(entry.name, fd, seen, own):
                    return False
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
    return True

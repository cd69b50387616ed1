"""What a container gets for the VOLUMEs of its image: directories of the disk, beside its upper directory.

Not directories of its overlay, on which no other overlay can have its upper directory (containers in a container). One
that is empty in the image, as most are, is made here; where the image has something in it, a program copies that
(`runtime.images.copyup`), which sees nothing but the image.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runtime.errors import Cancelled, DeadlineExceeded, Exhausted, InvalidSpec, Unavailable, of_disk
from runtime.images.image import RootFs
from runtime.images.merged import Found, Merged
from runtime.images.unpack.form import OPAQUE, REFUSED_XATTRS, is_whiteout
from runtime.linux.userns import mapped

if TYPE_CHECKING:
    from runtime.linux.userns import Maps

_START: Final = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]);"
    "from runtime.images.copyup import serve; serve(int(sys.argv[2]))"
)
ENTRY_BYTES: Final = 4096
"""What a file or directory counts for, in what may be copied, besides its content."""
_POLL_S: Final = 0.05
_KILL_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose the directories are to be: the path of a user namespace and its mapping, or the host's as they are."""

    user: str = ""
    uids: Maps = ()
    gids: Maps = ()


@dataclass(frozen=True, slots=True)
class Copying:
    """What is still to be done; `lock`, the store's, is held by who does it."""

    job: str
    lock: int

    async def run(self, timeout_s: float, stopped: Callable[[], bool]) -> None:
        """Copy; what was copied when it fails is the caller's to remove, and nothing writes to it any more.

        `stopped` says that nobody wants it any longer. Raises Exhausted, Unavailable, Cancelled, DeadlineExceeded.
        """
        paths = json.dumps([path for path in sys.path if path])
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _START, paths, str(os.getpid())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                pass_fds=(self.lock,),
                cwd="/",
                env={"LC_ALL": "C.UTF-8"},
                process_group=0,
            )
        except OSError as error:
            raise Unavailable(f"the program that copies the image's VOLUMEs can't be started: {error}") from error
        work = asyncio.create_task(process.communicate(self.job.encode()))
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            while not (await asyncio.wait((work,), timeout=_POLL_S))[0]:
                if stopped():
                    raise Cancelled("the copy of the image's VOLUMEs was cancelled: the pod is being stopped")
                if asyncio.get_running_loop().time() > deadline_s:
                    raise DeadlineExceeded(f"the copy of the image's VOLUMEs took more than {timeout_s:g} s")
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await asyncio.wait((work,), timeout=_KILL_S)  # on a dead disk it stays, and the directory with it
        _check((await work)[0])


def _check(report: bytes) -> None:
    if not report.endswith(b"\n"):
        raise Unavailable("the copy of the image's VOLUMEs: the process was killed")
    found = json.loads(report)
    if "failed" in found:
        full = found["failed"] == "limit" or found["errno"] in (ENOSPC, EDQUOT)
        raise (Exhausted if full else Unavailable)(f"the copy of the image's VOLUMEs: {found['message']}")


def make(
    rootfs: RootFs, directory: str, paths: Iterable[str], owner: Owner, limit_bytes: int, lock: int
) -> Copying | None:
    """Make an empty directory for each VOLUME, named by its number in `paths` below the new `directory`.

    Where the image has something there, that is still to be copied, at most `limit_bytes`. Raises InvalidSpec for what
    can't be a VOLUME, Exhausted, Unavailable; the caller removes what was made then.
    """
    view = Merged(tuple(Path(rootfs.base, name) for name in rootfs.lowers))
    full: list[tuple[str, str]] = []
    try:
        os.mkdir(directory, 0o700)
        for number, path in enumerate(paths):
            found = view.lookup(path)
            if found is not None and (not stat.S_ISDIR(found.status.st_mode) or not view.resolve(path)):
                raise InvalidSpec(f"image: VOLUME {path[:200]!r} is not a directory below the root")
            made = f"{directory}/{number}"
            os.mkdir(made, 0o755)
            if found is not None and _holds(found):
                full.append((path, str(number)))
            else:
                _dress(made, found, owner)
    except OSError as error:
        raise of_disk("the image's VOLUMEs", error) from error
    if not full:
        return None
    job = {
        # A single layer makes no overlay: the upper directory is still empty.
        "lowers": [rootfs.upper, *(f"{rootfs.base}/{name}" for name in rootfs.lowers)],
        "user": owner.user,
        "at": rootfs.work,
        "directory": directory,
        "volumes": full,
        "limit_bytes": limit_bytes,
        "entry_bytes": ENTRY_BYTES,
    }
    return Copying(json.dumps(job), lock)


def _holds(found: Found) -> bool:
    """Whether there is more to copy than an owner, a mode and times."""
    for directory in found.directories:
        with os.scandir(directory) as entries:
            if any(not is_whiteout(entry.stat(follow_symlinks=False)) for entry in entries):
                return True
    kept = os.listxattr(found.path)
    return any(key != OPAQUE and not key.encode().startswith(REFUSED_XATTRS) for key in kept)


def _dress(made: str, found: Found | None, owner: Owner) -> None:
    """What the image has, or where it has nothing, root's, as the overlay would show it."""
    status = found.status if found else None
    uid, gid = (status.st_uid, status.st_gid) if status else (0, 0)
    os.chown(made, mapped(uid, owner.uids), mapped(gid, owner.gids))
    os.chmod(made, stat.S_IMODE(status.st_mode) if status else 0o755)
    if status:
        os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))

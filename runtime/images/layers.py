"""Layers on disk: the child process that unpacks one, and the removal of trees.

`cribd` itself never writes a name that a layer chose, except to settle a finished layer (`runtime.images.settle`).
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

from runtime.errors import Cancelled, Exhausted, Unavailable
from runtime.images.errors import BadImage
from runtime.images.image import ImagesConfig

_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from runtime.images.unpack.child import main; main()"
_COMPLETE = 1 << 63
# How many bytes arrive before the child hears of them.
_STRIDE = 1 << 20
# Renders an overlay's own files unreadable to anybody: the work directory's.
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"


def short_name(number: int) -> str:
    """A layer's directory name: 4 characters suffice for 1.6 million, so that 500 fit one mount option string."""
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _BASE36[digit] + digits
        if not number:
            return digits


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What a child reports. `implied` and `lower_links` are what only the layers below can settle."""

    diff_id: str
    bytes_used: int
    inodes: int
    implied: tuple[str, ...]
    lower_links: tuple[tuple[str, str], ...]


class Unpack:
    """One child at work on one layer. Used by one thread; `kill` may come from any.

    `target` is an empty directory, `blob` a descriptor of the file whose bytes from `offset` on are the layer.
    """

    def __init__(self, target: Path, blob: int, offset: int, config: ImagesConfig) -> None:
        control, self._control = os.pipe()
        try:
            job = {
                "root": str(target),
                "blob": blob,
                "offset": offset,
                "control": control,
                "parent": os.getpid(),
                "unpacked_limit_bytes": config.unpacked_limit_bytes,
                "ratio_limit": config.ratio_limit,
                "ratio_from_bytes": config.ratio_from_bytes,
                "entries_limit": config.entries_limit,
            }
            # Isolated and without site: nothing in the environment or the working directory decides what is imported.
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, json.dumps([p for p in sys.path if p]), json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(blob, control),
                cwd="/",
                env={"LC_ALL": "C.UTF-8"},
                process_group=0,
            )
        except BaseException:
            os.close(self._control)
            raise
        finally:
            os.close(control)
        os.set_blocking(self._control, False)
        self._told = 0
        self._killed = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._child.pid

    def arrived(self, position: int) -> None:
        """So many bytes of the layer are in the file. Cheap; the child hears of every mebibyte or so."""
        if position - self._told >= _STRIDE:
            try:
                os.write(self._control, struct.pack("<Q", position))
                self._told = position
            except (BlockingIOError, BrokenPipeError):
                pass  # it has plenty to do; or it has failed, which `finish` tells

    def failed(self) -> bool:
        """True when the child has ended before its input did: downloading more is of no use."""
        return self._child.poll() is not None

    def finish(self, size: int) -> Unpacked:
        """All `size` bytes are there and verified: wait for the child's report.

        Raises BadImage, Exhausted, Unavailable, Cancelled.
        """
        os.set_blocking(self._control, True)
        with contextlib.suppress(BrokenPipeError):
            os.write(self._control, struct.pack("<Q", size | _COMPLETE))
        return self.report()

    def report(self) -> Unpacked:
        """What a child that has ended, or is about to, has to say."""
        with self._child:
            assert self._child.stdout is not None
            line = self._child.stdout.read()
        self._close()
        if self._killed:
            raise Cancelled("unpacking was cancelled")
        if not line:
            raise Unavailable(f"the unpacking process ended with status {self._child.returncode}")
        report = json.loads(line)
        if "failed" in report:
            message = f"unpack: {report['message']}"
            if report["failed"] == "limit" or report["errno"] in (ENOSPC, EDQUOT):
                raise Exhausted(message)
            if report["failed"] == "bad" or report["errno"]:
                raise BadImage(message)
            raise Unavailable(message)
        return Unpacked(
            diff_id=report["diff_id"],
            bytes_used=report["bytes_used"],
            inodes=report["inodes"],
            implied=tuple(report["implied"]),
            lower_links=tuple((name, target) for name, target in report["lower_links"]),
        )

    def kill(self) -> None:
        """End the child now; whoever waits for it gets Cancelled."""
        with self._lock:
            self._killed = True
            if self._child.returncode is None:
                self._child.send_signal(signal.SIGKILL)

    def abandon(self) -> None:
        """Kill the child and wait for its end; nothing writes to the target afterwards."""
        self.kill()
        with self._child:
            pass
        self._close()

    def _close(self) -> None:
        if self._control >= 0:
            os.close(self._control)
            self._control = -1


def remove_tree(path: Path) -> None:
    """Remove a directory that containers or layers have filled, however deep; missing is fine. Raises OSError.

    rm(1) walks by descriptors and without recursion; it is not asked for the usual, nearly empty, directory.
    """
    try:
        os.rmdir(path)
        return
    except FileNotFoundError:
        return
    except OSError:
        pass
    done = subprocess.run(
        ["rm", "-rf", "--one-file-system", "--", str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    if done.returncode != 0:
        raise OSError(f"remove {path}: {done.stderr[-300:].decode(errors='replace').strip()}")


def sync(directory: Path, timeout_s: float) -> None:
    """Make everything on `directory`'s file system durable (syncfs(2)), by a child so that a dead disk can be left.

    Raises Unavailable.
    """
    try:
        subprocess.run(
            ["sync", "-f", str(directory)], stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=timeout_s
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise Unavailable(f"sync of {directory}: {error}") from error

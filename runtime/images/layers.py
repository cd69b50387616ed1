"""Layers on disk: the child processes that unpack them, and the removal of trees.

`cribd` itself never writes a name that a layer chose, except to settle a finished layer (`runtime.images.settle`).
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from errno import EDQUOT, EIO, ENOMEM, ENOSPC, EROFS
from pathlib import Path
from typing import Any

from runtime.errors import Cancelled, Exhausted, Unavailable
from runtime.images.errors import BadImage
from runtime.images.image import ImagesConfig

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]);"
    "from runtime.images.unpack.child import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)
_COMPLETE = 1 << 63
# How many bytes arrive before the child hears of them.
_STRIDE = 1 << 20
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
    """What a child reports. `spoilt`: the recipe is of no use.

    `implied` and `lower_links` are what only the layers below can settle."""

    diff_id: str
    bytes_used: int
    inodes: int
    implied: tuple[str, ...]
    lower_links: tuple[tuple[str, str], ...]
    spoilt: bool


class Unpacker:
    """The program that unpacks, `runtime.images.unpack.child`: started once for an image, it forks for each layer.

    It ends with the thread that made it, which therefore stays until `close`. Thread-safe.
    """

    def __init__(self, config: ImagesConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = json.dumps([path for path in sys.path if path])
        try:
            # Isolated and without site: nothing in the environment or the working directory decides what is imported.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, paths, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env={"LC_ALL": "C.UTF-8"},
                process_group=0,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def begin(self, target: Path, blob: int, offset: int, recipe: int) -> "Unpack":
        """Start on the layer whose bytes come in the file `blob` from `offset` on; `target` is an empty directory,
        `recipe` an empty file (see `runtime.images.unpack.recipe`).

        Raises Unavailable.
        """
        job = {
            "root": str(target),
            "offset": offset,
            "unpacked_limit_bytes": self._config.unpacked_limit_bytes,
            "ratio_limit": self._config.ratio_limit,
            "ratio_from_bytes": self._config.ratio_from_bytes,
            "entries_limit": self._config.entries_limit,
        }
        control_theirs, control = os.pipe()
        report, report_theirs = os.pipe()
        try:
            with self._lock:
                message = json.dumps(job).encode()
                socket.send_fds(self._socket, [message], [blob, control_theirs, report_theirs, recipe])
                answer, [pidfd], _, _ = socket.recv_fds(self._socket, 64, 1)
            return Unpack(int(answer), pidfd, control, report)
        except (OSError, ValueError) as error:
            os.close(control)
            os.close(report)
            raise Unavailable("the unpacking program has ended") from error
        finally:
            os.close(control_theirs)
            os.close(report_theirs)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class Unpack:
    """A child at work on one layer. Used by one thread; `kill` may come from any."""

    def __init__(self, pid: int, pidfd: int, control: int, report: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._control = control
        self._report = report
        os.set_blocking(control, False)
        self._ended = select.poll()
        self._ended.register(pidfd, select.POLLIN)
        self._told = 0
        self._killed = False
        self._lock = threading.Lock()

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
        return bool(self._ended.poll(0))

    def finish(self, size: int) -> Unpacked:
        """All `size` bytes are there and verified, or the child has `failed`: its report.

        Raises BadImage, Exhausted, Unavailable, Cancelled.
        """
        os.set_blocking(self._control, True)
        with contextlib.suppress(BrokenPipeError):
            os.write(self._control, struct.pack("<Q", size | _COMPLETE))
        line = b""
        while chunk := os.read(self._report, 1 << 16):
            line += chunk
        if self._killed:
            raise Cancelled("unpacking was cancelled")
        if not line.endswith(b"\n"):
            raise Unavailable("unpack: the process was killed")
        return _read_report(json.loads(line))

    def kill(self) -> None:
        """End the child now; whoever waits for it gets Cancelled."""
        with self._lock:
            self._killed = True
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Kill the child unless it has ended; nothing writes to the target afterwards."""
        if not self.failed():
            self.kill()
            self._ended.poll()
        with self._lock:
            for fd in (self._pidfd, self._control, self._report):
                os.close(fd)
            self._pidfd = -1


def _read_report(report: dict[str, Any]) -> Unpacked:
    if "failed" in report:
        message = f"unpack: {report['message']}"
        if report["failed"] == "limit" or report["errno"] in (ENOSPC, EDQUOT):
            raise Exhausted(message)
        if report["failed"] == "defect" or report["errno"] in (EIO, EROFS, ENOMEM):
            raise Unavailable(message)
        raise BadImage(message)
    return Unpacked(
        diff_id=report["diff_id"],
        bytes_used=report["bytes_used"],
        inodes=report["inodes"],
        implied=tuple(report["implied"]),
        lower_links=tuple((name, target) for name, target in report["lower_links"]),
        spoilt=report["spoilt"],
    )


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

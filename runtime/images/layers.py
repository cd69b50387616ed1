"""Layers on disk: the child processes that unpack them.

`cribd` itself never writes a name that a layer chose, except to settle a finished layer (`runtime.images.settle`).
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from errno import EDQUOT, EIO, ENOMEM, ENOSPC, EROFS
from pathlib import Path
from typing import Any

from runtime.errors import Cancelled, Exhausted, Unavailable
from runtime.images.errors import BadImage
from runtime.images.image import ImagesConfig
from runtime.linux.mount import open_tree

# It holds the store's lock from the beginning: before all that takes long comes that it dies with cribd.
_START = (
    "import sys; sys.path[:] = sys.argv[4:];"
    "from runtime.linux.process import die_with; die_with(int(sys.argv[2]));"
    "import json; from runtime.images.unpack.child import Limits, serve;"
    "serve(int(sys.argv[1]), Limits(**json.loads(sys.argv[3])))"
)
# What cribd may be ahead of the child: the most that the kernel gives without being configured to.
_PIPE_BYTES = 1 << 20
_KEPT_BYTES = 32 << 20
_ANSWER_BYTES = 256
# The child keeps its report shorter; one that a layer has taken over might not.
_REPORT_LIMIT_BYTES = 64 << 20
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"


def short_name(number: int) -> str:
    """A layer's directory name: 4 characters suffice for 1.6 million, so that 500 fit one mount option string."""
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _BASE36[digit] + digits
        if not number:
            return digits


def number_of(name: str) -> int | None:
    """The layer whose directory has this name."""
    try:
        number = int(name, 36)
    except ValueError:
        return None
    return number if 0 < number < 1 << 31 and short_name(number) == name else None


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
    """Processes that unpack layers, forked by a program that is started with the first and ends when there has been
    none for a while.

    The program and its forks hold `store_lock`: nobody else takes the store while one of them can still write to it.
    Thread-safe.
    """

    def __init__(self, config: ImagesConfig, store_lock: int, idle_s: float = 30.0) -> None:
        self._store_lock = store_lock
        self._limits = json.dumps(
            {
                "idle_s": idle_s,
                "unpacked_limit_bytes": config.unpacked_limit_bytes,
                "ratio_limit": config.ratio_limit,
                "ratio_from_bytes": config.ratio_from_bytes,
                "entries_limit": config.entries_limit,
            }
        )
        self._lock = threading.Lock()
        self._program: _Program | None = None

    def fork(self) -> "Unpack":
        """A process without work. Raises Unavailable, Exhausted, OSError."""
        jobs, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                return Unpack(*self._fork(theirs.fileno()), jobs)
            except BaseException:
                jobs.close()
                raise

    def _fork(self, jobs: int) -> tuple[int, int]:
        with self._lock:
            if self._program is not None:
                with contextlib.suppress(OSError):
                    return self._program.fork(jobs)
                self._program.close()  # it had nothing to do for a while, or was killed
            self._program = _Program(self._store_lock, self._limits)
            try:
                return self._program.fork(jobs)
            except OSError as error:
                reason = self._program.failure or "has ended"
                raise Unavailable(f"the unpacking program: {reason}") from error

    def close(self) -> None:
        """No layer is being unpacked any more, or what is ends now."""
        with self._lock:
            if self._program is not None:
                self._program.close()
                self._program = None


class _Program:
    """`runtime.images.unpack.child`. It ends with the thread that starts it, which is its own.

    `failure` is why it could not be started.
    """

    def __init__(self, store_lock: int, limits: str) -> None:
        self.failure: OSError | None = None
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._run, args=(theirs, store_lock, limits), daemon=True)
        self._thread.start()

    def _run(self, theirs: socket.socket, store_lock: int, limits: str) -> None:
        paths = [path for path in sys.path if path]
        with theirs:
            # Isolated and without site: nothing in the environment or the working directory decides what is imported.
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _START, str(theirs.fileno()), str(os.getpid()), limits, *paths],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), store_lock),
                    cwd="/",
                    # Freed memory is kept: each piece of a layer would else be made of fresh pages.
                    env={
                        "LC_ALL": "C.UTF-8",
                        "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
                        "MALLOC_MMAP_THRESHOLD_": str(_KEPT_BYTES),
                    },
                    process_group=0,
                )
            except OSError as error:
                self.failure = error
                return
        process.wait()

    def fork(self, jobs: int) -> tuple[int, int]:
        """The pid and pidfd of a process that takes its work from a socket. Raises OSError when the program has ended,
        Exhausted when it goes on with the others, and there is no room for this one."""
        socket.send_fds(self._socket, [b"fork"], [jobs])
        answer, pidfds, _, _ = socket.recv_fds(self._socket, _ANSWER_BYTES, 1)
        if not answer:
            raise ConnectionResetError
        if not pidfds:
            reason = "no descriptor is left for its process" if answer.isdigit() else answer.decode()
            raise Exhausted(f"the unpacking program: {reason}")
        return int(answer), pidfds[0]

    def close(self) -> None:
        self._socket.close()
        self._thread.join()


class Unpack:
    """A process that unpacks one layer, and then another if it is `ready`. Used by one thread at a time; `kill` may
    come from any."""

    def __init__(self, pid: int, pidfd: int, jobs: socket.socket) -> None:
        self.pid = pid
        self.ready = True
        self._pidfd = pidfd
        self._jobs = jobs
        self._blob = -1
        self._report = -1
        self._ended = select.poll()
        self._ended.register(pidfd, select.POLLIN)
        self._killed = False
        self._lock = threading.Lock()

    def begin(self, target: Path, recipe: int) -> None:
        """Start on a layer, whose bytes are then given to `write`; `target` is an empty directory, `recipe` an empty
        file (see `runtime.images.unpack.recipe`).

        Raises OSError.
        """
        self.ready = False
        with contextlib.ExitStack() as theirs:
            tree = open_tree(str(target))
            theirs.callback(os.close, tree)
            blob, self._blob = os.pipe()
            theirs.callback(os.close, blob)
            self._report, report = os.pipe()
            theirs.callback(os.close, report)
            with contextlib.suppress(OSError):  # the usual size will do
                fcntl.fcntl(self._blob, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            with contextlib.suppress(ConnectionError):  # `finish` tells that it was killed
                socket.send_fds(self._jobs, [b"layer"], [tree, blob, report, recipe])

    def write(self, data: bytes) -> bool:
        """Give the child more of the layer, as soon as it can take it. False when it has ended early, which `finish`
        explains."""
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._blob, left) :]
        except BrokenPipeError:
            return False
        return True

    def finish(self) -> Unpacked:
        """That was the whole layer, as it should be, or the child has ended early: its report.

        Raises BadImage, Exhausted, Unavailable, Cancelled.
        """
        os.close(self._blob)
        self._blob = -1
        line = bytearray()
        while len(line) < _REPORT_LIMIT_BYTES and (chunk := os.read(self._report, 1 << 16)):
            line += chunk
        if self._killed:
            raise Cancelled("unpacking was cancelled")
        if not line.endswith(b"\n"):
            raise Unavailable("unpack: the process was killed")
        os.close(self._report)
        self._report = -1
        report = json.loads(line)
        unpacked = _read_report(report)
        self.ready = report["ready"]
        return unpacked

    def kill(self) -> None:
        """End the child now; whoever waits for it gets Cancelled."""
        with self._lock:
            self._killed = True
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Kill the child unless it has ended; nothing writes to the target afterwards."""
        if not self._ended.poll(0):
            self.kill()
            self._ended.poll()
        self._jobs.close()
        with self._lock:
            for fd in (self._pidfd, self._blob, self._report):
                if fd >= 0:
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


def usage_of(paths: Iterable[str]) -> tuple[int, int]:
    """Bytes and inodes of what is at these paths and of all below, which may change meanwhile. Walks it."""
    bytes_used = 0
    seen: set[int] = set()
    pending = list(paths)
    while pending:
        path = pending.pop()
        try:
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                pending += [f"{path}/{name}" for name in os.listdir(path)]
        except OSError:
            continue  # gone meanwhile
        if status.st_ino not in seen:
            seen.add(status.st_ino)
            bytes_used += status.st_blocks * 512
    return bytes_used, len(seen)


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

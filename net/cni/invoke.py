"""Running one plugin: the environment it expects, its configuration as standard input, a deadline for all it starts.

Plugins are root's programs from the configured directories: trusted to do anything, not to end, nor to be brief, nor
to print what they should.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from net.errors import DeadlineExceeded, Unavailable

OUTPUT_LIMIT_BYTES: Final = 1 << 20
_STDERR_LIMIT_BYTES: Final = 4096  # the last of it
_READ_BYTES: Final = 1 << 16
_PRIVATE: Final = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")  # systemd speaks to cribd with these
_MARK: Final = "CRIB_PLUGIN_RUN"
_REAP_S: Final = 5.0


class PluginFailed(Unavailable):
    """A plugin said no, or nothing that makes sense. `code` is the specification's, 0 without one."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Output:
    """How a plugin ended; `stderr` is the last of what it said there."""

    code: int
    stdout: bytes
    stderr: str


def find(name: str, directories: Sequence[str]) -> str:
    """The plugin's executable in the first directory that has it. Raises PluginFailed, naming the directories."""
    for directory in directories:
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise PluginFailed(f"plugin {name}: not found in {', '.join(directories) or 'any directory: none is configured'}")


def run(path: str, environment: Mapping[str, str], conf: bytes, deadline: float) -> Output:
    """Run the plugin until it ends, or until `deadline` (of time.monotonic), when it is killed with all it started.

    What it leaves running when it ends itself stays, and doesn't keep this waiting. Raises DeadlineExceeded,
    PluginFailed when it can't be started or prints too much.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in _PRIVATE}
    name = os.path.basename(path)
    mark = os.urandom(16).hex()
    with _file(conf) as stdin:
        try:
            process = subprocess.Popen(
                [path],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**inherited, **environment, _MARK: mark},
                cwd="/",
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise PluginFailed(f"plugin {path}: {error.strerror}") from error
    stdout, stderr = process.stdout, process.stderr
    assert stdout and stderr
    with stdout, stderr:
        try:
            return _follow(process, stdout, stderr, name, deadline)
        except BaseException:
            _kill(process, f"{_MARK}={mark}".encode())
            raise


def _follow(
    process: subprocess.Popen[bytes], stdout: IO[bytes], stderr: IO[bytes], name: str, deadline: float
) -> Output:
    said, told = bytearray(), bytearray()
    into = {stdout.fileno(): said, stderr.fileno(): told}
    ended = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        for fd in (*into, ended):
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        over = False
        while not over:
            left_s = deadline - time.monotonic()
            ready = [fd for fd, _ in poll.poll(left_s * 1000)] if left_s > 0 else []
            if not ready:
                raise DeadlineExceeded(f"plugin {name}: not done in time{_hint(told)}")
            over = ended in ready
            for fd, kept in into.items():
                if over or fd in ready:
                    _drain(fd, kept, poll)
                    if len(said) > OUTPUT_LIMIT_BYTES:
                        raise PluginFailed(f"plugin {name}: printed more than {OUTPUT_LIMIT_BYTES} bytes{_hint(told)}")
                    del told[:-_STDERR_LIMIT_BYTES]
    finally:
        os.close(ended)
    return Output(process.wait(), bytes(said), told.decode(errors="replace").strip())


def _drain(fd: int, kept: bytearray, poll: select.poll) -> None:
    """Take what the pipe holds now."""
    while len(kept) <= 2 * OUTPUT_LIMIT_BYTES:
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            with contextlib.suppress(KeyError):
                poll.unregister(fd)
            return
        kept += data


def _hint(told: bytearray) -> str:
    text = told.decode(errors="replace").strip()
    return f" (stderr: {text[-500:]})" if text else ""


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[int]:
    """A descriptor to read the data from: a pipe would want someone to fill it meanwhile."""
    fd = os.memfd_create("cni")
    try:
        with open(fd, "wb", buffering=0, closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class _Process:
    """A line of the process table; `started` tells it from a later one with the same number."""

    parent: int
    session: int
    started: int
    marked: bool


def _kill(process: subprocess.Popen[bytes], mark: bytes) -> None:
    """Kill the plugin and all it has started, in sessions of their own and orphaned ones as well.

    First everything is stopped, since what is stopped neither forks nor leaves its parent; then killed. What was
    orphaned before is known by the mark in its environment, so one that has cleared that, too, is a daemon and stays.
    """
    held: dict[tuple[int, int], int] = {}
    try:
        while found := _family(process.pid, mark) - held.keys():
            for pid, started in found:
                if (fd := _hold(pid, started)) is not None:
                    held[pid, started] = fd
                    _signal(fd, signal.SIGSTOP)
        for fd in held.values():
            _signal(fd, signal.SIGKILL)
    finally:
        for fd in held.values():
            os.close(fd)
    try:
        process.wait(_REAP_S)
    except subprocess.TimeoutExpired as error:  # in an uninterruptible call
        raise DeadlineExceeded(f"plugin {process.args!r}: does not end when killed") from error


def _hold(pid: int, started: int) -> int | None:
    """A descriptor of the process that the table showed; None when it has gone meanwhile."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    now = _look(pid, b"")
    if now and now.started == started:
        return fd
    os.close(fd)
    return None


def _signal(fd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, number)


def _family(leader: int, mark: bytes) -> set[tuple[int, int]]:
    """The leader, its descendants, those of its session and what bears the mark: by number and start."""
    table = {int(name): found for name in os.listdir("/proc") if name.isdigit() and (found := _look(int(name), mark))}
    chosen = {pid for pid, one in table.items() if pid == leader or one.session == leader or one.marked}
    while more := {pid for pid, one in table.items() if one.parent in chosen} - chosen:
        chosen |= more
    return {(pid, table[pid].started) for pid in chosen}


def _look(pid: int, mark: bytes) -> _Process | None:
    """None for one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/environ", "rb") as file:
            marked = bool(mark) and mark in file.read().split(b"\0")
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return _Process(parent=int(fields[1]), session=int(fields[3]), started=int(fields[19]), marked=marked)

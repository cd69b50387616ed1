"""A container, or an exec'd process, as its monitor sees it: descriptors, log, state, the record of its end."""

from __future__ import annotations

import fcntl
import marshal
import os
import signal
import socket
import struct
import time

from runtime.plan.identity import TIOCSWINSZ
from runtime.zygote.log import Stream
from runtime.zygote.packets import STDERR, STDOUT

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

    from runtime.zygote.adoption import Adoption
    from runtime.zygote.attach import Client
    from runtime.zygote.spool import Log

_READ_BYTES: Final = 65536
_DRAIN_BYTES: Final = 16 << 20


class Process:
    """One child of the monitor. `sync` is open until the child has become its program or failed.

    `staged`: `pid` is a process that will be replaced by one which it clones. `paused`: it waits for a word to go on.
    `quiet`: nobody wants to know when it has become its program, only how it ends, also where that is before.
    `adoption`: it is made by an OCI runtime's command, which `pid` is until there is the process itself.
    """

    __slots__ = (
        "adoption",
        "asker",
        "code",
        "exited_ns",
        "failure",
        "held",
        "hold_until",
        "join_files",
        "n",
        "paused",
        "pid",
        "pidfd",
        "quiet",
        "report",
        "staged",
        "started_ns",
        "sync",
        "terminal",
    )

    def __init__(self, asker: socket.socket, n: int, sync: socket.socket) -> None:
        self.staged = False
        self.adoption: Adoption | None = None
        self.held: list[Container] = []  # who is frozen until this has become its program, or ended
        self.hold_until = 0.0
        self.join_files: tuple[str, ...] = ()
        self.paused = False
        self.quiet = False
        self.asker = asker  # who waits for the start,
        self.n = n  # and the number of the request
        self.pid = 0
        self.pidfd = -1
        self.sync: socket.socket | None = sync
        self.report: dict[str, Any] = {}
        self.failure: dict[str, Any] | None = None
        self.started_ns = 0
        self.terminal = -1
        self.code = -1
        self.exited_ns = 0

    @property
    def ended(self) -> bool:
        return self.exited_ns > 0

    def read_sync(self) -> bool:
        """Take what the child reports; True when the start is decided, one way or the other."""
        assert self.sync is not None
        fds: list[int] = []
        try:
            if self.quiet:  # it has nothing to hand over
                data = self.sync.recv(_READ_BYTES)
            else:
                data, fds, _, _ = socket.recv_fds(self.sync, _READ_BYTES, 1)
        except ConnectionResetError:  # it died and hadn't read what it was told
            data = b""
        message = marshal.loads(data) if data else {}
        if fds and "pid" not in message:
            self.terminal = fds[0]
        if data:
            if "pid" in message:
                os.close(self.pidfd)
                self.pid, self.pidfd, self.staged = message["pid"], fds[0], False
                return False
            if "pause" in message:
                self.paused = True
                return False
            if "failed" in message:
                self.failure = message
            else:
                self.report = message
                return False
        elif (self.report or self.quiet) and self.failure is None:
            self.started_ns = 0 if self.adoption else time.time_ns()
        elif self.failure is None:
            self.failure = {"failed": -1, "errno": 0, "detail": "the process died before it could start"}
        self.sync.close()
        self.sync = None
        return True

    def kill(self) -> None:
        """SIGKILL, also for a runtime that is about to make it."""
        if self.adoption:
            self.adoption.kill()
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def end(self, info: Any) -> None:
        """Note the exit that waitid(2) told: the code, or 128 and the signal."""
        killed = info.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
        self.code = info.si_status + 128 if killed else info.si_status
        self.exited_ns = time.time_ns()

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size. Raises OSError without a terminal."""
        fcntl.ioctl(self.terminal, TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
        if self.sync:
            self.sync.close()
            self.sync = None


class Container(Process):
    """The first process of a container, its output and its cgroup."""

    __slots__ = (
        "cgroup", "clients", "holds", "id", "kill_dirs", "log", "memory_events", "oom_killed", "own_pid", "stderr",
        "stdin", "stdin_once", "stdin_open", "streams", "waits", "watches",
    )  # fmt: skip

    def __init__(self, asker: socket.socket, n: int, sync: socket.socket, fields: dict[str, Any]) -> None:
        super().__init__(asker, n, sync)
        self.id: str = fields["id"]
        self.own_pid: bool = fields["own_pid"]
        self.watches: bool = fields["watches"]
        self.waits = False  # for START: it was cloned ahead
        self.holds = 0
        self.cgroup: str = fields["cgroup"]
        self.kill_dirs: tuple[str, ...] = tuple(fields["kill_dirs"])
        self.memory_events: str = fields["memory_events"]
        self.oom_killed = False
        self.log: Log | None = None
        self.stdin = -1
        self.stdin_open: bool = fields["stdin"]  # whether it is to have one
        self.stdin_once: bool = fields["stdin_once"]  # it ends with the first client that had it
        self.stderr = -1
        self.clients: list[Client] = []
        self.streams: dict[int, Stream | None] = {}  # read ends of output pipes, and the terminal's master

    def let_go(self, asker: socket.socket, n: int) -> None:
        """Have one that waits start, for this request. If it has died meanwhile that is told when it is reaped."""
        self.waits, self.asker, self.n = False, asker, n
        if self.sync:
            try:
                self.sync.send(b"\0")
            except OSError:
                pass

    def add_stream(self, fd: int, name: bytes) -> None:
        """Log what comes out of `fd` as `name`; without a log it is read and dropped."""
        os.set_blocking(fd, False)
        if name == b"stderr":
            self.stderr = fd
        self.streams[fd] = Stream(self.log.write, name) if self.log else None

    def log_to(self, log: Log) -> None:
        """Have its output in this log from its first byte on."""
        self.log = log
        for fd in self.streams:
            self.streams[fd] = Stream(log.write, b"stderr" if fd == self.stderr else b"stdout")

    def read_stream(self, fd: int) -> bool:
        """Log one read of `fd`; False at its end."""
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:  # EIO: the last holder of a terminal's slave is gone
            data = b""
        stream = self.streams[fd]
        if data:
            self._take(fd, stream, data)
        elif stream:
            stream.finish()
        return bool(data)

    def _take(self, fd: int, stream: Stream | None, data: bytes) -> None:
        if stream:
            stream.feed(data)
        if self.clients:
            for client in self.clients:
                client.show(STDERR if fd == self.stderr else STDOUT, data)

    def drain(self) -> None:
        """Log what is in the pipes now: the process has ended, and its last words come before that news."""
        for fd, stream in self.streams.items():
            for _ in range(_DRAIN_BYTES // _READ_BYTES):
                try:
                    data = os.read(fd, _READ_BYTES)
                except BlockingIOError:  # somebody else holds the pipe, and may go on with an unfinished line
                    break
                except OSError:  # EIO: the last holder of a terminal's slave is gone
                    data = b""
                if not data:
                    if stream:
                        stream.finish()
                    break
                self._take(fd, stream, data)

    def record(self) -> bytes:
        """The end as JSON, for the record on disk."""
        values = (self.id, self.pid, self.started_ns, self.code, self.exited_ns, "true" if self.oom_killed else "false")
        text = '{"id": "%s", "pid": %d, "started_ns": %d, "code": %d, "exited_ns": %d, "oom_killed": %s}\n'
        return (text % values).encode("ascii")

    def fact(self) -> dict[str, Any]:
        """What a new cribd, or the record on disk, is told of it."""
        return {
            "id": self.id,
            "pid": self.pid,
            "cgroup": self.cgroup,
            "started_ns": self.started_ns,
            "code": self.code,
            "exited_ns": self.exited_ns,
            "oom_killed": self.oom_killed,
            "log_lost": (self.log.lost_lines, self.log.lost_bytes, self.log.lost_why) if self.log else (0, 0, ""),
            "log_full": self.log is not None and self.log.full,
        }

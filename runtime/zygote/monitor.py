"""The monitor: one process per pod, parent of all the pod's processes, outliving cribd.

One thread and one epoll. It holds the pod's namespaces, starts containers and execs by plans that it does not
read, writes logs, and records each exit on disk before it tells anybody. Requests come on any connection of its
path socket (and on the socket pair that cribd made it with); what happens is told on all of them.
"""

from __future__ import annotations

import os
import signal
import socket

from runtime.linux.lib import SyscallError
from runtime.linux.process import PR_SET_CHILD_SUBREAPER, close_range, prctl, set_title
from runtime.zygote.adoption import Adoption, Adoptions
from runtime.zygote.attach import attach
from runtime.zygote.container import Container, Process
from runtime.zygote.containers import Containers
from runtime.zygote.execs import Execs
from runtime.zygote.hold import Holds
from runtime.zygote.messages import Kind, close_all
from runtime.zygote.podspace import BadSysctl, PodSpace
from runtime.zygote.server import SOCKET_NAME, Server

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

_LAST_FD: Final = 0xFFFFFFFF


class Monitor:
    """The state of one pod's monitor. `directory` is the pod's own, below cribd's state directory."""

    def __init__(self, pod_id: str, directory: str, connection: socket.socket, space: PodSpace) -> None:
        self._id = pod_id
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._server = Server(self._directory, self._request, self._gone)
        self._space = space
        self._holds = Holds()
        self._adoptions = Adoptions(self._directory)
        shared = self._server, self._space, self._holds, self._adoptions
        self._containers = Containers(*shared, self._directory)
        self._execs = Execs(*shared, self._containers)
        self._wake = -1
        self._ending: tuple[socket.socket, int] | None = None
        self._server.add(connection)

    # Set-up and loop

    def run(self) -> None:
        """Serve until the pod ends."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        set_title(f"crib-monitor {self._id}".encode())
        self.wake_on_signals()
        while self._ending is None or self._alive():
            self.turn()
        self._finish()

    def wake_on_signals(self) -> int:
        """Have a child's end wake `turn`; returns the descriptor that the signal handler writes to."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._wake = read
        self._server.watch(read, lambda: self._reap(read))
        return write

    def turn(self) -> None:
        """Wait until something happens, and handle it."""
        due = self._holds.expire(), self._containers.spool.expire(), self._adoptions.expire()
        self._server.turn(min([seconds for seconds in due if seconds >= 0], default=-1))

    def close(self) -> None:
        """Let go of everything without ending anything: for the zygote's warm-up."""
        self._server.close()
        self._space.close()
        for fd in (self._directory, self._wake):
            os.close(fd)

    # Requests

    def _request(self, connection: socket.socket, kind: str, fields: dict[str, Any], fds: list[int]) -> None:
        n = fields.get("n", 0)
        try:
            self._dispatch(connection, kind, fields, fds)
        except SyscallError as error:
            invalid = isinstance(error, BadSysctl)
            self._server.send(connection, Kind.FAILED, re=n, errno=error.errno, detail=str(error), invalid=invalid)
        except OSError as error:
            detail = f"{error.filename or ''} {(error.strerror or '').lower()}".strip()
            self._server.send(connection, Kind.FAILED, re=n, errno=error.errno or 0, detail=detail)
        except (KeyError, TypeError, ValueError) as error:
            detail = f"{kind}: {type(error).__name__}: {error}"
            self._server.send(connection, Kind.FAILED, re=n, errno=0, detail=detail)
        finally:
            close_all(fds)

    def _dispatch(self, connection: socket.socket, kind: str, fields: dict[str, Any], fds: list[int]) -> None:
        n = fields["n"]
        if kind == Kind.POD:
            made = self._space.make(fields)
            self._server.send(connection, Kind.OK, made, re=n, **self._facts())
            close_all(list(made))
        elif kind == Kind.PREPARE:
            self._containers.prepare(connection, fields, fds)
        elif kind == Kind.START:
            self._containers.start(connection, fields, fds)
        elif kind == Kind.EXEC:
            self._execs.start(connection, fields, fds)
        elif kind == Kind.SOCKET:
            self._socket(connection, n, fields["family"])
        elif kind == Kind.REOPEN:
            self._containers.reopen(connection, n, fields, fds)
        elif kind == Kind.END:
            self._end(connection, n)
        else:
            reply: dict[str, Any] = {}
            if kind == Kind.SYSCTLS:
                self._space.set_sysctls(fields["sysctls"])
            elif kind == Kind.SIGNAL:
                signal.pidfd_send_signal(self._containers.running(fields["id"]).pidfd, fields["signal"])
            elif kind == Kind.KILL:
                if "exec" in fields:
                    self._execs.kill(fields["exec"])
                else:
                    self._containers.kill(fields["id"])
            elif kind == Kind.RESIZE:
                self._containers.running(fields["id"]).resize(fields["rows"], fields["columns"])
            elif kind == Kind.RESUME:
                self._containers.resume(fields["id"], fields["detail"])
            elif kind == Kind.FORGET:
                self._containers.forget(fields["id"])
            elif kind == Kind.ATTACH:
                attach(self._server, self._containers.running(fields["id"]), fds.pop(), fields["stdin"])
            elif kind == Kind.FACTS:
                reply = self._facts()
            else:
                raise ValueError("not a request")
            self._server.send(connection, Kind.OK, re=n, **reply)

    def _gone(self, connection: socket.socket) -> None:
        self._execs.abandon(connection)
        self._containers.abandon(connection)

    def _socket(self, connection: socket.socket, n: int, family: int) -> None:
        """A socket belongs to the network namespace it was made in: cribd connects it without entering that."""
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as made:
            self._server.send(connection, Kind.OK, (made.fileno(),), re=n)

    def _facts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "init_pid": self._space.init_pid,
            "pod": self._space.made,
            "user": self._space.user,
            "containers": self._containers.facts(),
        }

    # Ends

    def _reap(self, wake: int) -> None:
        try:
            os.read(wake, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                info = self._adoptions.reap()
            except ChildProcessError:
                return
            if info is None:
                return
            if info.si_code == os.CLD_TRAPPED:
                self._holds.stopped(info.si_pid, info.si_status)
            else:
                self._ended(info)

    def _ended(self, info: Any) -> None:
        self._containers.settle()
        if made := self._adoptions.ended(info.si_pid):
            self._made(*made, info)
        elif self._containers.reaped(info) or self._execs.reaped(info):
            pass
        elif self._space.init_pid == info.si_pid:
            self._space.init_ended()

    def _made(self, process: Process, adoption: Adoption, info: Any) -> None:
        """A runtime's command has ended: the process is there, or won't be."""
        while process.sync:
            self._server.handle(process.sync.fileno())
        adoption.finish(process, info)
        if process.failure is not None and not process.ended:
            if process.pid != adoption.command:
                process.kill()
            process.end(info)
        if isinstance(process, Container):
            self._containers.made(process)
        else:
            self._execs.made(process)

    # The pod's end

    def _alive(self) -> bool:
        return self._space.init_pid > 0 or self._containers.alive

    def _end(self, connection: socket.socket, n: int) -> None:
        self._containers.end()
        self._adoptions.end()
        self._space.kill_init()
        self._ending = (connection, n)

    def _finish(self) -> None:
        assert self._ending is not None
        self._containers.flush()
        while not self._containers.spool.idle:
            self.turn()
        hung = self._containers.spool.end()
        os.unlink(SOCKET_NAME, dir_fd=self._directory)
        connection, n = self._ending
        self._server.send(connection, Kind.OK, re=n, hung=hung)
        if hung:  # this process goes when the disk answers, but not what it holds
            self._space.disconnect()
            close_range(0, _LAST_FD)
            os._exit(0)

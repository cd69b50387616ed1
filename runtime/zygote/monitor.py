"""The monitor: one process per pod, parent of all the pod's processes, outliving cribd.

One thread and one epoll. It holds the pod's namespaces, starts containers and execs by plans that it does not
read, writes logs, and records each exit on disk before it tells anybody. Requests come on any connection of its
path socket (and on the socket pair that cribd made it with); what happens is told on all of them.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time

from runtime.cgroup import files as cgroup_files
from runtime.linux.lib import SyscallError
from runtime.linux.process import PR_SET_CHILD_SUBREAPER, close_range, prctl, set_title
from runtime.zygote.adoption import Adoption
from runtime.zygote.attach import attach, detach_all
from runtime.zygote.child import become
from runtime.zygote.container import Container, Process
from runtime.zygote.hold import Holds
from runtime.zygote.log import open_log
from runtime.zygote.messages import Kind, close_all, read_plan
from runtime.zygote.podspace import NEWPID, BadSysctl, PodSpace
from runtime.zygote.server import SOCKET_NAME, Server
from runtime.zygote.spool import Log, Spool
from runtime.zygote.tree import kill_tree

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

_LAST_FD: Final = 0xFFFFFFFF


class Monitor:
    """The state of one pod's monitor. `directory` is the pod's own, below cribd's state directory."""

    def __init__(self, pod_id: str, directory: str, connection: socket.socket) -> None:
        self._id = pod_id
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._server = Server(self._directory, self._request)
        self._space = PodSpace()
        self._holds = Holds()
        self._spool = Spool(self._tell_log)
        self._containers: dict[str, Container] = {}
        self._execs: dict[str, Process] = {}
        self._exec_of: dict[str, str] = {}
        self._adopting: list[Process] = []
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
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
        holds_s, logs_s = self._holds.expire(), self._spool.expire()
        self._server.turn(max(holds_s, logs_s) if holds_s < 0 or logs_s < 0 else min(holds_s, logs_s))

    def close(self) -> None:
        """Let go of everything without ending anything: for the zygote's warm-up."""
        self._server.close()
        self._space.close()
        for fd in (self._directory, self._null, self._wake):
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
        elif kind == Kind.START:
            self._start(connection, fields, fds)
        elif kind == Kind.EXEC:
            self._exec(connection, fields, fds)
        elif kind == Kind.SOCKET:
            self._socket(connection, n, fields["family"])
        elif kind == Kind.REOPEN:
            self._reopen(connection, n, fields, fds)
        elif kind == Kind.END:
            self._end(connection, n)
        else:
            reply: dict[str, Any] = {}
            if kind == Kind.SIGNAL:
                signal.pidfd_send_signal(self._running(fields["id"]).pidfd, fields["signal"])
            elif kind == Kind.KILL:
                self._kill(fields)
            elif kind == Kind.RESIZE:
                self._process(fields).resize(fields["rows"], fields["columns"])
            elif kind == Kind.RESUME:
                self._resume(fields["id"], fields["detail"])
            elif kind == Kind.FORGET:
                self._forget(fields["id"])
            elif kind == Kind.ATTACH:
                attach(self._server, self._running(fields["id"]), fds.pop(), fields["stdin"])
            elif kind == Kind.FACTS:
                reply = self._facts()
            else:
                raise ValueError("not a request")
            self._server.send(connection, Kind.OK, re=n, **reply)

    # The pod

    # Starting

    def _start(self, connection: socket.socket, fields: dict[str, Any], fds: list[int]) -> None:
        if fields["id"] in self._containers:
            raise ValueError("started before")
        pid_ns = -1
        if fields["pid"] == "pod":
            pid_ns = self._space.shared_pid_ns()
        elif fields["pid"] == "target":  # by pidfd: a path could lead to a process that came after it
            pid_ns = os.dup(self._running(fields["pid_ns"]).pidfd)
        elif fields["pid_ns"]:
            pid_ns = os.open(fields["pid_ns"], os.O_RDONLY | os.O_CLOEXEC)
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(0 if fields["terminal"] else 2)]
        stdin = os.pipe2(os.O_CLOEXEC) if fields["stdin"] and not fields["terminal"] else None
        child = {"stdin": stdin[0] if stdin else self._null, "stdout": self._null, "stderr": self._null}
        child |= {"stdout": ends[0][1], "stderr": ends[1][1]} if ends else {}
        child |= {"shm": self._space.shm} if self._space.shm >= 0 else {}
        plan, adopt = read_plan(fds[0]), fields.get("adopt", "")
        if fields["log"] and len(fds) == 1:  # older cribds leave that to the monitor
            fds.append(open_log(fields["log"]))
        flags = NEWPID if fields["pid"] == "new" else 0
        inherited = pid_ns
        if self._space.user >= 0:  # what it clones after joining the user namespace is what enters the pid namespace
            child |= {"user": self._space.user} | ({"pid": pid_ns} if pid_ns >= 0 else {})
            inherited, flags = -1, 0
        held = self._watchers(None) if fields["pid"] in ("pod", "target", "join") and self._space.user < 0 else []
        try:
            pid, pidfd = self._holds.clone(self._space, held, inherited, flags, fields["clone_dir"])
            if pid == 0:
                become(plan, child, theirs)
        except SyscallError:
            mine.close()
            close_all([end[0] for end in ends] + ([stdin[1]] if stdin else []))
            raise
        finally:
            theirs.close()
            close_all([end[1] for end in ends] + ([stdin[0]] if stdin else []) + ([pid_ns] if pid_ns >= 0 else []))
        container = Container(connection, fields["n"], pid, pidfd, mine, fields)
        if fields["log"]:
            size, limit = fields.get("log_size", 0), fields.get("log_max_bytes", 0)
            container.log = Log(self._spool, container.id, fields["log"], fds.pop(), size, limit)
        container.staged = self._space.user >= 0 and not adopt
        self._holds.add(container, held, ())
        self._adopt(container, adopt, fds[1:])
        if stdin:
            os.set_blocking(stdin[1], False)
            container.stdin = stdin[1]
        for (fd, _), name in zip(ends, (b"stdout", b"stderr"), strict=False):
            container.add_stream(fd, name)
        self._containers[container.id] = container
        self._server.watch(mine.fileno(), lambda: self._started(container, mine.fileno()))

    def _exec(self, connection: socket.socket, fields: dict[str, Any], fds: list[int]) -> None:
        container = self._running(fields["id"])
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        plan = read_plan(fds[0])
        silent = [self._null] * 3
        streams = fds[-3:] if len(fds) > 3 else silent
        child = dict(zip(("stdin", "stdout", "stderr"), streams, strict=True))
        child["container"] = container.pidfd
        adopt = fields.get("adopt", "")
        held = [] if adopt else self._watchers(container)
        clone_dir, join_files = fields["clone_dir"], tuple(fields["join_files"])
        if clone_dir:
            clone_dir = cgroup_files.leaf(clone_dir, container.cgroup, container.pid)
        elif join_files and join_files[0].endswith("/cgroup.procs"):
            leaf = cgroup_files.leaf(join_files[0].rpartition("/")[0], container.cgroup, container.pid)
            join_files = (f"{leaf}/cgroup.procs",)
        try:
            pid, pidfd = self._holds.clone(self._space, held, -1 if adopt else container.pidfd, 0, clone_dir)
            if pid == 0:
                become(plan, child, theirs)
        except SyscallError:
            mine.close()
            raise
        finally:
            theirs.close()
        process = Process(connection, fields["n"], pid, pidfd, mine)
        self._holds.add(process, held, join_files)
        self._adopt(process, adopt, fds[1:2] if streams is silent else [])
        self._execs[fields["exec"]] = process
        self._exec_of[fields["exec"]] = container.id
        self._server.watch(mine.fileno(), lambda: self._exec_started(fields["exec"], process, mine.fileno()))

    def _adopt(self, process: Process, pid_file: str, listener: list[int]) -> None:
        """With a `pid_file`: the process is the command that makes it, and sends its terminal to the listener."""
        if pid_file:
            listening = os.dup(listener[0]) if listener else -1
            process.adoption = Adoption(process.pid, self._directory, pid_file, listening)
            self._adopting.append(process)

    def _watchers(self, entered: Container | None) -> list[Container]:
        """Who could take over a child that enters a container's pid namespace, or with None the pod's."""
        own = entered is not None and entered.own_pid
        running = (each for each in self._containers.values() if each.watches and not each.ended)
        return [each for each in running if each is entered or not (own and each.own_pid)]

    def _started(self, container: Container, fd: int) -> None:
        self._server.rewatch(fd, 0)  # silent while this decides; a closed descriptor leaves epoll by itself
        if not container.read_sync():
            self._server.rewatch(fd, select.EPOLLIN)
            if container.paused:
                self._server.tell(Kind.PAUSED, id=container.id, pid=container.pid)
            return
        self._server.forget(fd)
        if container.failure is None and not container.adoption:  # a failure is told when the child has been reaped
            self._runs(container)

    def _runs(self, container: Container) -> None:
        """A container has become its program: tell so, and read what it writes."""
        if container.terminal >= 0:
            container.add_stream(container.terminal, b"stdout")
            if container.stdin_open:
                container.stdin = os.dup(container.terminal)
        for stream in container.streams:
            self._watch_stream(container, stream)
        self._server.send(
            container.asker, Kind.OK, re=container.n, pid=container.pid, started_ns=container.report["s"],
            running_ns=container.started_ns, durations_ns=container.report["d"], warnings=container.report["w"],
        )  # fmt: skip
        if container.ended:
            self._announce(container)

    def _exec_started(self, exec_id: str, process: Process, fd: int) -> None:
        self._server.rewatch(fd, 0)  # silent while this decides; a closed descriptor leaves epoll by itself
        if not process.read_sync():
            self._server.rewatch(fd, select.EPOLLIN)
            return
        self._server.forget(fd)
        if process.failure is None and not process.adoption:
            self._exec_runs(exec_id, process)

    def _exec_runs(self, exec_id: str, process: Process) -> None:
        terminal = (process.terminal,) if process.terminal >= 0 else ()
        self._server.send(process.asker, Kind.OK, terminal, re=process.n, pid=process.pid)
        close_all(list(terminal))
        process.terminal = -1
        if process.ended:
            self._announce_exec(exec_id, process)

    def _socket(self, connection: socket.socket, n: int, family: int) -> None:
        """A socket belongs to the network namespace it was made in: cribd connects it without entering that."""
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as made:
            self._server.send(connection, Kind.OK, (made.fileno(),), re=n)

    def _watch_stream(self, container: Container, fd: int) -> None:
        waits = False

        def readable() -> None:
            nonlocal waits
            if container.log and not waits and container.log.crowded(resume):
                waits = True  # what is told of it now is that it has ended: then it is read
                self._server.rewatch(fd, 0)
            elif not container.read_stream(fd):
                self._server.unwatch(fd)
                os.close(fd)
                del container.streams[fd]

        def resume() -> None:
            nonlocal waits
            if waits and self._server.watched(fd, readable):
                waits = False
                self._server.rewatch(fd, select.EPOLLIN)

        self._server.watch(fd, readable)

    # Ends

    def _reap(self, wake: int) -> None:
        try:
            os.read(wake, 4096)
        except BlockingIOError:
            pass
        while True:
            look = os.WNOWAIT if self._adopting else 0
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | look)
            except ChildProcessError:
                return
            if info is None:
                return
            if look:
                for process in self._adopting:
                    if process.adoption:
                        process.adoption.take(process)
                os.waitid(os.P_PID, info.si_pid, os.WEXITED)
            if info.si_code == os.CLD_TRAPPED:
                self._holds.stopped(info.si_pid, info.si_status)
            else:
                self._ended(info)

    def _ended(self, info: Any) -> None:
        for container in self._containers.values():
            # The news of the process that takes another's place comes before either of the two can end.
            while container.staged and container.sync and select.select([container.sync], [], [], 0)[0]:
                self._server.handle(container.sync.fileno())
        for made in self._adopting:
            if made.adoption and made.adoption.command == info.si_pid:
                self._made(made, made.adoption, info)
                return
        for container in self._containers.values():
            if container.pid == info.si_pid and not container.ended:
                container.end(info)
                self._holds.release(container)
                self._container_ended(container)
                return
        for exec_id, process in list(self._execs.items()):
            if process.pid == info.si_pid:
                process.end(info)
                self._holds.release(process)
                self._exec_ended(exec_id, process)
                return
        if self._space.init_pid == info.si_pid:
            self._space.init_ended()

    def _made(self, process: Process, adoption: Adoption, info: Any) -> None:
        """A runtime's command has ended: the process is there, or won't be."""
        self._adopting.remove(process)
        while process.sync:
            self._server.handle(process.sync.fileno())
        adoption.finish(process, info)
        exec_id = next((exec_id for exec_id, one in self._execs.items() if one is process), "")
        if process.failure is not None and not process.ended:
            if process.pid != adoption.command:
                process.kill()
            process.end(info)
        if exec_id:
            process.adoption = None
            if process.failure is None:
                self._exec_runs(exec_id, process)
            else:
                self._exec_ended(exec_id, process)
        elif isinstance(process, Container):
            if process.failure is None:
                process.paused = True
                self._server.tell(Kind.PAUSED, id=process.id, pid=process.pid)
            else:
                self._container_ended(process)

    def _exec_ended(self, exec_id: str, process: Process) -> None:
        if process in self._adopting:
            return  # told when the command that made it has ended
        while process.sync:
            self._server.handle(process.sync.fileno())
        if process.failure is not None:
            self._server.send(process.asker, Kind.FAILED, re=process.n, **process.failure)
            self._drop_exec(exec_id)
        else:
            self._announce_exec(exec_id, process)

    def _container_ended(self, container: Container) -> None:
        if not container.own_pid:
            cgroup_files.kill(container.kill_dirs)
        while container.sync:
            fd = container.sync.fileno()
            self._server.handle(fd)
        if container.failure is not None:
            if container.failure["failed"] < 0 and _oom_killed(container.memory_events):
                container.failure["detail"] = "killed for memory: its limit is too low to start with"
            self._server.send(
                container.asker, Kind.FAILED, re=container.n, durations_ns=container.report.get("d", []),
                warnings=container.report.get("w", []), **container.failure,
            )  # fmt: skip
            self._forget(container.id)
        elif container.started_ns:
            self._announce(container)

    def _announce(self, container: Container) -> None:
        """Record a container's end on disk, then tell it: when its last words are in its log, if that can be."""
        container.drain()
        detach_all(container)
        container.oom_killed = _oom_killed(container.memory_events) and container.code != 0
        self._record(container)

        def tell(_: int) -> None:
            self._server.tell(Kind.EXITED, **container.fact())

        if container.log:
            container.log.flush(tell)
        else:
            tell(0)

    def _record(self, container: Container) -> None:
        name = f"exit-{container.id}.json"
        fd = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        try:
            os.write(fd, container.record())
        finally:
            os.close(fd)
        os.rename(f"{name}.new", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _announce_exec(self, exec_id: str, process: Process) -> None:
        if exec_id in self._execs:
            self._server.tell(Kind.EXEC_EXITED, exec=exec_id, code=process.code, exited_ns=process.exited_ns)
            self._drop_exec(exec_id)

    def _drop_exec(self, exec_id: str) -> None:
        self._execs.pop(exec_id).close()
        del self._exec_of[exec_id]

    # Requests on what runs

    def _running(self, container_id: str) -> Container:
        container = self._containers.get(container_id)
        if container is None or container.ended or not container.started_ns:
            raise SyscallError("container is not running", 3)  # ESRCH
        return container

    def _process(self, fields: dict[str, Any]) -> Process:
        return self._execs[fields["exec"]] if "exec" in fields else self._running(fields["id"])

    def _kill(self, fields: dict[str, Any]) -> None:
        if "exec" in fields:
            process = self._execs.get(fields["exec"])
            if process and not process.ended:
                container = self._containers[self._exec_of[fields["exec"]]]
                kill_tree(process.pid, container.kill_dirs)
                process.kill()  # it may not be in its cgroup yet
        else:
            container = self._containers[fields["id"]]
            if not container.ended:
                container.kill()  # it may not be in its cgroup yet
                cgroup_files.kill(container.kill_dirs)

    def _resume(self, container_id: str, detail: str) -> None:
        container = self._containers[container_id]
        if not container.paused:
            return
        container.paused = False
        if container.sync:
            container.sync.send(f"{detail}\0".encode())
        elif not container.adoption:
            return
        elif not detail:
            container.started_ns = time.time_ns()
            self._runs(container)
        else:
            container.failure = {"failed": -1, "errno": 0, "detail": detail}
            if container.ended:
                self._container_ended(container)
            else:
                container.kill()

    def _reopen(self, connection: socket.socket, n: int, fields: dict[str, Any], fds: list[int]) -> None:
        def reopened(errno: int) -> None:
            if errno:
                detail = f"{log.path if log else ''}: the disk of the old file does not answer"
                self._server.send(connection, Kind.FAILED, re=n, errno=errno, detail=detail)
            else:
                self._server.send(connection, Kind.OK, re=n)

        log = self._running(fields["id"]).log
        if log:
            log.reopen(fds.pop() if fds else open_log(log.path), fields.get("log_size", 0), reopened)
        else:
            reopened(0)

    def _tell_log(self, container_id: str) -> None:
        """Say what is new of a container's log."""
        if container := self._containers.get(container_id):
            self._server.tell(Kind.LOG, **container.fact())

    def _forget(self, container_id: str) -> None:
        container = self._containers.get(container_id)
        if container is None:
            return
        if not container.ended:
            raise ValueError("container is running")
        for fd in list(container.streams):
            if self._server.watched(fd):
                container.read_stream(fd)
                self._server.unwatch(fd)
            os.close(fd)
        if container.log:
            container.log.close()
        if container.stdin >= 0:
            os.close(container.stdin)
        container.close()
        del self._containers[container_id]
        try:
            os.unlink(f"exit-{container_id}.json", dir_fd=self._directory)
        except FileNotFoundError:
            pass

    def _facts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "init_pid": self._space.init_pid,
            "pod": self._space.made,
            "user": self._space.user,
            "containers": [container.fact() for container in self._containers.values() if container.started_ns],
        }

    # The pod's end

    def _alive(self) -> bool:
        return self._space.init_pid > 0 or any(not container.ended for container in self._containers.values())

    def _end(self, connection: socket.socket, n: int) -> None:
        for container in self._containers.values():
            if not container.ended:
                cgroup_files.kill(container.kill_dirs)
                container.kill()
        self._space.kill_init()
        self._ending = (connection, n)

    def _finish(self) -> None:
        assert self._ending is not None
        for container in self._containers.values():
            container.drain()
            if container.log:
                container.log.flush(lambda _: None)
        while not self._spool.idle:
            self.turn()
        hung = self._spool.end()
        os.unlink(SOCKET_NAME, dir_fd=self._directory)
        connection, n = self._ending
        self._server.send(connection, Kind.OK, re=n, hung=hung)
        if hung:  # this process goes when the disk answers, but not what it holds
            self._space.disconnect()
            close_range(0, _LAST_FD)
            os._exit(0)


def _oom_killed(memory_events: str) -> bool:
    """Whether the kernel has killed anything of the cgroup for memory; False once the cgroup is gone."""
    try:
        return bool(memory_events) and cgroup_files.oom_kills(memory_events) > 0
    except OSError:
        return False

"""A pod's containers as its monitor has them: starts, output, ends and their records, and what is asked of one."""

from __future__ import annotations

import os
import select
import socket
import time

from runtime.cgroup import files as cgroup_files
from runtime.linux.lib import SyscallError
from runtime.zygote.attach import detach_all
from runtime.zygote.child import become
from runtime.zygote.container import Container
from runtime.zygote.messages import Kind, close_all
from runtime.zygote.podspace import NEWPID
from runtime.zygote.spool import Log, Spool

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any

    from runtime.zygote.adoption import Adoptions
    from runtime.zygote.hold import Holds
    from runtime.zygote.podspace import PodSpace
    from runtime.zygote.server import Server


class Containers:
    """One pod's. `directory` is a descriptor of the directory that their ends are recorded in."""

    def __init__(self, server: Server, space: PodSpace, holds: Holds, adoptions: Adoptions, directory: int) -> None:
        self._server = server
        self._space = space
        self._holds = holds
        self._adoptions = adoptions
        self._directory = directory
        self._containers: dict[str, Container] = {}
        self.spool = Spool(self._tell_log)

    def running(self, container_id: str) -> Container:
        """The container, which runs. Raises SyscallError."""
        container = self._containers.get(container_id)
        if container is None or container.ended or not container.started_ns:
            raise SyscallError("container is not running", 3)  # ESRCH
        return container

    # Starting

    def prepare(self, connection: socket.socket, fields: dict[str, Any], fds: list[int]) -> None:
        """As the PREPARE message asks. Raises OSError, KeyError or ValueError."""
        if fields["id"] in self._containers:
            raise ValueError("made before")
        self._clone(connection, fields, fds, waits=True)
        self._server.send(connection, Kind.OK, re=fields["n"])

    def start(self, connection: socket.socket, fields: dict[str, Any], fds: list[int]) -> None:
        """As the START message asks; it is answered when that is decided. Raises OSError, KeyError or ValueError."""
        container, log = self._containers.get(fields["id"]), None
        if container and not container.waits:
            raise ValueError("started before")
        if path := fields["log"]:
            log = Log(self.spool, fields["id"], path, fds[-1], fields["log_size"], fields["log_max_bytes"])
        container = container or self._clone(connection, fields, fds, waits=False)
        if log:
            container.log_to(log)
            fds.pop()  # the log's from here on
        if container.waits:
            container.let_go(connection, fields["n"])

    def _clone(self, connection: socket.socket, fields: dict[str, Any], fds: list[int], *, waits: bool) -> Container:
        """The container, with a child that becomes it. What can fail comes before that: nobody would know it."""
        plan, adopt, space = fields["plan"], fields.get("adopt", ""), self._space
        child = {"stdin": space.null, "stdout": space.null, "stderr": space.null}
        lent: list[int] = []  # for the child, and closed here
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        container = Container(connection, fields["n"], mine, fields)
        container.waits = waits
        container.staged = space.user >= 0 and not adopt
        try:
            for name in () if fields["terminal"] else ("stdout", "stderr"):
                read, child[name] = os.pipe2(os.O_CLOEXEC)
                lent.append(child[name])
                container.add_stream(read, name.encode())
            if fields["stdin"] and not fields["terminal"]:
                child["stdin"], container.stdin = os.pipe2(os.O_CLOEXEC)
                lent.append(child["stdin"])
                os.set_blocking(container.stdin, False)
            if owner := fields.get("owner", 0):  # who may open /dev/stdout
                for fd in lent:
                    os.fchown(fd, owner, -1)
            pid_ns = self._pid_ns(fields)
            lent += [pid_ns] if pid_ns >= 0 else []
            child |= {"shm": space.shm} if space.shm >= 0 else {}
            flags = NEWPID if fields["pid"] == "new" else 0
            inherited = pid_ns
            if space.user >= 0:  # what it clones after joining the user namespace is what enters the pid namespace
                child |= {"user": space.user} | ({"pid": pid_ns} if pid_ns >= 0 else {})
                inherited, flags = -1, 0
            held = self.watchers(None) if fields["pid"] in ("pod", "target", "join") and space.user < 0 else []
            self._server.watch(mine.fileno(), lambda: self._started(container, mine.fileno()))
            container.pid, container.pidfd = self._holds.clone(space, held, inherited, flags, fields["clone_dir"])
            if container.pid == 0:
                become(plan, child, theirs, traced=bool(held), waits=waits)
        except BaseException:
            self._close(container)
            raise
        finally:
            theirs.close()
            close_all(lent)
        self._holds.add(container, held, ())
        if adopt:
            self._adoptions.begin(container, adopt, fds.pop(0) if fields["terminal"] else -1)
        self._containers[container.id] = container
        return container

    def _pid_ns(self, fields: dict[str, Any]) -> int:
        """A descriptor, the caller's, of the pid namespace that a container is to be in; -1 for none but ours."""
        if fields["pid"] == "pod":
            return self._space.shared_pid_ns()
        if fields["pid"] == "target":  # by pidfd: a path could lead to a process that came after it
            return os.dup(self.running(fields["pid_ns"]).pidfd)
        return os.open(fields["pid_ns"], os.O_RDONLY | os.O_CLOEXEC) if fields["pid_ns"] else -1

    def watchers(self, entered: Container | None) -> list[Container]:
        """Who could take over a child that enters a container's pid namespace, or with None the pod's."""
        own = entered is not None and entered.own_pid
        running = (each for each in self._containers.values() if each.watches and not each.ended)
        return [each for each in running if each is entered or not (own and each.own_pid)]

    def _started(self, container: Container, fd: int) -> None:
        self._server.unwatch(fd)  # which may be closed here
        if not container.read_sync():
            self._server.watch(fd, lambda: self._started(container, fd))
            if container.paused:
                self._server.tell(Kind.PAUSED, id=container.id, pid=container.pid)
            return
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

    def settle(self) -> None:
        """Handle the news of each process that takes another's place: it comes before either of the two can end."""
        for container in self._containers.values():
            while container.staged and container.sync and select.select([container.sync], [], [], 0)[0]:
                self._server.handle(container.sync.fileno())

    def reaped(self, info: Any) -> bool:
        """A child has ended, as waitid(2) tells; whether it was a container's first process."""
        for container in self._containers.values():
            if container.pid == info.si_pid and not container.ended:
                container.end(info)
                self._holds.release(container)
                self._ended(container)
                return True
        return False

    def made(self, container: Container) -> None:
        """A runtime's command has made it, or failed."""
        if container.failure is None:
            container.paused = True
            self._server.tell(Kind.PAUSED, id=container.id, pid=container.pid)
        else:
            self._ended(container)

    def _ended(self, container: Container) -> None:
        if not container.own_pid:
            cgroup_files.kill(container.kill_dirs)
        while container.sync:
            fd = container.sync.fileno()
            self._server.handle(fd)
        if container.failure is not None:
            if container.failure["failed"] < 0 and _oom_killed(container.memory_events):
                container.failure["detail"] = "killed for memory: its limit is too low to start with"
                container.failure["oom"] = True
            if not container.waits:  # else START clones another one, and tells
                self._server.send(
                    container.asker, Kind.FAILED, re=container.n, durations_ns=container.report.get("d", []),
                    warnings=container.report.get("w", []), **container.failure,
                )  # fmt: skip
            self.forget(container.id)
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
        """On disk, for when the monitor is lost. Where the disk is full its own memory has to do."""
        name, told = f"exit-{container.id}.json", container.record()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            fd = os.open(f"{name}.new", flags, 0o600, dir_fd=self._directory)
            try:
                if os.write(fd, told) < len(told):
                    return
            finally:
                os.close(fd)
            os.rename(f"{name}.new", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            return

    # Requests on what runs

    def kill(self, container_id: str) -> None:
        """SIGKILL to all of a container. Raises OSError or KeyError."""
        container = self._containers[container_id]
        if not container.ended:
            container.kill()  # it may not be in its cgroup yet
            cgroup_files.kill(container.kill_dirs)

    def resume(self, container_id: str, detail: str) -> None:
        """Have a container that waits go on, or fail if `detail` is wrong. Raises KeyError."""
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
                self._ended(container)
            else:
                container.kill()

    def reopen(self, connection: socket.socket, n: int, fields: dict[str, Any], fds: list[int]) -> None:
        """As the REOPEN message asks. Raises OSError."""

        def reopened(errno: int) -> None:
            if errno:
                detail = f"{log.path if log else ''}: the disk of the old file does not answer"
                self._server.send(connection, Kind.FAILED, re=n, errno=errno, detail=detail)
            else:
                self._server.send(connection, Kind.OK, re=n)

        log = self.running(fields["id"]).log
        if log:
            log.reopen(fds.pop(), fields["log_size"], reopened)
        else:
            reopened(0)

    def _tell_log(self, container_id: str) -> None:
        """Say what is new of a container's log."""
        if container := self._containers.get(container_id):
            self._server.tell(Kind.LOG, **container.fact())

    def forget(self, container_id: str) -> None:
        """Drop all that is left of a container that has ended or was never started. Raises ValueError for any other."""
        container = self._containers.get(container_id)
        if container is None:
            return
        if container.waits and not container.ended:
            container.kill()
        elif not container.ended:
            raise ValueError("container is running")
        self._close(container)
        del self._containers[container_id]
        try:
            os.unlink(f"exit-{container_id}.json", dir_fd=self._directory)
        except FileNotFoundError:
            pass

    def _close(self, container: Container) -> None:
        """Close all that is open for it."""
        for fd in container.streams:
            if self._server.watched(fd):
                container.read_stream(fd)
                self._server.unwatch(fd)
            os.close(fd)
        if container.log:
            container.log.close()
        if container.stdin >= 0:
            os.close(container.stdin)
        if container.sync and self._server.watched(container.sync.fileno()):
            self._server.unwatch(container.sync.fileno())
        container.close()

    def abandon(self, connection: socket.socket) -> None:
        """Drop what waits for a START from a connection that is gone."""
        for container in list(self._containers.values()):
            if container.waits and container.asker is connection:
                self.forget(container.id)

    def facts(self) -> list[dict[str, Any]]:
        """What a new cribd is told of those that were started."""
        return [container.fact() for container in self._containers.values() if container.started_ns]

    # The pod's end

    @property
    def alive(self) -> bool:
        """Whether any has not ended."""
        return any(not container.ended for container in self._containers.values())

    def end(self) -> None:
        """SIGKILL to all."""
        for container in self._containers.values():
            if not container.ended:
                cgroup_files.kill(container.kill_dirs)
                container.kill()

    def flush(self) -> None:
        """Have all that they wrote on its way to their logs."""
        for container in self._containers.values():
            container.drain()
            if container.log:
                container.log.flush(lambda _: None)


def _oom_killed(memory_events: str) -> bool:
    """Whether the kernel has killed anything of the cgroup for memory; False once the cgroup is gone."""
    try:
        return bool(memory_events) and cgroup_files.oom_kills(memory_events) > 0
    except OSError:
        return False

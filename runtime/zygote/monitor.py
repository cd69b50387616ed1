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
from runtime.linux import mount, namespaces
from runtime.linux.lib import SyscallError
from runtime.linux.namespaces import CLONE
from runtime.linux.process import PR_SET_CHILD_SUBREAPER, PTRACE_TRACEME, clone3, prctl, ptrace, set_name, set_title
from runtime.linux.userns import mapped
from runtime.zygote import hold
from runtime.zygote.attach import attach, detach_all
from runtime.zygote.child import become
from runtime.zygote.container import Container, Process
from runtime.zygote.log import Log
from runtime.zygote.messages import Kind, ProtocolError, close_all, receive, send
from runtime.zygote.podinit import reap_for_ever
from runtime.zygote.tree import kill_tree
from runtime.zygote.userpod import join_user_pod

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from runtime.linux.userns import Maps

# As plain numbers: an enum's arithmetic is Python code, and what it touches is memory of each monitor's own.
_NEWNET: Final = int(CLONE.NEWNET)
_NEWIPC: Final = int(CLONE.NEWIPC)
_NEWUTS: Final = int(CLONE.NEWUTS)
_NEWPID: Final = int(CLONE.NEWPID)
_SHM_ATTRIBUTES: Final = int(mount.MountAttr.NOSUID | mount.MountAttr.NODEV | mount.MountAttr.NOEXEC)
_MADE: Final = ("net", "ipc", "pid", "uids", "gids", "hostname", "shm_bytes", "shm_path")
SOCKET_NAME: Final = "monitor.sock"
_PLAN_LIMIT_BYTES: Final = 4 << 20
_SYSCTL_PATH: Final = str.maketrans("./", "/.")  # as sysctl(8): "eth0/1" in a dotted name is the file eth0.1


class Monitor:
    """The state of one pod's monitor. `directory` is the pod's own, below cribd's state directory."""

    def __init__(self, pod_id: str, directory: str, connection: socket.socket) -> None:
        self._id = pod_id
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._connections: list[socket.socket] = []
        self._containers: dict[str, Container] = {}
        self._execs: dict[str, Process] = {}
        self._exec_of: dict[str, str] = {}
        self._held: list[Process] = []  # children for whose sake containers are frozen
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._own_pid_ns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._pod_pid_ns = -1
        self._pod_init: tuple[int, int] | None = None  # pid, pidfd
        self._pod_init_ready = -1  # at its end once the init holds nothing of the host
        self._user = -1
        self._shm = -1
        self._wake = -1
        self._made: dict[str, Any] = {}  # what the pod was made with, for the next cribd
        self._ending: tuple[socket.socket, int] | None = None
        self._listener = self._listen()
        self._add_connection(connection)

    # Set-up and loop

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        # By way of the directory's descriptor: a path socket's name is limited to 107 bytes.
        path = f"/proc/self/fd/{self._directory}/{SOCKET_NAME}"
        umask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(umask)
        listener.listen(8)
        self.watch(listener.fileno(), self._accept)
        return listener

    def run(self) -> None:
        """Serve until the pod ends."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        set_name("crib-monitor")
        set_title(f"crib-monitor {self._id}")
        self.wake_on_signals()
        while self._ending is None or self._alive():
            self.turn()
        self._finish()

    def wake_on_signals(self) -> int:
        """Have a child's end wake `turn`; returns the descriptor that the signal handler writes to."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._wake = read
        self.watch(read, lambda: self._reap(read))
        return write

    def turn(self) -> None:
        """Wait until something happens, and handle it."""
        for fd, _ in self._epoll.poll(hold.expire(self._held) if self._held else -1):
            handler = self._handlers.get(fd)
            if handler:
                handler()

    def close(self) -> None:
        """Let go of everything without ending anything: for the zygote's warm-up."""
        os.unlink(SOCKET_NAME, dir_fd=self._directory)
        self._listener.close()
        self._epoll.close()
        for connection in self._connections:
            connection.close()
        for fd in (self._directory, self._null, self._own_pid_ns, self._shm, self._wake):
            os.close(fd)

    def watch(self, fd: int, handler: Callable[[], None], mask: int = select.EPOLLIN) -> None:
        """Have `turn` call `handler` when `fd` is ready."""
        self._handlers[fd] = handler
        self._epoll.register(fd, mask)

    def rewatch(self, fd: int, mask: int) -> None:
        """Be called for `mask` from now on; 0 leaves the peer's hanging up."""
        self._epoll.modify(fd, mask)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`; before `fd` is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    # Connections

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._add_connection(connection)

    def _add_connection(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connections.append(connection)
        self.watch(connection.fileno(), lambda: self._request(connection))

    def _drop(self, connection: socket.socket) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self.unwatch(connection.fileno())
            connection.close()

    def _send(self, connection: socket.socket, kind: str, fds: tuple[int, ...] = (), **fields: Any) -> None:
        try:
            send(connection, kind, fds, **fields)
        except OSError:  # gone, or it does not read: it will connect again and ask for the facts
            self._drop(connection)

    def _tell(self, kind: str, **fields: Any) -> None:
        for connection in list(self._connections):
            self._send(connection, kind, **fields)

    def _request(self, connection: socket.socket) -> None:
        try:
            message = receive(connection)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            message = None
        if message is None:
            self._drop(connection)
            return
        kind, fields, fds = message
        n = fields.get("n", 0)
        try:
            self._dispatch(connection, kind, fields, fds)
        except SyscallError as error:
            self._send(connection, Kind.FAILED, re=n, errno=error.errno, detail=str(error))
        except OSError as error:
            detail = f"{error.filename or ''} {(error.strerror or '').lower()}".strip()
            self._send(connection, Kind.FAILED, re=n, errno=error.errno or 0, detail=detail)
        except (KeyError, TypeError, ValueError) as error:
            self._send(connection, Kind.FAILED, re=n, errno=0, detail=f"{kind}: {type(error).__name__}: {error}")
        finally:
            close_all(fds)

    def _dispatch(self, connection: socket.socket, kind: str, fields: dict[str, Any], fds: list[int]) -> None:
        n = fields["n"]
        if kind == Kind.POD:
            self._make_pod(connection, fields)
        elif kind == Kind.START:
            self._start(connection, fields, fds)
        elif kind == Kind.EXEC:
            self._exec(connection, fields, fds)
        elif kind == Kind.SOCKET:
            self._socket(connection, n, fields["family"])
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
            elif kind == Kind.REOPEN:
                self._reopen(fields["id"])
            elif kind == Kind.RESUME:
                self._resume(fields["id"], fields["detail"])
            elif kind == Kind.FORGET:
                self._forget(fields["id"])
            elif kind == Kind.ATTACH:
                attach(self, self._running(fields["id"]), fds.pop(), fields["stdin"])
            elif kind == Kind.FACTS:
                reply = self._facts()
            else:
                raise ValueError("not a request")
            self._send(connection, Kind.OK, re=n, **reply)

    # The pod

    def _make_pod(self, connection: socket.socket, fields: dict[str, Any]) -> None:
        """Make the pod's namespaces in this process; its children inherit them."""
        self._made = {name: fields[name] for name in _MADE}
        fds: list[int] = []
        sockets: list[socket.socket] = []
        flags = _NEWIPC if fields["ipc"] else 0
        flags |= _NEWUTS if fields["hostname"] is not None else 0
        if fields["uids"]:
            flags |= _NEWNET if fields["net"] else 0
            init = tuple(fields["init_cgroup"]) if fields["pid"] else None
            self._user, pod_init = join_user_pod(flags, fields["uids"], fields["gids"], init)
            if pod_init:
                self._take_pod_init(pod_init, os.pidfd_open(pod_init))
        else:
            if fields["net"]:
                namespaces.unshare(_NEWNET)
            if flags:
                namespaces.unshare(flags)
            if fields["pid"]:
                self._start_pod_init(tuple(fields["init_cgroup"]))
        if fields["net"]:
            # Opened inside, so that cribd can configure the namespace without ever entering it.
            sockets.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0))
            fds = [os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC), sockets[0].fileno()]
        if fields["hostname"] is not None:
            socket.sethostname(fields["hostname"])
        for name, value in fields["sysctls"].items():
            self._set_sysctl(f"/proc/sys/{name.translate(_SYSCTL_PATH)}", value, fields["uids"])
        if fields["shm_bytes"]:
            options: tuple[tuple[str, str], ...] = (("size", str(fields["shm_bytes"])), ("mode", "1777"))
            if fields["uids"]:
                root = mapped(0, fields["uids"]), mapped(0, fields["gids"])
                options = (*options, ("uid", str(root[0])), ("gid", str(root[1])))
            self._shm = mount.detached("tmpfs", options, _SHM_ATTRIBUTES)
            if fields["shm_path"]:  # this kernel can't clone a detached mount: it has to be somewhere
                target = os.open(fields["shm_path"], os.O_PATH | os.O_CLOEXEC)
                mount.move_mount(self._shm, target, fields["shm_path"])
                os.close(target)
        self._send(connection, Kind.OK, tuple(fds), re=fields["n"], **self._facts())
        if fds:
            os.close(fds[0])
            sockets[0].close()

    def _start_pod_init(self, cgroup: tuple[str, ...]) -> None:
        self._pod_init_ready, ready = os.pipe2(os.O_CLOEXEC)
        pid, pidfd = clone3(_NEWPID)
        if pid == 0:
            reap_for_ever(cgroup, ready)
        os.close(ready)
        self._take_pod_init(pid, pidfd)

    def _take_pod_init(self, pid: int, pidfd: int) -> None:
        self._pod_init = (pid, pidfd)
        self._pod_pid_ns = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    @staticmethod
    def _set_sysctl(path: str, value: str, uids: Maps) -> None:
        """Write a kernel parameter; those of an ipc namespace belong to the root of its user namespace."""
        try:
            _write(path, value)
        except PermissionError:
            if not uids:
                raise
            os.seteuid(mapped(0, uids))
            try:
                _write(path, value)
            finally:
                os.seteuid(0)

    def _clone(self, pid_ns: int, flags: int, cgroup_dir: str) -> tuple[int, int]:
        """clone3 with the child's pid namespace taken from `pid_ns` (a descriptor, -1: as it is)."""
        cgroup = os.open(cgroup_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if cgroup_dir else -1
        try:
            if pid_ns < 0:
                return clone3(flags, cgroup)
            namespaces.setns(pid_ns, _NEWPID)
            try:
                pid, pidfd = clone3(flags, cgroup)
            except SyscallError:
                self._restore_pid_ns()
                raise
            if pid:
                self._restore_pid_ns()
            return pid, pidfd
        finally:
            if cgroup >= 0:
                os.close(cgroup)

    def _watchers(self, entered: Container | None) -> list[Container]:
        """Who could take over a child that enters a container's pid namespace, or with None the pod's."""
        own = entered is not None and entered.own_pid
        running = (each for each in self._containers.values() if each.watches and not each.ended)
        return [each for each in running if each is entered or not (own and each.own_pid)]

    def _clone_held(self, held: list[Container], pid_ns: int, flags: int, cgroup_dir: str) -> tuple[int, int]:
        """`_clone` of a child for whose sake these containers are frozen."""
        hold.freeze(held)
        try:
            pid, pidfd = self._clone(pid_ns, flags, cgroup_dir)
        except SyscallError:
            hold.thaw(held)
            raise
        if pid == 0 and held:
            ptrace(PTRACE_TRACEME)
        return pid, pidfd

    def _hold(self, process: Process, held: list[Container], join_files: tuple[str, ...]) -> None:
        if held:
            process.held, process.join_files = held, join_files
            process.hold_until = time.monotonic() + hold.LIMIT_S
            self._held.append(process)

    def _release(self, process: Process) -> None:
        if process in self._held:
            self._held.remove(process)
            hold.release(process)

    def _stopped(self, info: Any) -> None:
        for process in self._held:
            if process.pid == info.si_pid:
                hold.stopped(process, info.si_status)
                if info.si_status == signal.SIGTRAP:
                    self._release(process)
                return

    def _restore_pid_ns(self) -> None:
        # If this fails every later child would be born in a container: better no monitor than that one.
        namespaces.setns(self._own_pid_ns, _NEWPID)

    # Starting

    def _start(self, connection: socket.socket, fields: dict[str, Any], fds: list[int]) -> None:
        if fields["id"] in self._containers:
            raise ValueError("started before")
        pid_ns = -1
        if fields["pid"] == "pod":
            if self._pod_init_ready >= 0:  # a container must not find it while it still has the host's tree
                os.read(self._pod_init_ready, 1)
                os.close(self._pod_init_ready)
                self._pod_init_ready = -1
            pid_ns = os.dup(self._pod_pid_ns)
        elif fields["pid"] == "target":  # by pidfd: a path could lead to a process that came after it
            pid_ns = os.dup(self._running(fields["pid_ns"]).pidfd)
        elif fields["pid_ns"]:
            pid_ns = os.open(fields["pid_ns"], os.O_RDONLY | os.O_CLOEXEC)
        log = Log(fields["log"]) if fields["log"] else None
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(0 if fields["terminal"] else 2)]
        stdin = os.pipe2(os.O_CLOEXEC) if fields["stdin"] and not fields["terminal"] else None
        child = {"stdin": stdin[0] if stdin else self._null}
        child |= {"stdout": ends[0][1], "stderr": ends[1][1]} if ends else {}
        child |= {"shm": self._shm} if self._shm >= 0 else {}
        plan = os.pread(fds[0], _PLAN_LIMIT_BYTES, 0)
        flags = _NEWPID if fields["pid"] == "new" else 0
        inherited = pid_ns
        if self._user >= 0:  # what it clones after joining the user namespace is what enters the pid namespace
            child |= {"user": self._user} | ({"pid": pid_ns} if pid_ns >= 0 else {})
            inherited, flags = -1, 0
        held = self._watchers(None) if fields["pid"] in ("pod", "target", "join") and self._user < 0 else []
        try:
            pid, pidfd = self._clone_held(held, inherited, flags, fields["clone_dir"])
            if pid == 0:
                become(plan, child, theirs)
        except SyscallError:
            mine.close()
            close_all([end[0] for end in ends] + ([stdin[1]] if stdin else []))
            if log:
                log.close()
            raise
        finally:
            theirs.close()
            close_all([end[1] for end in ends] + ([stdin[0]] if stdin else []) + ([pid_ns] if pid_ns >= 0 else []))
        container = Container(fields["n"], pid, pidfd, mine, fields)
        container.log = log
        container.staged = self._user >= 0
        self._hold(container, held, ())
        if stdin:
            os.set_blocking(stdin[1], False)
            container.stdin = stdin[1]
        for (fd, _), name in zip(ends, (b"stdout", b"stderr"), strict=False):
            container.add_stream(fd, name)
        self._containers[container.id] = container
        self.watch(mine.fileno(), lambda: self._started(connection, container, mine.fileno()))

    def _exec(self, connection: socket.socket, fields: dict[str, Any], fds: list[int]) -> None:
        container = self._running(fields["id"])
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        plan = os.pread(fds[0], _PLAN_LIMIT_BYTES, 0)
        child = dict(zip(("stdin", "stdout", "stderr"), fds[1:], strict=False))
        child["container"] = container.pidfd
        held = self._watchers(container)
        try:
            pid, pidfd = self._clone_held(held, container.pidfd, 0, fields["clone_dir"])
            if pid == 0:
                become(plan, child, theirs)
        except SyscallError:
            mine.close()
            raise
        finally:
            theirs.close()
        process = Process(fields["n"], pid, pidfd, mine)
        self._hold(process, held, tuple(fields["join_files"]))
        self._execs[fields["exec"]] = process
        self._exec_of[fields["exec"]] = container.id
        self.watch(mine.fileno(), lambda: self._exec_started(connection, fields["exec"], process, mine.fileno()))

    def _started(self, connection: socket.socket, container: Container, fd: int) -> None:
        self._epoll_once(fd)
        if not container.read_sync():
            self._epoll.modify(fd, select.EPOLLIN)
            if container.paused:
                self._tell(Kind.PAUSED, id=container.id, pid=container.pid)
            return
        del self._handlers[fd]
        if container.failure is not None:
            return  # told when the child has been reaped
        if container.terminal >= 0:
            container.add_stream(container.terminal, b"stdout")
            if container.stdin_open:
                container.stdin = os.dup(container.terminal)
        for stream in container.streams:
            self._watch_stream(container, stream)
        self._send(
            connection, Kind.OK, re=container.n, pid=container.pid, started_ns=container.report["s"],
            running_ns=container.started_ns, durations_ns=container.report["d"], warnings=container.report["w"],
        )  # fmt: skip
        if container.ended:
            self._announce(container)

    def _epoll_once(self, fd: int) -> None:
        """Keep `fd` registered but silent while its handler decides; a closed descriptor leaves epoll by itself."""
        self._epoll.modify(fd, 0)

    def _exec_started(self, connection: socket.socket, exec_id: str, process: Process, fd: int) -> None:
        self._epoll_once(fd)
        if not process.read_sync():
            self._epoll.modify(fd, select.EPOLLIN)
            return
        del self._handlers[fd]
        if process.failure is None:
            terminal = (process.terminal,) if process.terminal >= 0 else ()
            self._send(connection, Kind.OK, terminal, re=process.n, pid=process.pid)
            close_all(list(terminal))
            process.terminal = -1
            if process.ended:
                self._announce_exec(exec_id, process)

    def _socket(self, connection: socket.socket, n: int, family: int) -> None:
        """A socket belongs to the network namespace it was made in: cribd connects it without entering that."""
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as made:
            self._send(connection, Kind.OK, (made.fileno(),), re=n)

    def _watch_stream(self, container: Container, fd: int) -> None:
        def readable() -> None:
            if not container.read_stream(fd):
                self.unwatch(fd)
                os.close(fd)
                del container.streams[fd]

        self.watch(fd, readable)

    # Ends

    def _reap(self, wake: int) -> None:
        try:
            os.read(wake, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return
            if info is None:
                return
            if info.si_code == os.CLD_TRAPPED:
                self._stopped(info)
            else:
                self._ended(info)

    def _ended(self, info: Any) -> None:
        for container in self._containers.values():
            # The news of the process that takes another's place comes before either of the two can end.
            while container.staged and container.sync and select.select([container.sync], [], [], 0)[0]:
                self._handlers[container.sync.fileno()]()
        for container in self._containers.values():
            if container.pid == info.si_pid and not container.ended:
                container.end(info)
                self._release(container)
                self._container_ended(container)
                return
        for exec_id, process in list(self._execs.items()):
            if process.pid == info.si_pid:
                process.end(info)
                self._release(process)
                while process.sync:
                    self._handlers[process.sync.fileno()]()
                if process.failure is not None:
                    self._tell(Kind.FAILED, re=process.n, **process.failure)
                    self._drop_exec(exec_id)
                else:
                    self._announce_exec(exec_id, process)
                return
        if self._pod_init and self._pod_init[0] == info.si_pid:
            os.close(self._pod_init[1])
            self._pod_init = None

    def _container_ended(self, container: Container) -> None:
        if not container.own_pid:
            cgroup_files.kill(container.kill_dirs)
        while container.sync:
            fd = container.sync.fileno()
            self._handlers[fd]()
        if container.failure is not None:
            self._tell(
                Kind.FAILED, re=container.n, durations_ns=container.report.get("d", []), **container.failure,
                warnings=container.report.get("w", []),
            )  # fmt: skip
            self._forget(container.id)
        else:
            self._announce(container)

    def _announce(self, container: Container) -> None:
        """Record a container's end on disk, then tell it."""
        container.drain()
        detach_all(container)
        container.oom_killed = _oom_killed(container.memory_events) and container.code != 0
        self._record(container)
        self._tell(Kind.EXITED, **container.fact())

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
            self._tell(Kind.EXEC_EXITED, exec=exec_id, code=process.code, exited_ns=process.exited_ns)
            self._drop_exec(exec_id)

    def _drop_exec(self, exec_id: str) -> None:
        self._execs.pop(exec_id).close()
        del self._exec_of[exec_id]

    # Requests on what runs

    def _running(self, container_id: str) -> Container:
        container = self._containers.get(container_id)
        if container is None or container.ended or container.sync:
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
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)  # it may not be in its cgroup yet
        else:
            container = self._containers[fields["id"]]
            if not container.ended:
                signal.pidfd_send_signal(container.pidfd, signal.SIGKILL)  # it may not be in its cgroup yet
                cgroup_files.kill(container.kill_dirs)

    def _resume(self, container_id: str, detail: str) -> None:
        container = self._containers[container_id]
        if container.paused and container.sync:
            container.paused = False
            container.sync.send(f"{detail}\0".encode())

    def _reopen(self, container_id: str) -> None:
        log = self._running(container_id).log
        if log:
            log.reopen()

    def _forget(self, container_id: str) -> None:
        container = self._containers.get(container_id)
        if container is None:
            return
        if not container.ended:
            raise ValueError("container is running")
        for fd in list(container.streams):
            if fd in self._handlers:
                container.read_stream(fd)
                self.unwatch(fd)
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
            "init_pid": self._pod_init[0] if self._pod_init else 0,
            "pod": self._made,
            "user": self._user,
            "containers": [container.fact() for container in self._containers.values() if not container.sync],
        }

    # The pod's end

    def _alive(self) -> bool:
        return self._pod_init is not None or any(not container.ended for container in self._containers.values())

    def _end(self, connection: socket.socket, n: int) -> None:
        for container in self._containers.values():
            if not container.ended:
                cgroup_files.kill(container.kill_dirs)
                signal.pidfd_send_signal(container.pidfd, signal.SIGKILL)
        if self._pod_init:
            signal.pidfd_send_signal(self._pod_init[1], signal.SIGKILL)
        self._ending = (connection, n)

    def _finish(self) -> None:
        assert self._ending is not None
        for container in self._containers.values():
            container.drain()
        os.unlink(SOCKET_NAME, dir_fd=self._directory)
        connection, n = self._ending
        self._send(connection, Kind.OK, re=n)


def _write(path: str, value: str) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(value.encode())


def _oom_killed(memory_events: str) -> bool:
    """Whether the kernel has killed anything of the cgroup for memory; False once the cgroup is gone."""
    try:
        return bool(memory_events) and cgroup_files.oom_kills(memory_events) > 0
    except OSError:
        return False

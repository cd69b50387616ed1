"""The processes exec'd in a pod's containers: starts, ends, and killing one with all that descends from it."""

from __future__ import annotations

import socket
import struct

from runtime.cgroup import files as cgroup_files
from runtime.plan.lower import Lowered
from runtime.plan.plan import decode
from runtime.zygote.child import become, become_by_calls
from runtime.zygote.container import Process
from runtime.zygote.messages import Kind, close_all
from runtime.zygote.tree import kill_strays, kill_tree

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

    from runtime.plan.plan import Plan
    from runtime.zygote.adoption import Adoptions
    from runtime.zygote.container import Container
    from runtime.zygote.containers import Containers
    from runtime.zygote.hold import Holds
    from runtime.zygote.podspace import PodSpace
    from runtime.zygote.server import Server


_KEPT: Final = 4


class Plans:
    """Plans that come again, as a probe's do every time: decoded here once, and not by each child.

    Kept are the last few, in a monitor that is asked for them; of what came once no more than a number.
    """

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._decoded: dict[bytes, Plan | Lowered] = {}

    def get(self, data: bytes) -> bytes | Plan | Lowered:
        """The plan, decoded and lowered if that is worth it. Raises ValueError."""
        plan = self._decoded.get(data)
        if plan is None:
            number = hash(data)
            if number not in self._seen:
                self._seen = [*self._seen[1 - _KEPT :], number]
                return data
            if len(self._decoded) == _KEPT:
                del self._decoded[next(iter(self._decoded))]
            steps = decode(data)
            try:
                plan = Lowered(steps)
            except (NotImplementedError, struct.error):  # the child will tell what is wrong
                plan = steps
            self._decoded[data] = plan
        return plan


class Execs:
    """One pod's."""

    def __init__(
        self, server: Server, space: PodSpace, holds: Holds, adoptions: Adoptions, containers: Containers
    ) -> None:
        self._server = server
        self._space = space
        self._holds = holds
        self._adoptions = adoptions
        self._containers = containers
        self._plans = Plans()
        self._execs: dict[str, Process] = {}
        self._exec_of: dict[str, Container] = {}
        self._unnamed: set[str] = set()  # containers in which a killed command may have left what it had made

    def start(self, connection: socket.socket, fields: dict[str, Any], fds: list[int]) -> None:
        """As the EXEC message asks. Raises OSError, KeyError or ValueError.

        It is answered when that is decided; a `quiet` one only when it fails: its end tells the rest.
        """
        container = self._containers.running(fields["id"])
        plan = self._plans.get(fields["plan"])
        silent = [self._space.null] * 3
        streams = fds[-3:] if len(fds) >= 3 else silent
        child = dict(zip(("stdin", "stdout", "stderr"), streams, strict=True))
        child["container"] = container.pidfd
        adopt = fields.get("adopt", "")
        held = [] if adopt else self._containers.watchers(container)
        clone_dir, join_files = fields["clone_dir"], tuple(fields["join_files"])
        if clone_dir:
            clone_dir = cgroup_files.leaf(clone_dir, container.cgroup, container.pid)
        elif join_files and join_files[0].endswith("/cgroup.procs"):
            leaf = cgroup_files.leaf(join_files[0].rpartition("/")[0], container.cgroup, container.pid)
            join_files = (f"{leaf}/cgroup.procs",)
        exec_id = fields["exec"]
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        process = Process(connection, fields["n"], mine)
        process.quiet = fields.get("quiet", False)
        lowered = plan if isinstance(plan, Lowered) and process.quiet and not held else None
        try:  # what can fail comes before the child, which nobody would know
            if not process.quiet:
                self._server.watch(mine.fileno(), lambda: self._started(exec_id, process, mine.fileno()))
            inherited = -1 if adopt else container.pidfd
            process.pid, process.pidfd = self._holds.clone(self._space, held, inherited, 0, clone_dir)
            if process.pid == 0:
                if lowered:
                    become_by_calls(lowered, child, theirs)
                become(
                    plan.plan if isinstance(plan, Lowered) else plan,
                    child,
                    theirs,
                    traced=bool(held),
                    quiet=process.quiet,
                )
        except BaseException:
            if self._server.watched(mine.fileno()):
                self._server.unwatch(mine.fileno())
            mine.close()
            raise
        finally:
            theirs.close()
        self._holds.add(process, held, join_files)
        if adopt:
            self._adoptions.begin(process, adopt, fds.pop(0) if streams is silent and fds else -1)
        self._execs[exec_id] = process
        self._exec_of[exec_id] = container

    def _started(self, exec_id: str, process: Process, fd: int) -> None:
        self._server.unwatch(fd)  # which may be closed here
        if not process.read_sync():
            self._server.watch(fd, lambda: self._started(exec_id, process, fd))
            return
        if process.failure is None and not process.adoption:
            self._runs(exec_id, process)

    def _runs(self, exec_id: str, process: Process) -> None:
        terminal = (process.terminal,) if process.terminal >= 0 else ()
        self._server.send(process.asker, Kind.OK, terminal, re=process.n, pid=process.pid)
        close_all(list(terminal))
        process.terminal = -1
        if process.ended:
            self._announce(exec_id, process)

    def reaped(self, info: Any) -> bool:
        """A child has ended, as waitid(2) tells; whether it was one of these."""
        for exec_id, process in list(self._execs.items()):
            if process.pid == info.si_pid:
                process.end(info)
                self._holds.release(process)
                if process not in self._adoptions:  # else told when the command that made it has ended
                    self._ended(exec_id, process)
                return True
        return False

    def made(self, process: Process) -> None:
        """A runtime's command has made it, or failed."""
        exec_id = next(exec_id for exec_id, one in self._execs.items() if one is process)
        container, adoption, process.adoption = self._exec_of[exec_id], process.adoption, None
        if process.failure is None:
            self._runs(exec_id, process)
            if adoption and adoption.unwanted_by:
                self._end(exec_id)
        else:
            self._ended(exec_id, process)
            if adoption and adoption.unwanted_by:
                self._unnamed.add(container.id)
        others = [one for exec_id, one in self._execs.items() if self._exec_of[exec_id] is container]
        if container.id in self._unnamed and not any(one.adoption for one in others):
            self._unnamed.discard(container.id)
            kill_strays(container.pid, {container.pid, *(one.pid for one in others)}, container.kill_dirs)

    def kill(self, exec_id: str) -> None:
        """SIGKILL to the process and its descendants. Raises OSError."""
        process = self._execs.get(exec_id)
        if process and process.adoption:
            process.adoption.disown()
        elif process and not process.ended:
            directories = self._exec_of[exec_id].kill_dirs
            kill_tree(process.pid, directories)
            process.kill()  # it may not be in its cgroup yet
            cgroup_files.take_out((process.pid,), directories)

    def abandon(self, connection: socket.socket) -> None:
        """Kill what was asked for on a connection that is gone: nobody is left for whom it runs."""
        for exec_id, process in list(self._execs.items()):
            if process.asker is connection:
                self._end(exec_id)

    def _end(self, exec_id: str) -> None:
        try:
            self.kill(exec_id)
        except OSError:  # its container's cgroup is going away, and it with that
            pass

    def _ended(self, exec_id: str, process: Process) -> None:
        while process.sync:
            if process.quiet:
                process.read_sync()
            else:
                self._server.handle(process.sync.fileno())
        if process.failure is not None:
            self._server.send(process.asker, Kind.FAILED, re=process.n, **process.failure)
            self._drop(exec_id)
        else:
            self._announce(exec_id, process)

    def _announce(self, exec_id: str, process: Process) -> None:
        if exec_id in self._execs:
            self._server.tell(Kind.EXEC_EXITED, exec=exec_id, code=process.code, exited_ns=process.exited_ns)
            self._drop(exec_id)

    def _drop(self, exec_id: str) -> None:
        self._execs.pop(exec_id).close()
        del self._exec_of[exec_id]

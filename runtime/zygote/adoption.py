"""Adopting a process that an OCI runtime has made: the runtime's command is the monitor's child, and ends before it.

1. the monitor clones a child that becomes the runtime's command, in a container's stead
2. the command makes the process, writes its pid to a file, sends its terminal if it has one, and ends
3. the kernel gives the process to the monitor, a subreaper; it may have ended by then, so the file is read before
   anything is reaped whose pid may stand in it, and what is reaped before there is a file (crun's process is the
   monitor's at once) is remembered while the command runs

A command is not killed in the middle: what it has made may run in the container and be in no file, session or tree that
tells whose it is. So who doesn't want the process any more has it killed when the command is through. A command that
takes too long is killed all the same: what nobody knows is looked for then (`tree.kill_strays`).
"""

from __future__ import annotations

import os
import signal
import socket
import time

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

    from runtime.zygote.container import Process

_PATIENCE_S: Final = 3.0  # with a command that makes what nobody wants; less than who waits for its end has


class Adoption:
    """A command that runs. `pid_file` is below the open directory `directory`; `listener`, or -1, is the adoption's."""

    __slots__ = ("_directory", "_listener", "_pid_file", "command", "reaped", "runs", "unwanted_by")

    def __init__(self, command: int, directory: int, pid_file: str, listener: int) -> None:
        self.command = command
        self.runs = True
        self.reaped: dict[int, Any] = {}  # by pid, since the command began: as waitid(2) tells
        self.unwanted_by = 0.0  # when the command is killed, if nobody wants what it makes
        self._directory = directory
        self._pid_file = pid_file
        self._listener = listener

    def take(self, process: Process) -> bool:
        """Have `process` stand for what the command has made; whether there is that."""
        if process.pid != self.command:
            return True
        try:
            fd = os.open(self._pid_file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
            try:
                pid = int(os.read(fd, 32))
            finally:
                os.close(fd)
            if pid in self.reaped:
                process.pid = pid
                process.end(self.reaped[pid])
                return True
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError):  # not there yet, not written yet
            return False
        os.close(process.pidfd)
        process.pid, process.pidfd = pid, pidfd
        return True

    def disown(self) -> None:
        """Nobody wants the process."""
        self.unwanted_by = self.unwanted_by or time.monotonic() + _PATIENCE_S

    def kill(self) -> None:
        """End the command, with what it has started and not put elsewhere."""
        if self.runs:
            try:
                os.killpg(self.command, signal.SIGKILL)
            except ProcessLookupError:  # it has no session of its own yet, and nothing started
                pass

    def finish(self, process: Process, info: Any) -> None:
        """The command has ended, and left a process or a failure."""
        self.runs = False
        code = info.si_status if info.si_code == os.CLD_EXITED else info.si_status + 128
        made = self.take(process)  # also where the command was killed after that
        if (code or not made) and process.failure is None:
            process.failure = {"failed": -1, "errno": 0, "detail": f"exit code {code}"}
        if self._listener >= 0:
            with socket.socket(fileno=self._listener) as listener:
                if process.failure is None:
                    process.terminal = _terminal(listener)


class Adoptions:
    """The processes of one pod whose commands run; pid files are below the open directory `directory`."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._processes: list[Process] = []

    def __contains__(self, process: Process) -> bool:
        return process in self._processes

    def begin(self, process: Process, pid_file: str, listener: int) -> None:
        """The process is the command that makes it, and sends its terminal, if it is to have one, to the listener."""
        process.adoption = Adoption(process.pid, self._directory, pid_file, listener)
        self._processes.append(process)

    def end(self) -> None:
        """The pod ends: kill the commands."""
        for process in self._processes:
            if process.adoption:
                process.adoption.kill()

    def expire(self) -> float:
        """Kill the commands that take too long with what nobody wants; seconds until the next is due, -1: none is."""
        due = -1.0
        for process in self._processes:
            if process.adoption and process.adoption.unwanted_by:
                left = process.adoption.unwanted_by - time.monotonic()
                if left <= 0:
                    process.adoption.kill()
                    left = _PATIENCE_S  # it is ending
                due = left if due < 0 else min(due, left)
        return due

    def reap(self) -> Any:
        """A child that has ended or stopped, as waitid(2) tells; None when there is none. Raises ChildProcessError."""
        look = os.WNOWAIT if self._processes else 0
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | look)
        if info and look:
            for process in self._processes:
                if process.adoption:
                    process.adoption.take(process)
                    process.adoption.reaped[info.si_pid] = info
            os.waitid(os.P_PID, info.si_pid, os.WEXITED)
        return info

    def ended(self, pid: int) -> tuple[Process, Adoption] | None:
        """Whose command `pid` was, which has ended: the process is there, or won't be."""
        for process in self._processes:
            if process.adoption and process.adoption.command == pid:
                self._processes.remove(process)
                return process, process.adoption
        return None


def _terminal(listener: socket.socket) -> int:
    """The terminal's master, which the runtime has sent; -1 where it hasn't."""
    try:
        with listener.accept()[0] as connection:
            connection.setblocking(False)
            fds = socket.recv_fds(connection, 4096, 1)[1]
    except OSError:
        return -1
    return fds[0] if fds else -1

"""Adopting a process that an OCI runtime has made: the runtime's command is the monitor's child, and ends before it.

1. the monitor clones a child that becomes the runtime's command, in a container's stead
2. the command makes the process, writes its pid to a file, sends its terminal if it has one, and ends
3. the kernel gives the process to the monitor, a subreaper; it may have ended by then, so the file is read before
   anything is reaped whose pid may stand in it
"""

from __future__ import annotations

import os
import signal
import socket

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any

    from runtime.zygote.container import Process


class Adoption:
    """A command that runs. `pid_file` is below the open directory `directory`; `listener`, or -1, is the adoption's."""

    __slots__ = ("_directory", "_listener", "_pid_file", "command", "runs")

    def __init__(self, command: int, directory: int, pid_file: str, listener: int) -> None:
        self.command = command
        self.runs = True
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
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError):  # not there yet, not written yet
            return False
        os.close(process.pidfd)
        process.pid, process.pidfd = pid, pidfd
        return True

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
        if (code or not self.take(process)) and process.failure is None:
            process.failure = {"failed": -1, "errno": 0, "detail": f"exit code {code}"}
        if self._listener >= 0:
            with socket.socket(fileno=self._listener) as listener:
                if process.failure is None:
                    process.terminal = _terminal(listener)


def _terminal(listener: socket.socket) -> int:
    """The terminal's master, which the runtime has sent; -1 where it hasn't."""
    try:
        with listener.accept()[0] as connection:
            connection.setblocking(False)
            fds = socket.recv_fds(connection, 4096, 1)[1]
    except OSError:
        return -1
    return fds[0] if fds else -1

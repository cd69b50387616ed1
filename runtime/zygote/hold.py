"""Holding those still who could take over a process of crib's before it has become its program.

Threat model: a process that enters a container's pid namespace is crib's until execve, with the host's files in reach.
What has CAP_SYS_PTRACE in there may attach to it, or go through its /proc/PID/root and fd (CVE-2016-9962), however
undumpable it is. So for as long there is nobody to do it:
 1. the monitor freezes the cgroups of containers with that capability, and clones the child, which asks to be traced
 2. the child runs its plan; into a frozen cgroup it does not go by itself, it would be frozen on the way
 3. execve stops it before the program's first instruction (PTRACE_TRACEME); the monitor moves it into its cgroup, lets
    go of it, and thaws the others
"""

from __future__ import annotations

import os
import signal
import time
from errno import EBUSY, ENODEV, ENOENT, ESRCH

from runtime.cgroup import files
from runtime.linux.lib import SyscallError
from runtime.linux.process import PTRACE_CONT, PTRACE_DETACH, ptrace

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

    from runtime.zygote.container import Container, Process
    from runtime.zygote.podspace import PodSpace

_FREEZE_TIMEOUT_S: Final = 1.0
LIMIT_S: Final = 10.0
"""How long a child may keep others frozen: it is killed then. (Its program may be on a file system that they serve.)"""


def freeze(containers: list[Container]) -> None:
    """Stop all processes of the containers until `thaw`; they are counted. Raises OSError, and holds nobody then."""
    for number, container in enumerate(containers):
        try:
            if container.holds == 0 and not _set(container, frozen=True):
                raise SyscallError("freeze", EBUSY, f"container {container.id}")
        except OSError:
            _set(container, frozen=False)
            thaw(containers[:number])
            raise
        container.holds += 1


def thaw(containers: list[Container]) -> None:
    """Undo `freeze`, once for each time."""
    for container in containers:
        container.holds -= 1
        if container.holds == 0:
            _set(container, frozen=False)


def _set(container: Container, *, frozen: bool) -> bool:
    """Whether it is so in time. A cgroup that is gone holds nobody who could run."""
    for directory in container.kill_dirs:
        try:
            if os.path.exists(f"{directory}/cgroup.freeze"):
                return files.set_v2_freezer(directory, frozen, _FREEZE_TIMEOUT_S)
            if os.path.exists(f"{directory}/freezer.state"):
                return files.set_v1_freezer(directory, "FROZEN" if frozen else "THAWED", _FREEZE_TIMEOUT_S)
        except OSError as error:
            if error.errno in (ENOENT, ENODEV):
                return True
            raise
    return not frozen or not any(map(os.path.exists, container.kill_dirs))


def _stopped(process: Process, number: int) -> None:
    """A traced child has stopped for the signal `number`: at SIGTRAP it has become its program. Thaws nobody."""
    try:
        if number != signal.SIGTRAP:
            ptrace(PTRACE_CONT, process.pid, number)
            return
        try:
            for name in process.join_files:
                files.write(name, str(process.pid))
        except OSError:  # its cgroup is gone, and it may not run outside
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
            return
        ptrace(PTRACE_DETACH, process.pid)
    except SyscallError as error:
        if error.errno != ESRCH:  # killed meanwhile
            raise


class Holds:
    """The children for whose sake containers are frozen now."""

    def __init__(self) -> None:
        self._processes: list[Process] = []

    def clone(
        self, space: PodSpace, held: list[Container], pid_ns: int, flags: int, cgroup_dir: str
    ) -> tuple[int, int]:
        """`PodSpace.clone` of a child for whose sake these containers are frozen, and which then has to be traced.

        Raises OSError, and holds nobody then.
        """
        freeze(held)
        try:
            pid, pidfd = space.clone(pid_ns, flags, cgroup_dir)
        except OSError:
            thaw(held)
            raise
        return pid, pidfd

    def add(self, process: Process, held: list[Container], join_files: tuple[str, ...]) -> None:
        """Remember whom the child holds, and what takes it into its cgroup once it has become its program."""
        if held:
            process.held, process.join_files = held, join_files
            process.hold_until = time.monotonic() + LIMIT_S
            self._processes.append(process)

    def release(self, process: Process) -> None:
        """The child has become its program, or ended."""
        if process in self._processes:
            self._processes.remove(process)
            thaw(process.held)
            process.held = []

    def stopped(self, pid: int, number: int) -> None:
        """The child `pid` has stopped for the signal `number`."""
        for process in self._processes:
            if process.pid == pid:
                _stopped(process, number)
                if number == signal.SIGTRAP:
                    self.release(process)
                return

    def expire(self) -> float:
        """Kill what holds others for too long; seconds until that is due for the next, -1 where there is none."""
        if not self._processes:
            return -1
        now = time.monotonic()
        for process in self._processes:
            if process.hold_until <= now:
                process.hold_until = now + LIMIT_S
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        return min(process.hold_until for process in self._processes) - now

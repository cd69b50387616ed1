"""Reading and writing cgroup files, joining a cgroup and killing one.

Also used by monitors and by containers' first processes: standard library only, and no path but the given ones.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Final

_READ_BYTES: Final = 64 * 1024
KILL_TIMEOUT_S: Final = 2.0
_FREEZE_TIMEOUT_S: Final = 0.5


def read(path: str) -> str:
    """The content of a cgroup file. Raises OSError; ENODEV where the cgroup is removed meanwhile."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, _READ_BYTES):
            parts.append(part)
        return b"".join(parts).decode()
    finally:
        os.close(fd)


def write(path: str, *values: str) -> None:
    """Write each value with a write(2) of its own: the kernel takes one setting per call. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for value in values:
            os.write(fd, value.encode())
    finally:
        os.close(fd)


def join(files: Iterable[str]) -> None:
    """Move the calling thread's process into the cgroups whose `join_files` these are. Raises OSError."""
    for file in files:
        write(file, "0")


def oom_kills(file: str) -> int:
    """How many processes the OOM killer has ended, by a `memory_events` file; 0 where it's gone."""
    try:
        text = read(file)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return 0
        raise
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "oom_kill":
            return int(value)
    return 0


def procs(directory: str) -> list[int]:
    """The processes of a cgroup and of all below it; empty where it's gone. Raises OSError."""
    found: list[int] = []
    for cgroup in tree(directory):
        try:
            found += map(int, read(f"{cgroup}/cgroup.procs").split())
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                raise
    return found


def leaf(directory: str, path: str, pid: int) -> str:
    """The v2 directory that one more process of a container can go to: where its process `pid` is.

    A container that makes cgroups below its own, at `path`, has no processes in that itself any more, and may not.
    """
    try:
        lines = read(f"/proc/{pid}/cgroup").splitlines()
    except OSError:  # it has just ended
        return directory
    below = next((line.partition(path)[2] for line in lines if line.startswith("0::")), "")
    return directory + below.removesuffix(" (deleted)")


def tree(directory: str) -> Iterator[str]:
    """The cgroup directory and all below it, outermost first; nothing where it's gone."""
    pending = [directory]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                continue
            raise
        yield current
        pending += below


def kill(directories: Sequence[str], timeout_s: float = KILL_TIMEOUT_S) -> None:
    """SIGKILL for every process of a cgroup, given its directories (one on v2, one per hierarchy on v1).

    What forks meanwhile is hit as well. Returns when the signals are sent, on v1 when nothing new turns up; missing
    directories are fine. Raises TimeoutError when on v1 processes keep appearing, OSError for what the kernel refuses.
    """
    for directory in directories:
        if _write_if_there(f"{directory}/cgroup.kill", "1"):
            return
    for directory in directories:
        if os.path.exists(f"{directory}/freezer.state"):
            _kill_frozen(directory, time.monotonic() + timeout_s)
            return
    for directory in directories[:1]:
        _kill_until_empty(directory, time.monotonic() + timeout_s)


def set_v1_freezer(directory: str, state: str, timeout_s: float) -> bool:
    """Write FROZEN or THAWED into a v1 freezer and wait until it is so; False when it isn't in time. Raises OSError.

    A process that is being frozen in an uninterruptible wait, or that forks just then, needs the state written again.
    """
    file = f"{directory}/freezer.state"
    deadline = time.monotonic() + timeout_s
    while True:
        write(file, state)
        if read(file).strip() == state:
            return True
        if time.monotonic() > deadline:
            return False
        _pause_ms(1)


def set_v2_freezer(directory: str, frozen: bool, timeout_s: float) -> bool:
    """Write cgroup.freeze and wait until cgroup.events agrees; False when it doesn't in time. Raises OSError."""
    wanted = f"frozen {int(frozen)}"
    deadline = time.monotonic() + timeout_s
    events = os.open(f"{directory}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        write(f"{directory}/cgroup.freeze", str(int(frozen)))
        while wanted not in os.pread(events, _READ_BYTES, 0).decode().splitlines():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            poll.poll(left_s * 1000)
        return True
    finally:
        os.close(events)


def take_out(pids: Iterable[int], directories: Sequence[str]) -> None:
    """Let processes with a SIGKILL on its way die where somebody has frozen their v1 cgroup, and leave the rest to him.

    They are moved to the nearest cgroup above that isn't frozen; with v2 nothing has to be done. Raises OSError.
    """
    for directory in directories:
        above = directory
        while _is_frozen(above):
            above = os.path.dirname(above)
        for pid in pids if above != directory else ():
            try:
                write(f"{above}/cgroup.procs", str(pid))
            except ProcessLookupError:
                continue


def _is_frozen(directory: str) -> bool:
    try:
        return read(f"{directory}/freezer.state").strip() != "THAWED"
    except OSError as error:  # not v1, the root of all, or gone
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return False


def _kill_frozen(directory: str, deadline: float) -> None:
    """Freeze, signal all, thaw: a frozen process can't fork, and dies when it is thawed."""
    try:
        while True:
            # Where freezing doesn't succeed (a process waits for a dead disk), passes repeat until nothing is new.
            frozen = set_v1_freezer(directory, "FROZEN", _FREEZE_TIMEOUT_S)
            _signal_all(directory)
            for cgroup in tree(directory):
                # One that was frozen by itself stays frozen when its parent is thawed.
                _write_if_there(f"{cgroup}/freezer.state", "THAWED")
            if _is_frozen(directory):  # as one above is
                take_out(procs(directory), (directory,))
            if frozen or not _living(directory):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes keep appearing in cgroup {directory} while it is killed")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def _kill_until_empty(directory: str, deadline: float) -> None:
    while _signal_all(directory):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes keep appearing in cgroup {directory} while it is killed")
        _pause_ms(1)


def _signal_all(directory: str) -> int:
    """Send SIGKILL to the cgroup's processes; returns how many there were. A reused number is never hit:

    what is in the cgroup after the pidfd was opened, by number, is what the pidfd refers to (or that one is dead).
    """
    pidfds: dict[int, int] = {}
    try:
        for pid in procs(directory):
            if pid == 0:  # of a pid namespace that this process can't see
                continue
            try:
                pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                pass
        members = set(procs(directory))
        for pid, pidfd in pidfds.items():
            if pid in members:
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        return len(members)
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)


def _living(directory: str) -> bool:
    """Whether the cgroup holds a process without a SIGKILL on its way."""
    for pid in procs(directory):
        try:
            status = read(f"/proc/{pid}/status")
        except OSError:
            continue
        pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
        if not any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending):
            return True
    return False


def _write_if_there(path: str, value: str) -> bool:
    try:
        write(path, value)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return False
    return True


def _pause_ms(duration_ms: int) -> None:
    """The v1 freezer announces nothing that one could wait for."""
    select.poll().poll(duration_ms)

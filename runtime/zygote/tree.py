"""Killing one exec'd process with all that descends from it, inside a container that goes on."""

from __future__ import annotations

import os
import signal

from runtime.cgroup.files import procs, take_out

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

_PASSES: Final = 64


def kill_tree(root: int, directories: tuple[str, ...]) -> None:
    """SIGKILL the process `root`, its descendants, and whoever shares a session with one, in the container's cgroup.

    `root` itself may be outside. They are stopped first, and killed when a pass over the cgroup finds no more of them:
    what is stopped doesn't fork, and a parent that is dead can't be told any more. What daemonized before still has the
    session, unless it made a new one and its parent has gone.
    """
    known: dict[int, int] = {}
    if stat := _stat(root):
        known[root] = stat[3]
        _signal(root, stat[3], signal.SIGSTOP)
    tree = {root}
    for _ in range(_PASSES):
        members = _members(directories)
        for pid, (parent, session, _) in members.items():
            if parent in tree or session in tree:
                tree.add(pid)
        fresh = [pid for pid in members if pid in tree and pid not in known]
        for pid in fresh:
            known[pid] = members[pid][2]
            _signal(pid, known[pid], signal.SIGSTOP)
        if not fresh:
            break
    for pid, born in known.items():
        _signal(pid, born, signal.SIGKILL)
    take_out(known, directories)


def kill_strays(first: int, known: set[int], directories: tuple[str, ...]) -> None:
    """Kill with their trees this process's children in a container, whose first process is `first`, but the known ones.

    None of them is the container's own: its orphans go to the first process of its pid namespace. One in the namespace
    of this process has its orphans here, and is left alone.
    """
    try:
        if os.stat(f"/proc/{first}/ns/pid").st_ino == os.stat("/proc/self/ns/pid").st_ino:
            return
    except OSError:  # it has ended
        return
    for pid, (parent, _, _) in _members(directories).items():
        if parent == os.getpid() and pid not in known:
            kill_tree(pid, directories)


def _members(directories: tuple[str, ...]) -> dict[int, tuple[int, int, int]]:
    """(parent, session, time of birth) by pid of the container's live processes, parents first as far as pids tell."""
    found = {}
    for pid in sorted(procs(directories[0])) if directories else ():
        stat = _stat(pid)
        if stat and stat[0] != "Z":
            found[pid] = stat[1:]
    return found


def _stat(pid: int) -> tuple[str, int, int, int] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19])


def _signal(pid: int, born: int, number: int) -> None:
    """Signal by pidfd, checked to be the process that was seen: a pid may have been used again.

    Its birth tells: its session and its parent may be others by now.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        stat = _stat(pid)
        if stat and stat[3] == born:
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)

"""Killing one exec'd process with all that descends from it, inside a container that goes on."""

from __future__ import annotations

import os
import signal

from runtime.cgroup.files import procs

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

_PASSES: Final = 64


def kill_tree(root: int, directories: tuple[str, ...]) -> None:
    """SIGKILL the process `root`, its descendants, and whoever shares a session with one, in the container's cgroup.

    They are stopped first, and killed when a pass over the cgroup finds no more of them: what is stopped doesn't fork,
    and a parent that is dead can't be told any more. What daemonized before still has the session, unless it made a
    new one and its parent has gone.
    """
    known: dict[int, tuple[int, int]] = {}
    tree = {root}
    for _ in range(_PASSES):
        members = _members(directories)
        for pid, (parent, session) in members.items():
            if parent in tree or session in tree:
                tree.add(pid)
        fresh = [pid for pid in members if pid in tree and pid not in known]
        for pid in fresh:
            known[pid] = members[pid]
            _signal(pid, members[pid], signal.SIGSTOP)
        if not fresh:
            break
    for pid, seen in known.items():
        _signal(pid, seen, signal.SIGKILL)


def _members(directories: tuple[str, ...]) -> dict[int, tuple[int, int]]:
    """(parent, session) by pid of the container's live processes, parents before children as far as pids tell."""
    found = {}
    for pid in sorted(procs(directories[0])) if directories else ():
        stat = _stat(pid)
        if stat and stat[0] != "Z":
            found[pid] = (stat[1], stat[2])
    return found


def _stat(pid: int) -> tuple[str, int, int] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, parent, _, session = file.read().rpartition(b")")[2].split()[:4]
    except OSError:
        return None
    return state.decode(), int(parent), int(session)


def _signal(pid: int, seen: tuple[int, int], number: int) -> None:
    """Signal by pidfd, checked to be the process that was seen: a pid may have been used again."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        stat = _stat(pid)
        if stat and stat[2] == seen[1]:
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)

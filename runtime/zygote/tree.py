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
    """SIGKILL the process `root`, its descendants, and whoever shares its session, within the container's cgroup.

    What daemonized has a parent of its own by now but still the session, unless it made a new one while an ancestor
    lived: passes repeat until one finds nothing new, so a tree that grows meanwhile is caught as well.
    """
    known = {root}
    for _ in range(_PASSES):
        members = _members(directories)
        grown = set(known)
        for pid, (parent, session) in members.items():
            if parent in grown or session in grown:
                grown.add(pid)
        fresh = [pid for pid in grown if pid in members]
        for pid in fresh:
            _kill(pid, members[pid])
        if grown == known and not fresh:
            return
        known = grown


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


def _kill(pid: int, seen: tuple[int, int]) -> None:
    """Signal by pidfd, checked to be the process that was seen: a pid may have been used again."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        stat = _stat(pid)
        if stat and stat[2] == seen[1]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)

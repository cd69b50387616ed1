"""Where a process that doesn't answer waits in the kernel: for the message that says so."""

from __future__ import annotations

import os


def waits(pid: int) -> str:
    """One phrase per thread of the process, and of its children that have no name: crib's own, on their way to execve.

    `crib-monitor 12 S in ep_poll, system call 232; its child 15 S in futex_wait, system call 202`: states and wait
    channels are proc(5)'s. Reads nothing that could wait for the process; empty once that is gone.
    """
    told = _threads(pid)
    for thread in _entries(pid):
        for child in _read(f"/proc/{pid}/task/{thread}/children").split():
            if not _read(f"/proc/{child}/comm").strip():
                told += [f"its child {phrase}" for phrase in _threads(int(child))]
    return "; ".join(told)


def _threads(pid: int) -> list[str]:
    found = []
    for thread in _entries(pid):
        where = f"/proc/{pid}/task/{thread}"
        call = _read(f"{where}/syscall").split(" ", 1)[0].strip()
        if fields := _read(f"{where}/stat"):
            state = fields.rpartition(")")[2].split()[0]
            who = f"{_read(f'{where}/comm').strip()} {thread}".strip()
            channel = _read(f"{where}/wchan")
            found.append(f"{who} {state} in {channel}" + (f", system call {call}" if call.isdigit() else ""))
    return found


def _entries(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return []


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(4096)
    except OSError:  # it has gone, or this kernel doesn't tell
        return ""

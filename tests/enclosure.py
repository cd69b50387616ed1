"""The enclosure of root tests: mount and network namespaces of their own, and a process that adopts what they leave.

What a test mounts, or adds to the network, nobody else sees, and it goes with the tests even if they are killed.
Every process that a test starts stays a descendant of one process, so that a leaked one is found, and is killed at
the end. Process ids, cgroups and the file system are the host's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000

_refusal: str | None = "the tests were not enclosed"


def refusal() -> str | None:
    """Why this process could not be enclosed, None when it is."""
    return _refusal


def enter() -> None:
    """Enclose this process, which must have no second thread; it goes on as a child of the one it was."""
    global _refusal
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET) != 0:
        _refusal = f"unshare: {os.strerror(ctypes.get_errno())}"
        return
    # Nothing goes out to the host's mounts or comes in from there (the pins of a cribd outside would look like leaks);
    # within all is shared, as systemd has it on a node.
    commands = ["mount --make-rprivate /", "mount --make-rshared /", "mkdir -p /run/netns"]
    commands += ["mount -t tmpfs -o mode=755 tmpfs /run/netns", "mount --make-rshared /run/netns", "ip link set lo up"]
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            _refusal = f"{command}: {done.stderr.strip()}"
            return
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if child := os.fork():  # noqa: TID251
        _reap(child)
    _refusal = None


def descendants() -> dict[int, str]:
    """All processes of the enclosure but this one: pid to "state command line"."""
    return _descendants(os.getppid(), {os.getpid()})


def _descendants(ancestor: int, but: set[int]) -> dict[int, str]:
    children: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            comm, _, fields = (entry / "stat").read_text().rpartition(")")
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = fields.split()[:2]
        children.setdefault(int(parent), []).append(int(entry.name))
        texts[int(entry.name)] = f"{state} {line or comm.partition('(')[2]}"
    found: dict[int, str] = {}
    ahead = [ancestor]
    while ahead:
        for pid in children.get(ahead.pop(), []):
            if pid not in but:
                found[pid] = texts[pid]
            ahead.append(pid)
    return found


def _reap(child: int) -> None:
    """Adopt and reap until `child` ends, kill what it left, and end as it did."""
    # The terminal's signals reach the child by themselves; one meant for the process that was started is passed on.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: os.kill(child, received))
    status: int | None = None
    try:
        while True:
            pid, ended = os.wait()
            if pid == child:
                status = ended
            if status is not None:
                _kill_descendants()
    except ChildProcessError:
        code = os.waitstatus_to_exitcode(status or 0)
        os._exit(code if code >= 0 else 128 - code)


def _kill_descendants() -> None:
    for pid in _descendants(os.getpid(), set()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue

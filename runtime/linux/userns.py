"""User namespaces: made for their mapping, or for a pod with the namespaces that they own."""

from __future__ import annotations

import os
import signal

from runtime.linux.namespaces import CLONE
from runtime.linux.process import clone3, set_identity

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

    Maps = tuple[tuple[int, int, int], ...]  # (first id inside, first id outside, how many)

_NEWUSER: Final = int(CLONE.NEWUSER)


def mapped(number: int, maps: Maps) -> int:
    """The id outside of the id `number` inside, itself without a mapping; 65534 where a mapping hasn't got it."""
    if not maps:
        return number
    for inside, outside, count in maps:
        if inside <= number < inside + count:
            return outside + number - inside
    return 65534


def write_maps(pid: int, uids: Maps, gids: Maps) -> None:
    """Give the new user namespace of process `pid` its mapping. Raises OSError."""
    for name, maps in (("uid_map", uids), ("gid_map", gids)):
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, "".join(f"{inside} {outside} {count}\n" for inside, outside, count in maps).encode())
        finally:
            os.close(fd)


def become_root() -> None:
    """Be uid and gid 0 of the user namespace that this process has just entered, with no other groups."""
    set_identity(0, 0)


def _visible(pidfd: int) -> int:
    """The pid that /proc knows a process by: it may be of another pid namespace than this process's."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def make(uids: Maps, gids: Maps) -> int:
    """A new user namespace without processes, for its mapping alone. Raises OSError."""
    wait, go = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = clone3(_NEWUSER)
        if pid == 0:
            os.close(go)
            os.read(wait, 1)
            os._exit(0)
        try:
            visible = _visible(pidfd)
            write_maps(visible, uids, gids)
            return os.open(f"/proc/{visible}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            os.waitpid(pid, 0)
    finally:
        os.close(wait)
        os.close(go)

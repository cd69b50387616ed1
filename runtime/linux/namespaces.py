"""Namespaces: unshare(2) and setns(2)."""

from enum import IntFlag

from runtime.linux.lib import check, function


class CLONE(IntFlag):
    """Flags of clone3(2), unshare(2) and setns(2)."""

    THREAD = 0x00010000
    NEWNS = 0x00020000
    NEWCGROUP = 0x02000000
    NEWUTS = 0x04000000
    NEWIPC = 0x08000000
    NEWUSER = 0x10000000
    NEWPID = 0x20000000
    NEWNET = 0x40000000
    PARENT = 0x00008000
    PIDFD = 0x00001000
    CLEAR_SIGHAND = 0x100000000
    INTO_CGROUP = 0x200000000


# The OCI name of each namespace and its file below /proc/PID/ns.
FLAGS = {
    "mount": CLONE.NEWNS,
    "cgroup": CLONE.NEWCGROUP,
    "uts": CLONE.NEWUTS,
    "ipc": CLONE.NEWIPC,
    "user": CLONE.NEWUSER,
    "pid": CLONE.NEWPID,
    "network": CLONE.NEWNET,
}


_unshare = function("unshare", 1)
_setns = function("setns", 2)


def unshare(flags: int) -> None:
    """unshare(2). Raises SyscallError."""
    check("unshare", _unshare(flags))


def setns(fd: int, flags: int) -> None:
    """setns(2): `fd` is a namespace or, with several flags, a pidfd. Raises SyscallError."""
    check("setns", _setns(fd, flags))

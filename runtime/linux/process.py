"""Processes: clone3, pidfds, prctl, keyrings, descriptors at exec, execve itself."""

from __future__ import annotations

import ctypes
import os
import signal
import struct

from runtime.linux.lib import NR, SyscallError, check, function, syscall, syscall_with_gil
from runtime.linux.namespaces import CLONE

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_SET_NAME: Final = 15
PR_CAPBSET_DROP: Final = 24
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_SECUREBITS: Final = 28
PR_SET_TIMERSLACK: Final = 29
PR_SET_NO_NEW_PRIVS: Final = 38
PR_SET_THP_DISABLE: Final = 41
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
PTRACE_TRACEME: Final = 0
PTRACE_CONT: Final = 7
PTRACE_DETACH: Final = 17

CLOSE_RANGE_CLOEXEC: Final = 4
KEYCTL_JOIN_SESSION_KEYRING: Final = 1
SIGCHLD: Final = 17
_prctl: Final = function("prctl", 5)
_ptrace: Final = function("ptrace", 4)
_personality: Final = function("personality", 1)
_execve: Final = function("execve", 3)
_PIDFD: Final = int(CLONE.PIDFD)
_PARENT: Final = int(CLONE.PARENT)
_INTO_CGROUP: Final = int(CLONE.INTO_CGROUP)


def prctl(option: int, first: int = 0, second: int = 0) -> int:
    """prctl(2) with up to two numeric arguments. Raises SyscallError."""
    result: int = _prctl(option, first, second, 0, 0)
    return result if result != -1 else check("prctl", result)


def die_with(parent: int) -> None:
    """Be killed when the thread that has started this process ends; `parent` is its process, which may be gone."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def ptrace(request: int, pid: int = 0, number: int = 0) -> None:
    """ptrace(2) for requests without an address; `number` is the signal of PTRACE_CONT. Raises SyscallError."""
    check("ptrace", _ptrace(request, pid, 0, number))


_title_area: list[int] = []  # first and last address, found once: a forked process has it in the same place


def set_title(title: bytes) -> bytes:
    """The command line that `ps` shows for this process, and its first word as the process's name.

    Returns the command line that it was. Overwrites the argument area in place (/proc/[pid]/stat, arg_start and
    arg_end), so that a title is cut to the room that the first one took, and a name to 15 bytes.
    """
    check("prctl", _prctl(PR_SET_NAME, title.partition(b" ")[0][:15], 0, 0, 0))
    if not _title_area:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        _title_area.extend((int(fields[45]), int(fields[46])))
    start, end = _title_area
    if not 0 < start < end:
        return b""
    before = ctypes.string_at(start)
    text = title[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))
    return before


def clone3(flags: int, cgroup: int = -1, path: str = "") -> tuple[int, int]:
    """clone3(2) like fork, with a pidfd: returns (pid, pidfd), or (0, -1) in the child. Raises SyscallError.

    `cgroup` is a descriptor of the cgroup v2 directory `path` for CLONE_INTO_CGROUP, or -1. With CLONE_PARENT the child
    is this process's sibling. Only for a process with one thread that runs Python: none of the interpreter's nor of the
    C library's after-fork work is done in the child.
    """
    pidfd = ctypes.c_int(-1)
    flags |= _PIDFD | (_INTO_CGROUP if cgroup >= 0 else 0)
    end = 0 if flags & _PARENT else SIGCHLD  # a sibling's end is signalled as this process's own will be
    args = struct.pack("11Q", flags, ctypes.addressof(pidfd), 0, 0, end, 0, 0, 0, 0, 0, max(cgroup, 0))
    pid: int = syscall_with_gil(NR["clone3"], args, len(args))
    if pid == -1:
        raise SyscallError("clone3", ctypes.get_errno(), path or None)
    return (pid, pidfd.value) if pid else (0, -1)


def close_range(first: int, last: int, flags: int = 0) -> None:
    """close_range(2), both ends included. Raises SyscallError."""
    syscall("close_range", first, last, flags)


def close_all_but(keep: tuple[int, ...]) -> None:
    """Close every descriptor that is not in `keep`."""
    start = 0
    for fd in sorted(set(keep)):
        if fd > start:
            close_range(start, fd - 1)
        start = fd + 1
    close_range(start, 0xFFFFFFFF)


def set_identity(uid: int, gid: int, groups: tuple[int, ...] = ()) -> None:
    """Real, effective and saved user and group, and the other groups, of this process's one thread. Raises OSError.

    Not by the C library's functions, and so not by os.setresuid: they wait for all threads that the library knows of,
    and a child that clone3 made knows of its parent's (see `runtime.linux.aio`). Where one of those was being made or
    was ending at that moment the child would wait for ever.
    """
    syscall("setgroups", len(groups), struct.pack(f"{len(groups)}I", *groups))
    syscall("setresgid", gid, gid, gid)
    syscall("setresuid", uid, uid, uid)


def set_effective_user(uid: int) -> None:
    """The effective user alone, of this thread, as `set_identity` does it. Raises OSError."""
    syscall("setresuid", -1, uid, -1)


def join_session_keyring() -> None:
    """Join a new anonymous session keyring. Raises SyscallError."""
    syscall("keyctl", KEYCTL_JOIN_SESSION_KEYRING, None)


_IOPRIO_WHO_PROCESS: Final = 1
_CPUS: Final = os.sysconf("SC_NPROCESSORS_CONF")
SCHEDULING: Final[tuple[tuple[str, tuple[Any, ...]], ...]] = (
    ("sched_setaffinity", (0, (_CPUS + 63) // 64 * 8, ((1 << _CPUS) - 1).to_bytes((_CPUS + 63) // 64 * 8, "little"))),
    ("sched_setscheduler", (0, os.SCHED_OTHER, bytes(4))),
    ("setpriority", (os.PRIO_PROCESS, 0, 0)),
    ("ioprio_set", (_IOPRIO_WHO_PROCESS, 0, 0)),
)
_TIMERSLACK_NS: Final = 50_000
_COREDUMP_FILTER: Final = b"0x33"  # core(5): the kernel's own default


def default_scheduling() -> None:
    """Any processor and memory node, nice 0, SCHED_OTHER, no I/O priority: what a service manager gave cribd is not
    for containers, whose cgroup says what they may use. Raises OSError.
    """
    for name, arguments in SCHEDULING:  # as data: a child runs this once, and code is slow then (see `rehearsal`)
        syscall(name, *arguments)
    try:
        syscall("set_mempolicy", 0, None, 0)
    except SyscallError:  # a kernel without NUMA
        pass


def default_policy() -> None:
    """SCHED_OTHER, whatever cribd itself was given. Raises OSError."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def default_attributes() -> None:
    """Reset what passes from parent to child and through execve, and nobody sees: ignored and blocked signals, secure
    bits, timer slack, personality, huge pages, what a core dump holds. Raises OSError.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # which Python ignores
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    prctl(PR_SET_TIMERSLACK, _TIMERSLACK_NS)  # 0 would be what the parent had
    check("personality", _personality(0))
    for option in (PR_SET_SECUREBITS, PR_SET_THP_DISABLE):
        try:
            prctl(option, 0)
        except SyscallError:  # not permitted, or not in this kernel: then it isn't set either
            pass
    try:
        with open("/proc/self/coredump_filter", "wb", buffering=0) as file:
            file.write(_COREDUMP_FILTER)
    except FileNotFoundError:  # a kernel without core dumps
        pass


class Exec:
    """An execve whose arguments are encoded and allocated beforehand, so that `run` is a single system call."""

    def __init__(self, path: str, args: tuple[str, ...], env: tuple[str, ...]) -> None:
        self.path, self.name = os.fsencode(path), args[0]
        self._args = (ctypes.c_char_p * (len(args) + 1))(*[os.fsencode(arg) for arg in args], None)
        self._env = (ctypes.c_char_p * (len(env) + 1))(*[os.fsencode(item) for item in env], None)

    def run(self) -> int:
        """Replace this process; returns errno if the kernel refuses."""
        _execve(self.path, ctypes.byref(self._args), ctypes.byref(self._env))
        return ctypes.get_errno()

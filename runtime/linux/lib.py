"""The one loader of the C library, and how a system call's failure becomes an exception."""

from __future__ import annotations

import ctypes
import os
from errno import EINTR

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

# System calls without a wrapper in every libc we meet. Numbers from 424 on are the same on every machine.
_COMMON: Final[dict[str, int]] = {
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "mount_setattr": 442,
}
_BY_MACHINE: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        "write": 1,
        "close": 3,
        "execve": 59,
        "chdir": 80,
        "fchdir": 81,
        "umask": 95,
        "setsid": 112,
        "setgroups": 116,
        "setresuid": 117,
        "setresgid": 119,
        "capset": 126,
        "setpriority": 141,
        "sched_setscheduler": 144,
        "pivot_root": 155,
        "prctl": 157,
        "sched_setaffinity": 203,
        "set_mempolicy": 238,
        "keyctl": 250,
        "ioprio_set": 251,
        "openat": 257,
        "faccessat": 269,
        "dup3": 292,
        "prlimit64": 302,
        "setns": 308,
        "seccomp": 317,
        "bpf": 321,
    },
    "aarch64": {
        "dup3": 24,
        "ioprio_set": 30,
        "pivot_root": 41,
        "faccessat": 48,
        "chdir": 49,
        "fchdir": 50,
        "openat": 56,
        "close": 57,
        "write": 64,
        "capset": 91,
        "sched_setscheduler": 119,
        "sched_setaffinity": 122,
        "setpriority": 140,
        "setresuid": 147,
        "setresgid": 149,
        "setsid": 157,
        "setgroups": 159,
        "umask": 166,
        "prctl": 167,
        "keyctl": 219,
        "execve": 221,
        "set_mempolicy": 237,
        "prlimit64": 261,
        "setns": 268,
        "seccomp": 277,
        "bpf": 280,
    },
}


def numbers(machine: str) -> dict[str, int]:
    """System call numbers of `machine` (what `uname -m` prints). Raises KeyError for one that crib does not know."""
    return {**_COMMON, **_BY_MACHINE[machine]}


NR: Final = numbers(os.uname().machine)

libc: Final = ctypes.CDLL(None, use_errno=True)


def function(name: str, arguments: int, library: ctypes.CDLL = libc, result: type[Any] = ctypes.c_int) -> Any:
    """The C function `name`; its arguments are whole numbers, bytes, None or `byref(…)`, each passed as a machine word.

    Numbers as words, not as ctypes objects that Python code would have to make: that is time on each start.
    """
    bound = library[name]
    bound.argtypes = (ctypes.c_void_p,) * arguments
    bound.restype = result
    return bound


call: Final = function("syscall", 7, result=ctypes.c_long)
# Holds the GIL during the call: for clone3, whose child must find it held by itself.
syscall_with_gil: Final = function("syscall", 3, ctypes.PyDLL(None, use_errno=True), ctypes.c_long)
_PADDING: Final = (0, 0, 0, 0, 0, 0)


class SyscallError(OSError):
    """A system call failed; `call` names it. errno, strerror and filename as in any OSError."""

    def __init__(self, call: str, errno: int, path: str | None = None) -> None:
        super().__init__(errno, os.strerror(errno), path)
        self.call = call

    def __str__(self) -> str:
        where = f" {self.filename}" if self.filename else ""
        return f"{self.call}{where}: {(self.strerror or '').lower()}"


def syscall(name: str, *args: Any, path: str | None = None) -> int:
    """Make the system call `name`; EINTR is retried. `path` only explains a failure. Raises SyscallError."""
    nr = NR[name]
    padding = _PADDING[len(args) :]
    while True:
        result: int = call(nr, *args, *padding)
        if result != -1:
            return result
        errno = ctypes.get_errno()
        if errno != EINTR:
            raise SyscallError(name, errno, path)


def failure(number: int) -> SyscallError:
    """What the system call that `call` was just asked for has failed with."""
    return SyscallError(next(name for name in NR if NR[name] == number), ctypes.get_errno())


def placed(data: bytes) -> tuple[Any, int]:
    """A buffer with these bytes and a NUL, and its address, which is good while that is kept."""
    buffer = ctypes.create_string_buffer(data)
    return buffer, ctypes.addressof(buffer)


def check(call: str, result: int, path: str | None = None) -> int:
    """The result of a C function that returns -1 and sets errno. Raises SyscallError."""
    if result == -1:
        raise SyscallError(call, ctypes.get_errno(), path)
    return result


def byref(value: Any) -> Any:
    """A pointer to a ctypes value, for an argument of `syscall`."""
    return ctypes.byref(value)

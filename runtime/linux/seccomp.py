"""Loading a seccomp filter that was compiled beforehand."""

from __future__ import annotations

import ctypes

from runtime.linux.lib import syscall

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

SECCOMP_SET_MODE_FILTER: Final = 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class Filter:
    """A filter in memory, so that `load` is a single system call. `bpf` is an array of struct sock_filter."""

    def __init__(self, bpf: bytes) -> None:
        if not bpf or len(bpf) % 8:
            raise ValueError(f"seccomp program of {len(bpf)} bytes")
        self._buffer = ctypes.create_string_buffer(bpf, len(bpf))
        self._program = _Program(len(bpf) // 8, ctypes.addressof(self._buffer))
        self.address = ctypes.addressof(self._program)

    def load(self, flags: int = 0) -> int:
        """seccomp(2) SET_MODE_FILTER: needs no_new_privs or CAP_SYS_ADMIN. Returns the listener if `flags` ask for one.

        Raises SyscallError.
        """
        return syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(self._program))

"""libseccomp.so.2, as far as compiling a filter to BPF needs it. Nothing is loaded into the kernel here.

Source: seccomp_init(3) and the pages beside it; the constants are those of seccomp.h, which are part of its ABI.
"""

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

KILL_PROCESS: Final = 0x80000000
KILL_THREAD: Final = 0x00000000
TRAP: Final = 0x00030000
ERRNO: Final = 0x00050000  # | errno
TRACE: Final = 0x7FF00000  # | data
LOG: Final = 0x7FFC0000
ALLOW: Final = 0x7FFF0000

X86_64: Final = 0xC000003E
X86: Final = 0x40000003
X32: Final = 0x4000003E
AARCH64: Final = 0xC00000B7
ARM: Final = 0x40000028

NE, LT, LE, EQ, GE, GT, MASKED_EQ = range(1, 8)

_ACT_BADARCH, _OPTIMIZE = 2, 8
_TREE = 2  # SCMP_FLTATR_CTL_OPTIMIZE: a binary tree of the call numbers; half the time of the linear filter
_UNKNOWN = -1  # __NR_SCMP_ERROR


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class LibraryError(OSError):
    """A function of libseccomp failed; `call` names it."""

    def __init__(self, call: str, number: int) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call


@cache
def _library() -> Any:
    """The library, its prototypes bound. Raises OSError where it is not installed."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_release.restype = None
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    library.seccomp_arch_add.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.seccomp_syscall_resolve_name_arch.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
    library.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(Comparison),
    )
    return library


def _check(call: str, result: int, *ignored: int) -> None:
    if result < 0 and -result not in ignored:
        raise LibraryError(call, -result)


def number(name: str) -> int | None:
    """The call's number on this machine, a negative pseudo number if only other machines have it, None if unknown."""
    found: int = _library().seccomp_syscall_resolve_name(name.encode())
    return None if found == _UNKNOWN else found


def number_on(arch: int, name: str) -> int | None:
    """The call's number on `arch`; None where it has none."""
    found: int = _library().seccomp_syscall_resolve_name_arch(arch, name.encode())
    return found if found >= 0 else None


class Context:
    """A filter under construction; see `context`."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def add_arch(self, arch: int) -> None:
        """Calls of `arch` are filtered as well; the machine's own always are."""
        _check("seccomp_arch_add", _library().seccomp_arch_add(self._handle, arch), errno.EEXIST)

    def add_rule(self, action: int, call: int, comparisons: Sequence[Comparison]) -> None:
        """Take `action` on the call with this number (from `number`) where all comparisons hold.

        A rule that an earlier one includes is dropped.
        """
        array = (Comparison * len(comparisons))(*comparisons)
        result = _library().seccomp_rule_add_array(self._handle, action, call, len(comparisons), array)
        _check("seccomp_rule_add", result, errno.EEXIST)

    def export(self) -> bytes:
        """The filter as an array of struct sock_filter."""
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            _check("seccomp_export_bpf", _library().seccomp_export_bpf(self._handle, fd))
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)


@contextmanager
def context(default_action: int) -> Iterator[Context]:
    """A filter that takes `default_action` on every call without a rule and kills on an unknown architecture."""
    library = _library()
    handle = library.seccomp_init(default_action)
    if not handle:
        raise LibraryError("seccomp_init", errno.EINVAL)
    try:
        _check("seccomp_attr_set", library.seccomp_attr_set(handle, _ACT_BADARCH, KILL_PROCESS))
        _check("seccomp_attr_set", library.seccomp_attr_set(handle, _OPTIMIZE, _TREE))
        yield Context(handle)
    finally:
        library.seccomp_release(handle)

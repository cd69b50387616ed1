"""Writing in the background: aio(7), whose writes are made by a thread of the C library's that runs no Python code.

That thread blocks all signals and ends a second after its last write. A child cloned meanwhile inherits its traces: a
place in the library's list of threads, and whatever locks it held. Those are aio's own and the list's, for it doesn't
allocate; so such a child must not call what looks at that list: no function that makes threads, and none that changes
users or groups (`runtime.linux.process.set_identity` is for that).

A write that hangs keeps the process from going away, even when it is killed.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from errno import EINPROGRESS

from runtime.linux.lib import SyscallError, function

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

_aio_write: Final = function("aio_write", 1)
_aio_error: Final = function("aio_error", 1)
_aio_return: Final = function("aio_return", 1, result=ctypes.c_ssize_t)
# aio_fildes, aio_lio_opcode, aio_reqprio, aio_buf, aio_nbytes, aio_sigevent (value, signo, notify); then what is the C
# library's own: with glibc and with musl a struct aiocb has 168 bytes.
_CONTROL: Final = struct.Struct("iiiPNPii208x")
_SIGEV_NONE: Final = 1
# Where the bytes of a bytes object are, from its address on: making ctypes objects costs a monitor memory.
_OFFSET: Final = int.from_bytes(ctypes.c_char_p(sample := b"sample"), sys.byteorder) - id(sample)


class Writer:
    """Makes one write at a time. The object must live until it is done."""

    __slots__ = ("_control", "data")

    def begin(self, fd: int, data: bytes) -> None:
        """Begin to write `data` to `fd`. Raises SyscallError when that can't be."""
        self.data = data
        # An object of its own, that nobody else sees: the C library writes into it.
        self._control = _CONTROL.pack(fd, 0, 0, id(data) + _OFFSET, len(data), 0, 0, _SIGEV_NONE)
        if _aio_write(self._control) == -1:
            raise SyscallError("aio_write", ctypes.get_errno())

    def result(self) -> int | None:
        """How many bytes were written; None while that isn't known. Raises OSError; not to be called again then."""
        errno = _aio_error(self._control)
        if errno == EINPROGRESS:
            return None
        written: int = _aio_return(self._control)
        if errno:
            raise OSError(errno, os.strerror(errno))
        return written

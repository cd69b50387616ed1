"""From exception to gRPC status: the one table.

The rooms below raise their domain exceptions; this is the only place that knows what the kubelet is told of them.
What the table does not know is a bug: UNKNOWN, with a traceback in the log.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Final

from grpc import StatusCode

import net.errors
import runtime.errors
from runtime.images.errors import RegistryUnavailable, SignatureValidationFailed

_CODES: Final = {
    "NotFound": StatusCode.NOT_FOUND,
    "AlreadyExists": StatusCode.ALREADY_EXISTS,
    "WrongState": StatusCode.FAILED_PRECONDITION,
    "InvalidSpec": StatusCode.INVALID_ARGUMENT,
    "Unsupported": StatusCode.UNIMPLEMENTED,
    "Unavailable": StatusCode.UNAVAILABLE,
    "Exhausted": StatusCode.RESOURCE_EXHAUSTED,
    "Denied": StatusCode.PERMISSION_DENIED,
    "Damaged": StatusCode.DATA_LOSS,
    "DeadlineExceeded": StatusCode.DEADLINE_EXCEEDED,
    "Cancelled": StatusCode.CANCELLED,
}
_CLASSES: Final[tuple[tuple[type[BaseException], StatusCode], ...]] = tuple(
    (getattr(room, name), code)
    for name, code in _CODES.items()
    for room in (runtime.errors, net.errors)
    if hasattr(room, name)
)
# The kubelet knows these by how the message starts, and takes only the code UNKNOWN off it (cri-client's
# remote_image.go): with any other it would read "rpc error: code = ..." there.
_BARE: Final = (RegistryUnavailable, SignatureValidationFailed)
_ERRNOS: Final = {
    errno.ENOSPC: StatusCode.RESOURCE_EXHAUSTED,
    errno.EDQUOT: StatusCode.RESOURCE_EXHAUSTED,
    errno.EMFILE: StatusCode.RESOURCE_EXHAUSTED,
    errno.ENFILE: StatusCode.RESOURCE_EXHAUSTED,
    errno.ENOMEM: StatusCode.RESOURCE_EXHAUSTED,
    errno.ETIMEDOUT: StatusCode.DEADLINE_EXCEEDED,
}
_NO_THREAD: Final = "can't start new thread"
_MESSAGE_LIMIT: Final = 4096  # gRPC sends it as a header, and the client's header limit is 8 KiB by default


def status_of(error: BaseException) -> tuple[StatusCode, str, bool]:
    """The code and the message for `error`, and whether it is expected; a bug isn't, and wants its traceback logged."""
    if isinstance(error, _BARE):
        return StatusCode.UNKNOWN, _text(error), True
    for kind, code in _CLASSES:
        if isinstance(error, kind):
            return code, _text(error), True
    if isinstance(error, (runtime.errors.StepFailed, net.errors.CribError, runtime.errors.CribError)):
        return _ERRNOS.get(getattr(error, "errno", 0), StatusCode.UNKNOWN), _text(error), True
    if isinstance(error, asyncio.CancelledError):
        return StatusCode.CANCELLED, "the caller went away", True
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return _ERRNOS[error.errno], _text(error), True
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:  # all that Python tells of EAGAIN
        return StatusCode.RESOURCE_EXHAUSTED, _NO_THREAD, True
    return StatusCode.UNKNOWN, f"{type(error).__name__}: {_text(error)}", False


def _text(error: BaseException) -> str:
    """What a client may see: valid UTF-8 (names of files need not be), of a bounded length."""
    text = str(error) or type(error).__name__
    for note in getattr(error, "__notes__", ()):
        text += f"; {note}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MESSAGE_LIMIT else text[:_MESSAGE_LIMIT] + "…"

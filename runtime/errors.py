"""Domain errors of the lower rooms; only `cri.status` knows which gRPC code each becomes.

Messages are lower case, name the object and the cause, and never hold a secret.
"""

from errno import EDQUOT, ENOSPC


class CribError(Exception):
    """Something that a caller can be told; the message is meant for a person."""


class NotFound(CribError):
    """The named object does not exist."""


class AlreadyExists(CribError):
    """Another object holds the name."""


class WrongState(CribError):
    """The object exists but is not in a state that allows the request."""


class InvalidSpec(CribError):
    """The request asks for something impossible; the message names field and value."""


class Unsupported(CribError):
    """This host or this version cannot do what was asked."""


class Unavailable(CribError):
    """Something outside (a monitor, a registry, the kernel) does not answer now."""


class Exhausted(CribError):
    """A limit was reached: disk, memory, addresses, size of an answer."""


class Denied(CribError):
    """Somebody outside (a registry) refuses what was asked, with the credentials that were given."""


class Damaged(CribError):
    """What came from outside, or lies on the disk, is not what its digest says."""


class DeadlineExceeded(CribError):
    """A wait reached its deadline; the message names what it waited for."""


class Cancelled(CribError):
    """The caller gave up."""


class StepFailed(CribError):
    """One step of a plan failed: `step 7/31: bind /a on /b (ro): operation not permitted`.

    `index` counts from 1; `errno` is 0 where the kernel gave none.
    """

    def __init__(self, step: str, index: int, total: int, errno: int, detail: str) -> None:
        super().__init__(f"step {index}/{total}: {step}: {detail}")
        self.step = step
        self.index = index
        self.total = total
        self.errno = errno
        self.detail = detail


def of_disk(what: str, error: OSError) -> CribError:
    """What it means that `what` could not be written: Exhausted where the disk is full, else Unavailable."""
    kind = Exhausted if error.errno in (ENOSPC, EDQUOT) else Unavailable
    return kind(f"{what}: {(error.strerror or str(error)).lower()}")

"""The unpacking program's main: confines itself to the layer's directory, unpacks, reports one line of JSON.

Started by `runtime.images.layers` with the blob's file and a control pipe (see `ArrivingBlob`). Threat model: a layer
may try to exploit a decompressor or the reader; the process then holds a directory as its root, no descriptor but the
blob, the pipe and its output, few capabilities, bounded memory, and dies with its parent.
"""

import gc
import json
import os
import resource
import signal
import sys
from dataclasses import asdict, dataclass

from runtime.images.unpack.apply import Applier
from runtime.images.unpack.errors import BadLayer, LimitReached
from runtime.images.unpack.stream import ArrivingBlob, Pipeline
from runtime.images.unpack.tar import Reader, Stream
from runtime.linux import caps
from runtime.linux.process import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl

# SYS_ADMIN is what trusted.* attributes need.
_KEEP = caps.mask(
    ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP", "CAP_SYS_ADMIN")
)
_MEMORY_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Job:
    """What the parent asks for, as JSON in the last argument. Descriptors are inherited ones."""

    root: str
    blob: int
    offset: int
    control: int
    parent: int
    unpacked_limit_bytes: int
    ratio_limit: int
    ratio_from_bytes: int
    entries_limit: int


def _confine(job: Job) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job.parent:
        os._exit(1)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(limit, (value, value))
    last = caps.last_cap()
    os.umask(0)
    os.chroot(job.root)  # noqa: TID251 (this is the program that is to be confined, not cribd)
    os.chdir("/")
    caps.drop_bounding(_KEEP, last)
    caps.capset(_KEEP, _KEEP, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _unpack(job: Job) -> dict[str, object]:
    pipeline = Pipeline(
        ArrivingBlob(job.blob, job.offset, job.control), job.unpacked_limit_bytes, job.ratio_limit, job.ratio_from_bytes
    )
    stream = Stream(pipeline)
    applied = Applier(stream, job.entries_limit).apply(Reader(stream))
    return {
        **asdict(applied),
        "implied": [os.fsdecode(path) for path in applied.implied],
        "lower_links": [[os.fsdecode(name), os.fsdecode(target)] for name, target in applied.lower_links],
        "diff_id": pipeline.diff_id,
        "size": pipeline.size,
    }


def _failure(kind: str, message: str, errno: int = 0) -> dict[str, object]:
    return {"failed": kind, "message": message, "errno": errno}


def main() -> None:
    """Run the job; the exit status is 0 whenever a line was written."""
    gc.disable()
    job = Job(**json.loads(sys.argv[-1]))
    try:
        _confine(job)
        result = _unpack(job)
    except LimitReached as error:
        result = _failure("limit", str(error))
    except BadLayer as error:
        result = _failure("bad", str(error))
    except MemoryError:
        result = _failure("limit", f"unpacking takes more than {_MEMORY_LIMIT_BYTES} bytes of memory")
    except EOFError:
        os._exit(1)
    except OSError as error:
        where = f"{os.fsdecode(error.filename)!r}: " if error.filename else ""
        result = _failure("system", f"{where}{(error.strerror or str(error)).lower()}", error.errno or 0)
    os.write(1, json.dumps(result).encode() + b"\n")
    # The pipeline's thread may wait for bytes that never come.
    os._exit(0)

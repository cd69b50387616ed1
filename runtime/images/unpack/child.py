"""The unpacking program: forks when cribd wants a process; the fork confines itself and unpacks layers of one image.

Started by `runtime.images.layers`. Each message on its socket has one descriptor, on which the fork finds its work; the
answer is the fork's pid and pidfd, or why there is none. Without forks for a while the program ends; a message that it
has not answered then was in vain.

Each message to a fork is a layer, with four descriptors: a detached mount of its empty directory, a pipe that brings
the blob, a pipe for the report, one line of JSON, and the file for the layer's recipe. The blob ends when the pipe
does: who gives it up kills the fork first. When the report says so the fork waits for another layer.

A fork costs what it touches, page by page: what can be done once is done before it, and small layers share one.

Threat model: a layer may try to exploit a decompressor or the reader. The fork that reads it has the layer's directory
as its root, in a mount that leads nowhere else, so that not even CAP_SYS_CHROOT leads out of it; no descriptor but
those four, its socket, the store's lock (an empty file, to be read) and a path to its root, few capabilities, only the
system calls that it needs, bounded memory, and dies with this process, which reads nothing but cribd's jobs and dies
with cribd. What has taken over a fork could lie about the layer at hand, and write to those that it gets after: they
are of the same image, and all its forks have ended before that is committed.
"""

import gc
import json
import os
import resource
import select
import socket
import sys
from dataclasses import dataclass

from runtime.images.unpack.apply import Applier
from runtime.images.unpack.calls import only_unpacking
from runtime.images.unpack.errors import BadLayer, LimitReached, text_of
from runtime.images.unpack.recipe import Recorder
from runtime.images.unpack.stream import Blob, Pipeline
from runtime.images.unpack.tar import Reader, Stream
from runtime.linux import caps
from runtime.linux.process import PR_SET_NO_NEW_PRIVS, die_with, prctl
from runtime.linux.seccomp import Filter

# SYS_ADMIN is what trusted.* attributes need.
_KEEP = caps.mask(
    (
        *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP", "CAP_SYS_ADMIN"),
        "CAP_SYS_CHROOT",
    )
)
_MEMORY_LIMIT_BYTES = 512 << 20
# After a larger layer the fork ends, and gives back its memory.
_SMALL_BYTES = 8 << 20
_REAP_MS = 1_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Of each layer; `idle_s` is how long the program stays without work."""

    idle_s: float
    unpacked_limit_bytes: int
    ratio_limit: int
    ratio_from_bytes: int
    entries_limit: int


def _lessen() -> None:
    """For this process, and so for its forks."""
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_NOFILE, 64),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    os.umask(0)
    caps.drop_bounding(_KEEP, caps.last_cap())
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _confine(filter: Filter) -> None:
    # What was not imported yet never is: a layer has files at the interpreter's paths.
    sys.path.clear()
    sys.meta_path.clear()
    caps.capset(_KEEP, _KEEP, 0)
    filter.load()


def _unpack(limits: Limits, blob: int, recipe: int) -> dict[str, object]:
    pipeline = Pipeline(Blob(blob), limits.unpacked_limit_bytes, limits.ratio_limit, limits.ratio_from_bytes)
    recorder = Recorder(recipe)
    stream = Stream(pipeline, recorder.plain)
    applied = Applier(stream, limits.entries_limit, recorder).apply(Reader(stream))
    recorder.finish()
    return {
        "bytes_used": applied.bytes_used,
        "inodes": applied.inodes,
        "implied": [os.fsdecode(path) for path in applied.implied],
        "lower_links": [[os.fsdecode(name), os.fsdecode(target)] for name, target in applied.lower_links],
        "diff_id": pipeline.diff_id,
        "spoilt": recorder.spoilt,
        "ready": pipeline.size <= _SMALL_BYTES,
    }


def _failure(kind: str, message: str, errno: int = 0) -> dict[str, object]:
    return {"failed": kind, "message": message, "errno": errno, "ready": False}


def _report(limits: Limits, filter: Filter | None, root: int, blob: int, recipe: int) -> dict[str, object]:
    """Of one layer; `filter` with the first."""
    try:
        os.fchdir(root)
        os.chroot(".")  # noqa: TID251 (this is the program that is to be confined, not cribd)
        if filter is not None:
            _confine(filter)
        return _unpack(limits, blob, recipe)
    except LimitReached as error:
        return _failure("limit", str(error))
    except BadLayer as error:
        return _failure("bad", str(error))
    except MemoryError:
        return _failure("limit", f"takes more than {_MEMORY_LIMIT_BYTES} bytes of memory")
    except OSError as error:
        return _failure("system", text_of(error), error.errno or 0)
    except Exception as error:  # a defect; a traceback would read source files by name, inside the layer
        return _failure("defect", f"{type(error).__name__}: {error}")


def _work(jobs: socket.socket, limits: Limits, filter: Filter | None) -> None:
    """Layer after layer, in the fork; never returns."""
    status = 1
    try:
        os.dup2(0, 2)  # cribd's log is not the layer's
        ready: object = True
        while ready:
            message, descriptors, _, _ = socket.recv_fds(jobs, 16, 4)
            if not message:
                break
            root, blob, report, recipe = descriptors
            outcome = _report(limits, filter, root, blob, recipe)
            filter = None
            ready = outcome["ready"]
            left = memoryview(json.dumps(outcome).encode() + b"\n")
            while left:
                left = left[os.write(report, left) :]
            for descriptor in descriptors:
                os.close(descriptor)
        status = 0
    finally:
        # Without waiting for the pipeline's thread, which may wait for bytes that never come.
        os._exit(status)


def _reap() -> int:
    """How many forks have ended since; what they took counts as this process's, and so as cribd's."""
    ended = 0
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            ended += 1
    except ChildProcessError:
        pass
    return ended


def serve(number: int, limits: Limits) -> None:
    """Take jobs from the socket with this descriptor until cribd closes its end or has none for a while."""
    filter = only_unpacking()
    _lessen()
    gc.disable()
    gc.freeze()
    me = os.getpid()
    jobs = socket.socket(fileno=number)
    waiting = select.poll()
    waiting.register(jobs, select.POLLIN)
    forks = 0
    while True:
        if not waiting.poll(_REAP_MS if forks else limits.idle_s * 1000):
            if not forks:
                os._exit(0)
            forks -= _reap()
            continue
        message, descriptors, _, _ = socket.recv_fds(jobs, 16, 1)
        if not message:
            _reap()
            os._exit(0)
        pid, pidfds = -1, []
        try:
            pid = os.fork()  # noqa: TID251 (one thread, and a program of its own)
            if pid:
                forks += 1
                pidfds = [os.pidfd_open(pid)]
            answer = str(pid)
        except OSError as error:  # there are too many processes, perhaps; a fork that nobody feeds ends by itself
            answer = f"fork: {(error.strerror or str(error)).lower()}"
        if not pid:
            jobs.close()
            die_with(me)
            _work(socket.socket(fileno=descriptors[0]), limits, filter)
        socket.send_fds(jobs, [answer.encode()], pidfds)
        for descriptor in (*pidfds, *descriptors):
            os.close(descriptor)
        forks -= _reap()

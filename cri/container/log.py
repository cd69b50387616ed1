"""A container's log file: opened here, where a disk that hangs holds up one call, and written by the pod's monitor."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from runtime.engine import ContainerFact, LogFile, open_log
from runtime.errors import CribError
from runtime.linux import files

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

_ROTATED: Final = re.compile(r"\.\d{8}-\d{6}(\.\d{9})?(\.gz)?")
_logger = logging.getLogger(__name__)


async def opened(node: Node, container: Container) -> LogFile | None:
    """The container's log, made where there is none; its descriptor is the caller's. None: it has no log.

    Raises CribError.
    """
    path = container.record.log_path
    if not path:
        return None

    def open_it() -> LogFile | None:
        with _directory(container) as directory:
            fd = open_log(os.path.basename(path), directory)
        return LogFile(path, fd, os.fstat(fd).st_size, node.config.logs.max_bytes)

    opening = asyncio.ensure_future(node.work(open_it))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:  # the disk may answer yet
        opening.add_done_callback(close_log)
        raise
    except OSError as error:
        raise CribError(f"{container.title}: log {path}: {(error.strerror or '').lower()}") from error


def close_log(opening: asyncio.Future[LogFile | None]) -> None:
    """Close the log that was opened for nothing, if it was: the callback of what opens it."""
    if not opening.cancelled() and not opening.exception() and (log := opening.result()):
        os.close(log.fd)


async def reopen(node: Node, container: Container) -> None:
    """Have all later output go to a new file at the log's path. Raises CribError, and the old file goes on then."""
    log = await opened(node, container)
    if log:
        try:
            await container.pod.monitor.reopen_log(container.id, log)
        finally:
            os.close(log.fd)


def on_log(node: Node, fact: ContainerFact) -> None:
    """Take a monitor's word that a container's log loses output, or that it has grown to its limit."""
    container = node.containers.find(fact.id)
    if container is None:
        return
    if (loss := fact.log_loss) != container.log_loss:
        container.log_loss = loss
        fields = {"container": fact.id, "lines": loss.lines, "bytes": loss.size_bytes, "cause": loss.cause}
        _logger.warning("output is missing in the log", extra={"fields": fields})
    if fact.log_full and fact.exited is None and container.alive:
        work = node.flights.join(("rotate", container.id), lambda: _rotate(node, container))
        node.spawn(asyncio.get_running_loop().create_task(work))


async def _rotate(node: Node, container: Container) -> None:
    """Rename the full log, as the kubelet does, go on in a new one, and remove the oldest."""
    name = os.path.basename(container.record.log_path)
    now = time.time_ns()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now // 10**9))
    renamed = f"{name}.{stamp}.{now % 10**9:09d}"

    def rename(old: str, new: str) -> None:
        with _directory(container) as directory:
            os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)

    try:
        # It has its name already where cribd ended in the midst of the last rotation.
        with suppress(FileNotFoundError):
            await node.work(rename, name, renamed)
        try:
            await reopen(node, container)
        except CribError:
            with suppress(FileNotFoundError):
                await node.work(rename, renamed, name)  # what is written goes there still
            raise
        await node.work(_prune, container, name, node.config.logs.max_files)
    except (OSError, CribError) as error:
        _logger.warning("rotating a log failed", extra={"fields": {"container": container.id, "error": str(error)}})


def _prune(container: Container, log: str, keep: int) -> None:
    """Remove the oldest of a log's renamed files, so that with the present one `keep` are left."""
    with _directory(container) as directory:
        names = os.listdir(f"/proc/self/fd/{directory}")
        old = sorted(name for name in names if name.startswith(log) and _ROTATED.fullmatch(name, len(log)))
        for name in old[: max(len(old) - keep + 1, 0)]:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)


def make_directory(container: Container) -> None:
    """Make the directory of the container's log, if it has one. Raises OSError."""
    if container.record.log_path:
        os.makedirs(container.pod.config.log_directory, mode=0o755, exist_ok=True)
        with _directory(container, files.make_directories):
            pass


@contextmanager
def _directory(container: Container, find: Callable[[int, str], int] = files.open_directory) -> Iterator[int]:
    """The directory of the log, found below the pod's: a container with a volume there may have put links in it.

    Raises OSError.
    """
    top = container.pod.config.log_directory
    root = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        directory = find(root, os.path.dirname(os.path.relpath(container.record.log_path, top)))
    finally:
        os.close(root)
    try:
        yield directory
    finally:
        os.close(directory)

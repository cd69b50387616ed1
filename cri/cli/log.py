"""`crib logs`, and what prints a container's log."""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from datetime import datetime

import msgspec

from cri.api import cri_pb2 as pb
from cri.cli import failure
from cri.cli.client import Client
from cri.cli.failure import Failure
from cri.cli.inventory import Inventory
from cri.cli.logfile import Line, Log, follow


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `crib logs -o json`."""

    time: str
    stream: str
    partial: bool
    log: str


def write(lines: Iterable[Line], as_json: bool = False, timestamps: bool = False, live: bool = True) -> None:
    """Print lines as the container did: each to its own stream, as raw bytes; `live`: each at once."""
    outputs = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    begins = dict.fromkeys(outputs, True)
    for line in lines:
        if as_json:
            text = line.text.decode("utf-8", "backslashreplace")
            entry = LogEntry(time=line.time, stream=line.stream, partial=line.partial, log=text)
            output = sys.stdout.buffer
            output.write(msgspec.json.encode(entry) + b"\n")
        else:
            output = outputs[line.stream]
            if timestamps and begins[line.stream]:
                output.write(line.time.encode() + b" ")
            begins[line.stream] = not line.partial
            output.write(line.text)
        if live:
            output.flush()
    for output in outputs.values():
        output.flush()


def path_of(client: Client, container: pb.Container) -> str:
    """The container's log file. Raises Failure where it has none."""
    path: str = client.call("ContainerStatus", container_id=container.id).status.log_path
    if not path:
        raise Failure(f"container {container.metadata.name} writes no log: its pod was run without a log directory")
    return path


def has_ended(client: Client, container_id: str) -> Callable[[], bool]:
    """Whether a container runs no more, or is gone, as asked of cribd."""

    def ended() -> bool:
        try:
            state = client.call("ContainerStatus", container_id=container_id).status.state
        except Failure as failed:
            if failed.code == failure.NOT_FOUND:
                return True
            raise
        return state in (pb.CONTAINER_EXITED, pb.CONTAINER_UNKNOWN)

    return ended


def _as_far_as_known(ended: Callable[[], bool]) -> Callable[[], bool]:
    """Without a cribd, or in the midst of its end, a container isn't known to have ended: monitors write on."""

    def asked() -> bool:
        try:
            return ended()
        except Failure:
            return False

    return asked


def _is_before(line: Line, seconds: float) -> bool:
    try:
        return datetime.fromisoformat(line.time).timestamp() < seconds
    except ValueError:  # not a time: then nothing says that it is old
        return False


def logs(client: Client, options: Namespace) -> int:
    """Print a container's log."""
    container = Inventory(client).container(options.container)
    log = Log(path_of(client, container))
    as_json = options.output == "json"
    try:
        if options.since is not None:
            log.start_after(options.since)
        if options.tail is not None:
            log.start_at_tail(options.tail)
        past: Iterable[Line] = log.read()
        if options.since is not None:
            past = itertools.dropwhile(lambda line: _is_before(line, options.since), past)
        write(past, as_json, options.timestamps, live=False)
        if options.follow:
            coming = follow(log, _as_far_as_known(has_ended(client, container.id)))
            write(coming, as_json, options.timestamps)
    except PermissionError as error:
        raise Failure(f"cannot read the log: {error.filename}: permission denied: run it as root") from error
    finally:
        log.close()
    return 0

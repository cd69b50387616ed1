"""`crib exec`, `crib attach` and `crib inspect`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from argparse import Namespace
from typing import Any, Final

import msgspec
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cri.api import cri_pb2 as pb
from cri.cli import failure
from cri.cli.client import CALL_S, Client
from cri.cli.failure import Failure
from cri.cli.image import find
from cri.cli.inventory import Inventory
from cri.cli.output import show_json
from cri.cli.stream import Streams

_REDACTED: Final = "<redacted>"
_END_S: Final = 10


class Executed(msgspec.Struct, frozen=True, kw_only=True):
    exit_code: int
    stdout: str
    stderr: str


def exec_(client: Client, options: Namespace) -> int:
    """Run a command in a running container; answers with its exit code."""
    if not options.command:
        raise Failure("exec: no command given", failure.USAGE)
    collected = options.timeout or options.output == "json"
    if collected and (options.interactive or options.tty):
        raise Failure("exec: -i and -t don't go together with --timeout and -o json", failure.USAGE)
    if options.interactive and options.tty and not os.isatty(0):
        raise Failure("exec -t: standard input is no terminal", failure.USAGE)
    container = Inventory(client).container(options.container)
    if collected:
        return _exec_sync(client, container.id, options)
    tty = options.tty
    url = client.call(
        "Exec",
        container_id=container.id,
        cmd=options.command,
        stdin=options.interactive,
        stdout=True,
        stderr=not tty,
        tty=tty,
    ).url
    return Streams(url, stdin=options.interactive, terminal=tty).run() or 0


def _exec_sync(client: Client, container_id: str, options: Namespace) -> int:
    answer = client.call(
        "ExecSync",
        timeout_s=options.timeout + CALL_S if options.timeout else None,
        container_id=container_id,
        cmd=options.command,
        timeout=options.timeout,
    )
    if options.output == "json":
        texts = [text.decode("utf-8", "backslashreplace") for text in (answer.stdout, answer.stderr)]
        show_json(Executed(exit_code=answer.exit_code, stdout=texts[0], stderr=texts[1]))
    else:
        for stream, data in ((sys.stdout, answer.stdout), (sys.stderr, answer.stderr)):
            stream.buffer.write(data)
            stream.flush()
    return int(answer.exit_code)


def attach(client: Client, options: Namespace) -> int:
    """Share a running container's streams; answers with its exit code, or 0 when detached by keys."""
    container = Inventory(client).container(options.container)
    answer = client.call("ContainerStatus", container_id=container.id, verbose=True)
    config = json.loads(answer.info["info"])["config"]
    tty = config.get("tty", False)
    stdin = config.get("stdin", False) and not options.no_stdin
    url = client.call("Attach", container_id=container.id, stdin=stdin, stdout=True, stderr=not tty, tty=tty).url
    streams = Streams(url, stdin=stdin, terminal=tty, detaches=True)
    if tty and stdin and os.isatty(0) and os.isatty(2):
        print("attached: Ctrl-P Ctrl-Q detaches", file=sys.stderr)
    if streams.run() is None:
        return 0
    return _exit_code(client, container.id)


def _exit_code(client: Client, container_id: str) -> int:
    """That of a container whose streams have ended."""
    end, clock = time.monotonic() + _END_S, threading.Event()
    while time.monotonic() < end:
        status = client.call("ContainerStatus", container_id=container_id).status
        if status.state == pb.CONTAINER_EXITED:
            return int(status.exit_code)
        clock.wait(0.02)  # cribd is just being told
    raise Failure(f"container {container_id} has ended its streams and runs on")


def inspect(client: Client, options: Namespace) -> int:
    """Print all that cribd tells of containers, pods and images. Environment values are left out."""
    inventory = Inventory(client)
    show_json([_inspected(client, inventory, given) for given in options.things])
    return 0


def _inspected(client: Client, inventory: Inventory, given: str) -> dict[str, Any]:
    try:
        thing = inventory.any(given)
    except Failure as failed:
        if failed.code != failure.NOT_FOUND:
            raise
        return _image(client, given)
    if isinstance(thing, pb.Container):
        answer = client.call("ContainerStatus", container_id=thing.id, verbose=True)
        return _told("container", answer.status, answer.info)
    answer = client.call("PodSandboxStatus", pod_sandbox_id=thing.id, verbose=True)
    return _told("pod", answer.status, answer.info)


def _image(client: Client, given: str) -> dict[str, Any]:
    try:
        found = find(client, given)
    except Failure as failed:
        if failed.code == failure.NOT_FOUND:
            raise Failure(f"no container, pod or image {given!r}", failure.NOT_FOUND) from failed
        raise
    answer = client.call("ImageStatus", image=pb.ImageSpec(image=found.id), verbose=True)
    return _told("image", answer.image, answer.info)


def _told(kind: str, status: Message, info: dict[str, str]) -> dict[str, Any]:
    """The message as crictl shows it, and the details that cribd gives in JSON."""
    details = {key: _decoded(value) for key, value in sorted(info.items())}
    details = details["info"] if isinstance(details.get("info"), dict) else details
    shown = MessageToDict(status, always_print_fields_with_no_presence=True)
    return {"kind": kind, "status": shown, "info": redacted(details)}


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def redacted(value: Any) -> Any:
    """A copy without environment values: of "env" lists of KEY=VALUE, and "envs" lists of key and value."""
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _names(item) if key.lower() in ("env", "envs") else redacted(item) for key, item in value.items()}


def _names(variables: Any) -> Any:
    """The names alone, whatever the shape."""
    if isinstance(variables, list):
        return [_names(variable) for variable in variables]
    if isinstance(variables, dict):
        return {key: item if key.lower() in ("key", "name") else _REDACTED for key, item in variables.items()}
    return f"{variables.partition('=')[0]}={_REDACTED}" if isinstance(variables, str) else _REDACTED

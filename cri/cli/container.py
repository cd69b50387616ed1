"""`crib exec` and `crib inspect`."""

from __future__ import annotations

import json
import sys
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

_REDACTED: Final = "<redacted>"


class Executed(msgspec.Struct, frozen=True, kw_only=True):
    exit_code: int
    stdout: str
    stderr: str


def exec_(client: Client, options: Namespace) -> int:
    """Run a command in a running container; answers with its exit code."""
    if not options.command:
        raise Failure("exec: no command given", failure.USAGE)
    container = Inventory(client).container(options.container)
    answer = client.call(
        "ExecSync",
        timeout_s=options.timeout + CALL_S if options.timeout else None,
        container_id=container.id,
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

"""Whether a request is the same as an earlier one, and if not, where they differ."""

from __future__ import annotations

import hashlib
from typing import Any

from google.protobuf.message import Message

from cri.translate.field import show

_SECRET = {"runtime.v1.KeyValue.value", "runtime.v1.AuthConfig"}


def fingerprint(*messages: Message) -> str:
    """A hex digest that is equal for equal messages, across restarts and orders of map entries."""
    digest = hashlib.sha256()
    for message in messages:
        data = message.SerializeToString(deterministic=True)
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def difference(first: Message, second: Message, path: str = "") -> str | None:
    """The first field in which two messages of one type differ, with both values; None where they are equal.

    Values of environment variables and credentials are not shown.
    """
    if first == second:
        return None
    for field in first.DESCRIPTOR.fields:
        name = f"{path}.{field.name}" if path else field.name
        a: Any = getattr(first, field.name)
        b: Any = getattr(second, field.name)
        if a == b and (not field.has_presence or first.HasField(field.name) == second.HasField(field.name)):
            continue
        if field.full_name in _SECRET or first.DESCRIPTOR.full_name in _SECRET:
            return f"{name} differs"
        if field.is_repeated:
            is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
            return _maps(name, dict(a), dict(b)) if is_map else _lists(name, list(a), list(b))
        if field.message_type is not None:
            if first.HasField(field.name) and second.HasField(field.name):
                return difference(a, b, name)
            return f"{name} is set in one of them only"
        return f"{name}: {show(a)}, then {show(b)}"
    return f"{path or first.DESCRIPTOR.name}: unknown fields differ"


def _maps(name: str, first: dict[Any, Any], second: dict[Any, Any]) -> str | None:
    for key in sorted({*first, *second}):
        if first.get(key) != second.get(key):
            return f"{name}[{show(key)}]: {show(first.get(key))}, then {show(second.get(key))}"
    return None


def _lists(name: str, first: list[Any], second: list[Any]) -> str | None:
    if len(first) != len(second):
        return f"{name}: {len(first)} entries, then {len(second)}"
    for index, (one, two) in enumerate(zip(first, second, strict=True)):
        if one != two:
            at = f"{name}[{index}]"
            return difference(one, two, at) if isinstance(one, Message) else f"{at}: {show(one)}, then {show(two)}"
    return None

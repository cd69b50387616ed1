"""JSON and YAML files of a node's, as programs in Go read and write them: a member that is null is as one left out."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from runtime.errors import InvalidSpec

T = TypeVar("T")
_DEPTH_LIMIT: Final = 256


def decode(content: bytes, type: type[T], *, yaml: bool = False) -> T:
    """The document as a `type`. Raises InvalidSpec for whatever is wrong with it."""
    try:
        if yaml:
            _check_depth(content)
        found = msgspec.yaml.decode(content) if yaml else msgspec.json.decode(content)
        return msgspec.convert(_without_nulls(found), type)
    except RecursionError as error:
        raise InvalidSpec("nested too deeply") from error
    except (ValueError, LookupError, TypeError) as error:  # the last two of YAML's own types, as !!int ''
        raise InvalidSpec(str(error)) from error


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _check_depth(content: bytes) -> None:
    """libyaml recurses until the stack is at its end, and the process with it. Raises RecursionError or ValueError."""
    import yaml  # type: ignore[import-untyped]  # here, for few nodes: most CDI files are JSON

    depth = 0
    try:
        for event in yaml.parse(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH_LIMIT:
                raise RecursionError
    except yaml.YAMLError as error:
        raise ValueError(error) from error

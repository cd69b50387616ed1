"""Hooks that the node's administrator adds to containers: files as of containers-common's oci-hooks(5), version 1.0.0.

Reading the files is the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec
from msgspec import field

from cri.translate.document import decode
from cri.translate.field import absolute
from runtime.errors import InvalidSpec
from runtime.spec import Hook, Hooks, Spec

FILE_LIMIT_BYTES = 1 << 20
_STAGES = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}


class When(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """All of the conditions that are given must hold; regular expressions are searched for."""

    always: bool | None = None
    annotations: dict[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    has_bind_mounts: bool | None = None


class HookFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: str
    hook: Hook
    when: When
    stages: tuple[str, ...]


def parse(path: str, content: bytes) -> HookFile:
    """One file. Raises InvalidSpec, which names it."""
    try:
        found = decode(content, HookFile)
        for pattern in (*found.when.annotations, *found.when.annotations.values(), *found.when.commands):
            re.compile(pattern)
    except (InvalidSpec, re.error) as error:
        raise InvalidSpec(f"hook file {path}: {error}") from error
    if found.version != "1.0.0":
        raise InvalidSpec(f"hook file {path}: version {found.version!r} is not 1.0.0")
    if unknown := sorted(set(found.stages) - _STAGES.keys()):
        raise InvalidSpec(f"hook file {path}: stage {unknown[0]!r} is not one of {', '.join(_STAGES)}")
    if not found.stages:
        raise InvalidSpec(f"hook file {path}: no stages")
    absolute(f"hook file {path}: hook.path", found.hook.path)
    return found


def apply(spec: Spec, files: Iterable[HookFile], annotations: Mapping[str, str], *, bind_mounts: bool) -> Spec:
    """The spec with the hooks whose conditions hold. `annotations` are the container's own; `bind_mounts`: whether the
    request has any."""
    added: dict[str, list[Hook]] = {}
    for found in files:
        if _matches(found.when, spec, annotations, bind_mounts):
            for stage in found.stages:
                added.setdefault(_STAGES[stage], []).append(found.hook)
    if not added:
        return spec
    before = spec.hooks or Hooks()
    merged = {stage: (*getattr(before, stage), *extra) for stage, extra in added.items()}
    return msgspec.structs.replace(spec, hooks=msgspec.structs.replace(before, **merged))


def _matches(when: When, spec: Spec, annotations: Mapping[str, str], bind_mounts: bool) -> bool:
    conditions = [] if when.always is None else [when.always]
    if when.has_bind_mounts is not None:
        conditions.append(when.has_bind_mounts == bind_mounts)
    for key, value in when.annotations.items():
        conditions.append(any(re.search(key, k) and re.search(value, v) for k, v in annotations.items()))
    if when.commands:
        command = spec.process.args[0] if spec.process.args else ""
        conditions.append(any(re.search(pattern, command) for pattern in when.commands))
    return bool(conditions) and all(conditions)

"""The shape of one field's value: length, control characters, paths. Every refusal names the field and the value."""

from __future__ import annotations

import posixpath
import re

from runtime.errors import InvalidSpec

REQUEST_LIMIT_BYTES = 8 << 20
"""A whole RunPodSandbox or CreateContainer configuration; etcd keeps a pod below 1.5 MiB."""
PATH_LIMIT_BYTES = 4095  # PATH_MAX without its NUL
FILE_LIMIT_BYTES = 255  # NAME_MAX
NAME_LIMIT_BYTES = 253  # a DNS subdomain, Kubernetes' longest name
ID_LIMIT_BYTES = 128
LABELS_LIMIT_BYTES = 1 << 20
"""Keys and values of a label or annotation map together; Kubernetes allows 256 KiB of annotations."""
ID_MAX = (1 << 31) - 1
"""Greatest uid or gid: above it a 32-bit parser wraps round, to root (CVE-2024-40635)."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def show(value: object) -> str:
    """The value for an error message: quoted, control characters escaped, at most about 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"


def bounded(field: str, value: str, limit_bytes: int) -> str:
    """`value`, which has no NUL and at most `limit_bytes` as UTF-8."""
    if "\0" in value:
        raise InvalidSpec(f"{field} {show(value)}: holds a NUL character")
    if len(value) > limit_bytes or len(value.encode("utf-8", "surrogateescape")) > limit_bytes:
        raise InvalidSpec(f"{field} {show(value)}: longer than {limit_bytes} bytes")
    return value


def name(field: str, value: str, limit_bytes: int = NAME_LIMIT_BYTES) -> str:
    """`value`, which is not empty and has no control character or slash."""
    if not value:
        raise InvalidSpec(f"{field} is missing")
    if "/" in value or _CONTROL.search(value):
        raise InvalidSpec(f"{field} {show(value)}: holds a slash or a control character")
    return bounded(field, value, limit_bytes)


def absolute(field: str, value: str) -> str:
    """`value` as a normal absolute path: one leading slash, no empty, "." or ".." component."""
    if not value:
        raise InvalidSpec(f"{field} is missing")
    if _CONTROL.search(value):
        raise InvalidSpec(f"{field} {show(value)}: holds a control character")
    if not value.startswith("/"):
        raise InvalidSpec(f"{field} {show(value)}: not an absolute path")
    return "/" + posixpath.normpath(bounded(field, value, PATH_LIMIT_BYTES)).lstrip("/")


def no_backsteps(field: str, value: str) -> str:
    """`value`, in which no path component is ".."."""
    if ".." in value.split("/"):
        raise InvalidSpec(f"{field} {show(value)}: a path may not hold '..'")
    return value


def on_host(field: str, value: str) -> str:
    """`value` as a normal absolute path of the host; one with ".." is refused, as symlinks would change its meaning."""
    return absolute(field, no_backsteps(field, value))


def labels(field: str, values: dict[str, str]) -> None:
    """Refuses a map of labels or annotations beyond LABELS_LIMIT_BYTES."""
    size_bytes = sum(len(key) + len(value) for key, value in values.items())
    if size_bytes > LABELS_LIMIT_BYTES:
        raise InvalidSpec(f"{field}: {size_bytes} bytes in {len(values)} entries, the limit is {LABELS_LIMIT_BYTES}")


def identity(field: str, value: int) -> int:
    """`value`, which is a uid or gid between 0 and 2**31-1."""
    if not 0 <= value <= ID_MAX:
        raise InvalidSpec(f"{field} {value}: not between 0 and {ID_MAX}")
    return value

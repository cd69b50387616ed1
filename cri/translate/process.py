"""The process of a container: arguments, environment, working directory."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence

from cri.api import cri_pb2 as pb
from cri.translate.field import PATH_LIMIT_BYTES, absolute, bounded, show
from runtime.errors import InvalidSpec

STRING_LIMIT_BYTES = (128 << 10) - 1  # MAX_ARG_STRLEN without its NUL
TOTAL_LIMIT_BYTES = 6 << 20  # execve takes at most three quarters of _STK_LIM, 8 MiB
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def arguments(config: pb.ContainerConfig, entrypoint: Sequence[str], cmd: Sequence[str]) -> tuple[str, ...]:
    """Docker's merge: `command` replaces the image's entrypoint and drops its cmd, `args` replace its cmd."""
    command, args = list(config.command), list(config.args)
    if not command:
        command = list(entrypoint)
        args = args or list(cmd)
    merged = (*command, *args)
    if not merged:
        raise InvalidSpec("command is missing: neither the request nor the image names one")
    if not merged[0]:
        raise InvalidSpec("command[0] is empty")
    for index, argument in enumerate(merged):
        bounded(f"command[{index}]", argument, STRING_LIMIT_BYTES)
    return merged


def environment(
    image: Iterable[str], requested: Iterable[pb.KeyValue], *, hostname: str, home: str, terminal: bool
) -> tuple[str, ...]:
    """ "K=V" strings, each key once, later ones win: defaults, then the image's, then the request's.

    Values may be secrets and are never part of an error.

    Raises:
        InvalidSpec: a key that is empty or holds "=" or NUL, a value that is not UTF-8, holds NUL or is too long.
    """
    merged = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if terminal:
        merged["TERM"] = "xterm"
    for entry in image:
        key, equals, value = entry.partition("=")
        if key and equals:  # an image is not refused for an entry that no process could read
            merged[key] = _value(key, value)
    for pair in requested:
        if not pair.key or "=" in pair.key or "\0" in pair.key:
            raise InvalidSpec(f"envs {show(pair.key)}: not a name")
        try:
            merged[pair.key] = _value(pair.key, pair.value.decode())
        except UnicodeDecodeError:
            raise InvalidSpec(f"envs {show(pair.key)}: the value is not UTF-8") from None
    if not merged.get("HOME"):
        merged["HOME"] = _value("HOME", home)
    size_bytes = sum(len(key) + len(value) + 10 for key, value in merged.items())
    if size_bytes > TOTAL_LIMIT_BYTES:
        raise InvalidSpec(f"envs: {len(merged)} variables of {size_bytes} bytes, the kernel's limit is near 6 MiB")
    return tuple(f"{key}={value}" for key, value in merged.items())


def _value(key: str, value: str) -> str:
    if "\0" in value:
        raise InvalidSpec(f"envs {show(key)}: the value holds a NUL character")
    if len(key.encode()) + len(value.encode()) + 1 > STRING_LIMIT_BYTES:
        raise InvalidSpec(f"envs {show(key)}: longer than {STRING_LIMIT_BYTES} bytes")
    if key == "HOME" and "\n" in value:
        raise InvalidSpec("envs 'HOME': the value holds a newline")  # GHSA-cm9x-c3rh-7rc4
    return value


def working_directory(requested: str, image: str) -> str:
    """The request's, which has to be absolute, else the image's, else "/". The engine makes it where it is missing."""
    if requested:
        return absolute("working_dir", requested)
    if "\0" in image or len(image.encode()) > PATH_LIMIT_BYTES:
        raise InvalidSpec(f"the image's working directory {show(image)}: not a path")
    return posixpath.normpath("/" + image.lstrip("/"))

"""Where a container's log goes."""

from __future__ import annotations

import posixpath

from cri.translate.field import FILE_LIMIT_BYTES, PATH_LIMIT_BYTES, bounded, no_backsteps, on_host, show
from runtime.errors import InvalidSpec


def log_path(log_directory: str, relative: str) -> str | None:
    """The pod's directory joined with the container's path; None (no log) where either is empty.

    The path can't leave the directory (CVE-2025-0750).
    """
    if not log_directory or not relative:
        return None
    directory = on_host("log_directory", log_directory)
    if relative.startswith("/") or any(ord(c) < 0x20 or ord(c) == 0x7F for c in relative):
        raise InvalidSpec(f"log_path {show(relative)}: not a relative path of printable characters")
    clean = posixpath.normpath(no_backsteps("log_path", relative))
    if clean == "." or relative.endswith("/"):
        raise InvalidSpec(f"log_path {show(relative)}: names a directory")
    for part in clean.split("/"):
        bounded("log_path", part, FILE_LIMIT_BYTES)
    return bounded("log_path", posixpath.join(directory, clean), PATH_LIMIT_BYTES)

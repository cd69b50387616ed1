"""Errors of the unpacking program; they cross to the parent as a kind and a message."""

import os


class BadLayer(Exception):
    """The layer is malformed or hostile."""


class LimitReached(BadLayer):
    """The layer is larger than a limit allows."""


def text_of(error: OSError) -> str:
    """What a confined program tells of an error; it may be of a descriptor, which has no name."""
    name = f"{os.fsdecode(error.filename)!r}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{name}{(error.strerror or str(error)).lower()}"

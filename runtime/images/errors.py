"""Errors of the image room, each a kind of one in `runtime.errors`."""

from runtime.errors import InvalidSpec, Unavailable


class RegistryUnavailable(Unavailable):
    """The registry does not answer, or answers that it can't now. The kubelet looks for the message's prefix."""

    def __init__(self, message: str) -> None:
        super().__init__(f"RegistryUnavailable: {message}")


class RegistryDenied(Unavailable):
    """The registry wants other credentials than those that were given (401, 403)."""


class BadContent(Unavailable):
    """What the registry sent is not what it said: wrong digest, wrong size, no manifest."""


class BadImage(InvalidSpec):
    """An image, archive or layer that is malformed, hostile or beyond a limit."""

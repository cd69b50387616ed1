"""Errors of the image room, each a kind of one in `runtime.errors`."""

from runtime.errors import Damaged, Denied, InvalidSpec, Unavailable


class RegistryUnavailable(Unavailable):
    """The registry does not answer, or answers that it can't now. The kubelet looks for the message's prefix."""

    def __init__(self, message: str) -> None:
        super().__init__(f"RegistryUnavailable: {message}")


class RegistryDenied(Denied):
    """The registry wants other credentials than those that were given (401, 403)."""


class BadContent(Damaged):
    """What the registry sent is not what it said: wrong digest, wrong size, no manifest."""


class SignatureValidationFailed(Denied):
    """A verifier program does not accept the image. The kubelet looks for the message's prefix."""

    def __init__(self, message: str) -> None:
        super().__init__(f"SignatureValidationFailed: {message}")


class BadImage(InvalidSpec):
    """An image, archive or layer that is malformed, hostile or beyond a limit."""

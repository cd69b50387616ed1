"""Errors of the unpacking program; they cross to the parent as a kind and a message."""


class BadLayer(Exception):
    """The layer is malformed or hostile."""


class LimitReached(BadLayer):
    """The layer is larger than a limit allows."""

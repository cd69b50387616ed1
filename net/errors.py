"""Domain errors of the network room, named as those of `runtime.errors` (the rooms don't import each other)."""


class CribError(Exception):
    """Something that a caller can be told; the message is meant for a person."""


class NotFound(CribError):
    """The named object does not exist."""


class AlreadyExists(CribError):
    """Another object holds the name."""


class WrongState(CribError):
    """The object exists but is not in a state that allows the request."""


class InvalidSpec(CribError):
    """The request or the configuration asks for something impossible; the message names field and value."""


class Unsupported(CribError):
    """This host cannot do what was asked."""


class Unavailable(CribError):
    """The network can't be used now: the message names what is in the way."""


class Exhausted(CribError):
    """A limit was reached: addresses, bridge ports, memory, disk."""


class DeadlineExceeded(CribError):
    """A wait reached its deadline; the message names what it waited for."""


class Cancelled(CribError):
    """The caller gave up."""

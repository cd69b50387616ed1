"""What a client's protocol tells a session, whichever protocol it is: streams and their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

UNLIMITED: Final = 1 << 40
"""The room of a stream whose peer sets no limit: the connection's own is what is left."""


class WireError(Exception):
    """The peer broke the protocol, and the connection can't go on."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer opened a stream; its half of it may be `ended` at once."""

    stream: int
    headers: Mapping[str, str]
    ended: bool


@dataclass(frozen=True, slots=True)
class Data:
    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer sends no more on the stream, and still takes."""

    stream: int


@dataclass(frozen=True, slots=True)
class Reset:
    """The peer gave the stream up, in both directions."""

    stream: int


@dataclass(frozen=True, slots=True)
class Room:
    """Streams have room again."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer ended the connection."""


Event: TypeAlias = Opened | Data | Ended | Reset | Room | Closed


class Wire(Protocol):
    """One connection's protocol, sans I/O: bytes in, events out; calls in, bytes out by `take`."""

    def feed(self, data: bytes) -> list[Event]:
        """What `data` from the peer means. Raises WireError, after which `take` has the last words."""
        ...

    def take(self) -> bytes:
        """What is to be sent to the peer, once."""
        ...

    def paced(self) -> bool:
        """Whether the peer sends no more on a stream than was consumed of it; else the connection has to be held up."""
        ...

    def room(self, stream: int) -> int:
        """How many bytes `send` may be given now."""
        ...

    def send(self, stream: int, data: bytes) -> None:
        """Send on a stream; on one that is over, nothing."""
        ...

    def end(self, stream: int) -> None:
        """Send no more on the stream."""
        ...

    def reset(self, stream: int) -> None:
        """Give the stream up."""
        ...

    def consumed(self, stream: int, size: int) -> None:
        """So many bytes that came on the stream have gone where they belong: the peer may send as many again."""
        ...

    def ping(self) -> None:
        """Say something that asks nothing of the peer but an answer, which tells nothing."""
        ...

    def close(self) -> None:
        """Tell the peer that this is the end."""
        ...

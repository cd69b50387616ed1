"""What a token stands for: a call that was checked and waits for its connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.sandbox.pod import Pod


@dataclass(frozen=True, slots=True)
class Streams:
    """Which streams the client asked for; with `tty` there is no stderr."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool


@dataclass(frozen=True, slots=True)
class Exec:
    container: Container
    command: tuple[str, ...]
    streams: Streams


@dataclass(frozen=True, slots=True)
class Attach:
    container: Container
    streams: Streams


@dataclass(frozen=True, slots=True)
class Forward:
    """`ports` are those that WebSocket's own port-forward has channels for; over SPDY a stream names its port."""

    pod: Pod
    ports: tuple[int, ...]


Request: TypeAlias = Exec | Attach | Forward

"""One-time tokens: what Exec, Attach and PortForward hand out, and a client's connection takes up."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from runtime.errors import Exhausted

T = TypeVar("T")
LIFETIME_S: Final = 60.0
PENDING_LIMIT: Final = 1000


class Tokens(Generic[T]):
    """Requests that wait to be taken up, each once, within `LIFETIME_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: dict[str, tuple[float, T]] = {}  # oldest first

    def issue(self, request: T) -> str:
        """A token that can't be guessed. Raises Exhausted while `PENDING_LIMIT` wait."""
        self._expire()
        if len(self._pending) >= PENDING_LIMIT:
            raise Exhausted(f"{PENDING_LIMIT} streaming requests wait for their connections")
        token = secrets.token_urlsafe(24)
        self._pending[token] = (self._clock() + LIFETIME_S, request)
        return token

    def take(self, token: str) -> T | None:
        """What `token` was issued for; None for one that is unknown, used or too old."""
        self._expire()
        found = self._pending.pop(token, None)
        return found[1] if found else None

    def _expire(self) -> None:
        now = self._clock()
        while self._pending:
            token = next(iter(self._pending))
            if self._pending[token][0] > now:
                return
            del self._pending[token]

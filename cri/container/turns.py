"""Turns: what is asked for faster than a pod's monitor starts it waits here, where it costs next to nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from runtime.errors import Exhausted

LIMIT: Final = 512
"""Commands that run or wait, on the whole node; more are refused."""
AT_ONCE: Final = 16
"""Commands of one pod that are on their way. Each takes descriptors of cribd's and of the monitor's."""
BRIEF_S: Final = 1.0
"""What takes longer is no probe: from then on it keeps nobody else from his turn."""


class Turns:
    """One node's. `take` and `end` belong together."""

    def __init__(self) -> None:
        self._all = 0
        self._taken: dict[str, int] = {}  # by pod
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, pod_id: str) -> Turn:
        """Wait for a turn in a pod. Raises Exhausted where too many run or wait already."""
        if self._all >= LIMIT:
            raise Exhausted(f"{LIMIT} commands run or wait already")
        self._all += 1
        if self._taken.get(pod_id, 0) < AT_ONCE:
            self._taken[pod_id] = self._taken.get(pod_id, 0) + 1
            return Turn(self, pod_id)
        waiting = self._waiting.setdefault(pod_id, deque())
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            self._all -= 1
            if mine.done() and not mine.cancelled():
                self.next(pod_id)  # it had been given the turn just then
            raise
        return Turn(self, pod_id)

    def next(self, pod_id: str) -> None:
        """A turn is over: it goes to who waits for the longest time."""
        waiting = self._waiting.get(pod_id, ())
        while waiting:
            mine = waiting.popleft()
            if not mine.done():
                mine.set_result(None)
                return
        self._waiting.pop(pod_id, None)
        self._taken[pod_id] -= 1
        if not self._taken[pod_id]:
            del self._taken[pod_id]

    def ended(self) -> None:
        """A command has ended."""
        self._all -= 1


class Turn:
    """One command's; over when that has ended, or lasts."""

    def __init__(self, turns: Turns, pod_id: str) -> None:
        self._turns = turns
        self._pod_id = pod_id
        self._timer: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(BRIEF_S, self._over)

    def _over(self) -> None:
        self._timer = None
        self._turns.next(self._pod_id)

    def end(self) -> None:
        """The command has ended."""
        self._turns.ended()
        if self._timer:
            self._timer.cancel()
            self._over()

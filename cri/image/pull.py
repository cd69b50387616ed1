"""Pulling, for both services: in a thread of its own, and stopped when the caller goes away."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from runtime.images import Auth, Image, Progress

if TYPE_CHECKING:
    from cri.node import Node

_logger = logging.getLogger(__name__)
# A pull that takes longer says how far it is, as often as that.
_SLOW_S: Final = 5.0


class _Log:
    """Of one pull, as far as it is slow; a context manager in which it tells by itself, also when nothing comes."""

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self._began_s = time.monotonic()
        self.layers: dict[str, Progress] = {}

    async def __aenter__(self) -> _Log:
        self._task = asyncio.create_task(self._tell())
        return self

    async def __aexit__(self, *ignored: object) -> None:
        self._task.cancel()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_SLOW_S)
            self._line("pulling")

    def end(self, outcome: str) -> None:
        if time.monotonic() - self._began_s > _SLOW_S:
            self._line(f"pull {outcome}")

    def _line(self, word: str) -> None:
        layers = list(self.layers.values())
        fields = {
            "image": self._reference,
            "seconds": round(time.monotonic() - self._began_s, 1),
            "layers": f"{sum(news.state in ('done', 'exists') for news in layers)}/{len(layers)}",
            "bytes": sum(news.current_bytes for news in layers),
            "total_bytes": sum(news.total_bytes for news in layers),
        }
        _logger.info(word, extra={"fields": fields})


async def pull(node: Node, reference: str, auth: Auth | None, progress: Callable[[Progress], None] | None) -> Image:
    """The image of `reference`, fetched if it has to be. `progress` is called in the loop.

    Cancelling aborts the transfer; what other pulls of the same layers wait for is theirs to go on with.
    """
    loop, cancelled = asyncio.get_running_loop(), threading.Event()
    shared, outcome = node.metrics.pull() if node.metrics else None, "cancelled"

    def tell(news: Progress) -> None:
        log.layers[news.digest] = news
        if shared:
            shared.news(news)
        if progress is not None:
            loop.call_soon_threadsafe(progress, news)

    async with _Log(reference) as log:
        try:
            image = await node.pull(node.images.pull, reference, auth=auth, progress=tell, cancelled=cancelled)
            outcome = "done"
            return image
        except Exception:
            outcome = "failed"
            raise
        finally:
            cancelled.set()
            log.end(outcome)
            if shared:
                shared.end(outcome)

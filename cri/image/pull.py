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


def _log(reference: str, word: str, began_s: float, layers: dict[str, Progress]) -> None:
    fields = {
        "image": reference,
        "seconds": round(time.monotonic() - began_s, 1),
        "layers": f"{sum(news.state in ('done', 'exists') for news in layers.values())}/{len(layers)}",
        "bytes": sum(news.current_bytes for news in layers.values()),
        "total_bytes": sum(news.total_bytes for news in layers.values()),
    }
    _logger.info(word, extra={"fields": fields})


async def pull(node: Node, reference: str, auth: Auth | None, progress: Callable[[Progress], None] | None) -> Image:
    """The image of `reference`, fetched if it has to be. `progress` is called in the loop.

    Cancelling aborts the transfer; what other pulls of the same layers wait for is theirs to go on with.
    """
    began_s, told_s = time.monotonic(), time.monotonic()
    layers: dict[str, Progress] = {}
    loop, cancelled = asyncio.get_running_loop(), threading.Event()
    shared, outcome = node.metrics.pull() if node.metrics else None, "cancelled"

    def tell(news: Progress) -> None:
        nonlocal told_s
        layers[news.digest] = news
        if shared:
            shared.news(news)
        if time.monotonic() - told_s > _SLOW_S:
            told_s = time.monotonic()
            _log(reference, "pulling", began_s, layers)
        if progress is not None:
            loop.call_soon_threadsafe(progress, news)

    try:
        image = await node.pull(node.images.pull, reference, auth=auth, progress=tell, cancelled=cancelled)
        if time.monotonic() - began_s > _SLOW_S:
            _log(reference, "pulled", began_s, layers)
        outcome = "done"
        return image
    except Exception:
        outcome = "failed"
        raise
    finally:
        cancelled.set()
        if shared:
            shared.end(outcome)

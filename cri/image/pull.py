"""Pulling, for both services: in a thread of its own, and stopped when the caller goes away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.images import Auth, Image, Progress

if TYPE_CHECKING:
    from cri.node import Node


async def pull(node: Node, reference: str, auth: Auth | None, progress: Callable[[Progress], None] | None) -> Image:
    """The image of `reference`, fetched if it has to be. `progress` is called in the loop.

    Cancelling aborts the transfer; what other pulls of the same layers wait for is theirs to go on with.
    """
    loop, cancelled = asyncio.get_running_loop(), threading.Event()

    def tell(news: Progress) -> None:
        if progress is not None:
            loop.call_soon_threadsafe(progress, news)

    try:
        return await node.pull(
            node.images.pull, reference, auth=auth, progress=tell if progress else None, cancelled=cancelled
        )
    finally:
        cancelled.set()

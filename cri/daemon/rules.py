"""The network's rules are put back as soon as somebody has removed them (`nft flush ruleset`), kubelet or not."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cri.node import Node

_BETWEEN_S: Final = 0.1  # looks, however fast others change the ruleset
_logger = logging.getLogger(__name__)


async def guard(node: Node) -> None:
    """Returns only where the kernel tells nothing."""
    changes = await node.work(node.network.changes)
    if changes is None:
        return
    changed = asyncio.Event()

    def note() -> None:
        changes.drain()
        changed.set()

    loop = asyncio.get_running_loop()
    loop.add_reader(changes.fileno(), note)
    try:
        while True:
            await changed.wait()
            changed.clear()
            try:
                await node.work(node.network.restore)
            except Exception as error:
                _logger.warning("rules are not put back", extra={"fields": {"error": str(error)}})
            await asyncio.sleep(_BETWEEN_S)
    finally:
        loop.remove_reader(changes.fileno())
        changes.close()

"""What pods still owe the node is given back in the background, until all of it is, whoever has asked for it before."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final

from cri.sandbox import end
from cri.state.records import SandboxState

if TYPE_CHECKING:
    from cri.node import Node
    from cri.sandbox.pod import Pod

_FIRST_S: Final = 2.0
_LONGEST_S: Final = 60.0
_logger = logging.getLogger(__name__)


async def pay(node: Node) -> None:
    """Never returns. A failed clean-up is tried again, ever more seldom while it goes on failing."""
    wait_s = _FIRST_S
    collected = False
    while True:
        if not collected:  # plugins may take long over it: after the start, and not in its way
            collected = await _tried("garbage of the network", node.work(node.network.collect))
        await asyncio.sleep(wait_s)
        owing = [pod for pod in node.pods if _owes(pod)]
        done = [await _tried(pod.title, end.stop(node, pod)) for pod in owing]
        wait_s = _FIRST_S if all(done) else min(2 * wait_s, _LONGEST_S)


def _owes(pod: Pod) -> bool:
    return pod.record.state is SandboxState.NOTREADY and bool(pod.record.owes)


async def _tried(what: str, work: Awaitable[object]) -> bool:
    try:
        await work
    except Exception as error:
        _logger.warning("giving back failed", extra={"fields": {"of": what, "error": str(error)}})
        return False
    return True

"""StopContainer: a signal, a grace period, and the kill that can't be refused."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from cri.container.end import dead, ended
from cri.state.records import ContainerState
from runtime.errors import CribError

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

_LONGEST_S = 10 * 365 * 86400
_logger = logging.getLogger(__name__)


async def stop(node: Node, container: Container, timeout_s: int) -> None:
    """End the container: its stop signal, and SIGKILL for its cgroup when `timeout_s` have passed; 0 kills at once.

    The signal is sent once, however often this is called, over restarts of cribd too. The earliest deadline that
    any call has set counts for all later ones. A caller that goes away leaves the container as it is then.
    """
    if not container.alive:
        return
    loop = asyncio.get_running_loop()
    by = loop.time() + min(max(timeout_s, 0), _LONGEST_S)
    if container.stop_by is None or by < container.stop_by:
        container.stop_by = by
        if timeout_s > 0:
            node.save_container(container, stop_deadline_ns=time.time_ns() + int((by - loop.time()) * 1e9))
    if timeout_s > 0 and container.state is ContainerState.STARTING:
        await _started(container, container.stop_by - loop.time())
    if timeout_s > 0 and container.state is ContainerState.RUNNING and not container.record.stop_sent:
        await _send(node, container)
    while container.alive:
        left_s = container.stop_by - loop.time()  # another caller may have a shorter one
        if left_s <= 0:
            await node.flights.join(("kill", container.id), lambda: dead(node, container))
        elif not await ended(container, left_s):
            _logger.info("grace period over", extra={"fields": {"container": container.id}})


async def _started(container: Container, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await container.started.wait()
    except TimeoutError:
        pass


async def _send(node: Node, container: Container) -> None:
    """Send the stop signal, noted first: better none than two."""
    node.save_container(container, stop_sent=True)
    if container.pod.running is None:
        return
    try:
        await asyncio.shield(container.pod.running.signal(container.id, container.record.stop_signal))
    except CribError as error:  # it has just ended, or the monitor hangs; the kill needs neither
        _logger.warning("stop signal not sent", extra={"fields": {"container": container.id, "error": str(error)}})

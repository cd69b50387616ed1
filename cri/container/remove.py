"""RemoveContainer."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from cri.container.end import dead
from cri.container.start import spec_of
from runtime.errors import CribError, DeadlineExceeded, NotFound, Unavailable, WrongState

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

_logger = logging.getLogger(__name__)


async def remove(node: Node, container: Container) -> None:
    """Kill the container if it lives, and forget it with its file system. A second caller joins the first."""
    await node.flights.join(("remove", container.id), lambda: _remove(node, container))


async def _remove(node: Node, container: Container) -> None:
    if node.containers.find(container.id) is not container:
        return
    async with container.pod.changing():  # after this it isn't started
        container.removing = True
    await dead(node, container)
    await _poststop(node, container)
    if container.pod.running is not None:
        with contextlib.suppress(NotFound, WrongState, Unavailable, DeadlineExceeded):  # never started, or no monitor
            await container.pod.running.forget(container.id)
    await node.work(node.images.discard, container.id)
    forget(node, container)


async def _poststop(node: Node, container: Container) -> None:
    """Tell hooks and runtime. What fails is logged: the container is gone whatever they say."""
    pod = container.pod
    try:
        await node.engine.stopped(pod.id, container.id, lambda: spec_of(node, container), pod.record.runtime)
    except NotFound:  # no spec: it was never made
        pass
    except CribError as error:
        _logger.warning("hook or runtime failed", extra={"fields": {"container": container.id, "error": str(error)}})


def forget(node: Node, container: Container) -> None:
    """Drop the container's records; its name is free then."""
    container.unprepare()
    node.store.delete(container.id)
    node.containers.discard(container.id)
    node.names.release(container.name, container.id)
    container.pod.containers.pop(container.id, None)
    if container.shown:
        node.events.removed(container.id, container.pod, node.now_ns())

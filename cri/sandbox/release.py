"""Giving back what a pod holds of the node: one idempotent function for every way in which a pod ends.

A failed RunPodSandbox, StopPodSandbox, the loss of a monitor and a cribd that starts again all come here. What is given
back is crossed off the record's `owes`, so that it can be interrupted anywhere and called again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from cri.container import volumes
from cri.container.end import dead, remove_cgroup

if TYPE_CHECKING:
    from cri.node import Node
    from cri.sandbox.pod import Pod

ALL: Final = ("network", "monitor", "volumes", "cgroups")
"""What a pod may owe, in the order of giving back: a network plug-in wants the namespace, which the monitor holds."""

_logger = logging.getLogger(__name__)


async def release(node: Node, pod: Pod) -> None:
    """Kill the pod's containers and give back all that it owes. Tries everything, then raises the first failure."""
    failures: list[Exception] = []

    async def attempt(part: str, act: Callable[[], Awaitable[object]]) -> bool:
        try:
            await act()
        except Exception as error:
            _logger.warning("giving back failed", extra={"fields": {"part": part, "error": str(error)}})
            failures.append(error)
            return False
        return True

    containers = tuple(pod.containers.values())
    await asyncio.gather(*(attempt(one.title, functools.partial(dead, node, one)) for one in containers))
    acts: dict[str, Callable[[], Awaitable[object]]] = {
        "network": lambda: node.work(_disconnect, node, pod),
        "monitor": lambda: _end_monitor(node, pod),
        "volumes": lambda: volumes.unmount(node, pod),
        "cgroups": lambda: _remove_cgroups(node, pod),
    }
    owes = list(pod.record.owes)
    for part in ALL:
        if part in owes and await attempt(part, acts[part]):
            owes.remove(part)
    if tuple(owes) != pod.record.owes:
        node.save(pod, owes=tuple(owes))
    if failures:
        for other in failures[1:]:
            failures[0].add_note(str(other))
        raise failures[0]


def _disconnect(node: Node, pod: Pod) -> None:
    """Give the pod's addresses back, then its namespace."""
    node.network.detach(pod.id, pod.record.netns_path)
    node.pins.unpin(pod.record.netns_path)


async def _end_monitor(node: Node, pod: Pod) -> None:
    await node.engine.stop_pod(pod.id)
    pod.running = None


async def _remove_cgroups(node: Node, pod: Pod) -> None:
    """Remove the cgroups made for the pod, innermost first; one that another pod is in becomes that pod's to remove."""
    for path in reversed(pod.record.cgroups):
        others = (other for other in (*node.pods, *node.making.values()) if other is not pod)
        heir = next((other for other in others if _below(other.record.cgroup_path, path)), None)
        if heir is None:
            await remove_cgroup(node, path)
        elif path not in heir.record.cgroups:
            owes = tuple(dict.fromkeys((*heir.record.owes, "cgroups")))
            node.save(heir, cgroups=(path, *heir.record.cgroups), owes=owes)


def _below(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(ancestor.rstrip("/") + "/")

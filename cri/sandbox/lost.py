"""Listening to a pod's monitor, and what happens when it is gone: no pod is shown running then."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from cri.container.end import UNKNOWN_EXIT, finish, on_exit, take_exit
from cri.container.log import on_log
from cri.sandbox.release import release
from cri.state.records import SandboxState

if TYPE_CHECKING:
    from cri.node import Node
    from cri.sandbox.pod import Pod

_logger = logging.getLogger(__name__)


def watch(node: Node, pod: Pod) -> None:
    """Hear from the pod's monitor: how containers end, and that it is gone itself."""
    if pod.running is None:
        return
    loop = asyncio.get_running_loop()
    pod.running.on_exit = lambda fact: on_exit(node, fact)
    pod.running.on_log = lambda fact: on_log(node, fact)
    pod.running.on_lost = lambda: node.spawn(loop.create_task(lost(node, pod)))


async def lost(node: Node, pod: Pod) -> None:
    """The monitor is gone, and with it every exit it would have told: end what is left, and say so."""
    _logger.error("the pod's monitor is gone", extra={"fields": {"sandbox": pod.id}})
    pod.running = None
    node.engine.drop(pod.id)
    pod.stopping = True
    orphan(node, pod, "the pod's monitor was lost")
    if pod.record.state is SandboxState.READY:
        node.save(pod, state=SandboxState.NOTREADY, message="the pod's monitor was lost", ips=())
    await release(node, pod)


def orphan(node: Node, pod: Pod, why: str) -> None:
    """End the pod's live containers in the records: as the monitor wrote down, else 255 "Unknown"."""
    told = {fact.id: fact for fact in node.engine.exits_on_disk(pod.id)}
    for container in pod.containers.values():
        if not container.alive:
            continue
        if fact := told.get(container.id):
            take_exit(node, container, fact)
        else:
            finish(node, container, UNKNOWN_EXIT, "Unknown", why, time.time_ns())

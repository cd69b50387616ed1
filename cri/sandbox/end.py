"""StopPodSandbox and RemovePodSandbox."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cri.container.remove import remove as remove_container
from cri.sandbox.release import release
from cri.state.records import SandboxState
from runtime.removal import remove_tree

if TYPE_CHECKING:
    from cri.node import Node
    from cri.sandbox.pod import Pod


async def stop(node: Node, pod: Pod) -> None:
    """Kill the pod's containers and give back its address and namespaces; a stopped pod is never used again.

    A second caller joins the first. Raises what could not be given back; calling again tries again.
    """
    await node.flights.join(("stop", pod.id), lambda: _stop(node, pod))


async def _stop(node: Node, pod: Pod) -> None:
    pod.stopping = True  # what is being made, and can be given up, holds the lock no longer
    async with pod.changing():  # after this no container is made or started
        if pod.record.state is not SandboxState.NOTREADY:
            node.save(pod, state=SandboxState.NOTREADY, ips=())
    await release(node, pod)


async def remove(node: Node, pod: Pod) -> None:
    """Stop the pod, remove its containers and forget it; its name is free then. A second caller joins the first."""
    await node.flights.join(("remove", pod.id), lambda: _remove(node, pod))


async def _remove(node: Node, pod: Pod) -> None:
    if node.pods.find(pod.id) is not pod:
        return
    await stop(node, pod)
    results = await asyncio.gather(
        *(remove_container(node, container) for container in tuple(pod.containers.values())), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException):
            raise result
    await node.work(remove_tree, node.directory(pod.id))
    node.store.delete(pod.id)
    node.pods.discard(pod.id)
    node.names.release(pod.name, pod.id)
    node.events.removed(pod.id, pod, node.now_ns())

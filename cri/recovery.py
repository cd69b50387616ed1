"""Taking up what an earlier cribd left: the one function that makes the world match the records.

It runs before the socket is served, can be interrupted anywhere, and never keeps cribd from starting: what can't be
brought in order now stays in the records, as a pod that isn't ready and can be removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Final

from cri.api import cri_pb2 as pb
from cri.container import volumes
from cri.container.container import Container
from cri.container.end import UNKNOWN_EXIT, finish, on_exit, settle
from cri.container.log import on_log
from cri.container.remove import forget
from cri.container.start import START_ERROR_EXIT
from cri.container.update import resume
from cri.sandbox import end
from cri.sandbox.lost import orphan, watch
from cri.sandbox.network import pin_of
from cri.sandbox.pod import Pod
from cri.sandbox.release import release
from cri.state.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from cri.translate.sandbox import sandbox_to_pod
from runtime.errors import CribError
from runtime.removal import remove_tree

if TYPE_CHECKING:
    from cri.node import Node

_AT_ONCE: Final = 32
_ANSWER_S: Final = 1.5
_AGAIN_S: Final = 5.0
_logger = logging.getLogger(__name__)


async def recover(node: Node) -> None:
    """Rebuild the indexes from the records, find the monitors, and end what an interrupted call has begun."""
    sandboxes, containers = node.store.load()
    for record in sandboxes:
        _index_pod(node, record)
    for one in containers:
        _index_container(node, one)
    at_once = asyncio.Semaphore(_AT_ONCE)

    async def bring_up(pod: Pod) -> None:
        async with at_once:
            try:
                await _pod(node, pod)
            except Exception as error:
                _logger.error(
                    "pod not in order", extra={"fields": {"sandbox": pod.id, "error": str(error)}}, exc_info=error
                )

    await asyncio.gather(*map(bring_up, node.pods))
    await _sweep(node)
    if len(node.pods):
        counts = {"pods": len(node.pods), "containers": len(node.containers)}
        _logger.info("taken up", extra={"fields": counts})


def _index_pod(node: Node, record: SandboxRecord) -> None:
    try:
        config = pb.PodSandboxConfig.FromString(record.config)
        pod = Pod(
            record, config, sandbox_to_pod(config, defaults=node.defaults, host=node.host, level=record.selinux_level)
        )
    except Exception as error:  # a request that an older cribd took
        node.store.set_aside("sandbox", record.id, str(error))
        return
    if node.names.holder(pod.name) is None:
        node.names.reserve(pod.name, pod.id)
    node.pods.add(pod.id, pod)


def _index_container(node: Node, record: ContainerRecord) -> None:
    pod = node.pods.find(record.sandbox_id)
    try:
        if pod is None:
            raise LookupError(f"its pod sandbox {record.sandbox_id} is not recorded")
        container = Container(record, pb.ContainerConfig.FromString(record.config), pod)
    except Exception as error:
        node.store.set_aside("container", record.id, str(error))
        return
    if node.names.holder(container.name) is None and container.shown:
        node.names.reserve(container.name, container.id)
    node.containers.add(container.id, container)
    pod.containers[container.id] = container


async def _pod(node: Node, pod: Pod) -> None:
    record = pod.record
    if record.boot_id != node.boot_id:
        _rebooted(node, pod)
    elif record.state is not SandboxState.MAKING and "monitor" in record.owes:
        task = asyncio.create_task(_connect(node, pod))
        done, _ = await asyncio.wait((task,), timeout=_ANSWER_S)
        if not done:  # it may still come: a monitor that is held up is no reason to kill what it watches
            _logger.warning("a monitor takes long to answer", extra={"fields": {"sandbox": pod.id}})
            node.spawn(task)
            return
        await task
    for container in tuple(pod.containers.values()):
        await _container(node, container)
    if record.state is SandboxState.MAKING:
        await release(node, pod)
        await node.work(remove_tree, node.directory(pod.id))
        node.store.delete(pod.id)
        node.pods.discard(pod.id)
        node.names.release(pod.name, pod.id)
    elif pod.record.state is SandboxState.NOTREADY and pod.record.owes:
        await end.stop(node, pod)


async def _connect(node: Node, pod: Pod) -> None:
    """Find the pod's monitor and hear what it has to tell, however long it takes to answer."""
    while True:
        try:
            found = await node.engine.connect(pod.id)
            break
        except (CribError, OSError) as error:
            if pod.trouble != str(error):
                pod.trouble = str(error)
                _logger.warning("monitor does not answer", extra={"fields": {"sandbox": pod.id, "error": pod.trouble}})
            if pod.stopping:
                return
            for fact in node.engine.exits_on_disk(pod.id):  # it may well do its work, and only not be understood
                on_exit(node, fact)
            await asyncio.sleep(_AGAIN_S)
    pod.trouble = ""
    if found is None:
        orphan(node, pod, "the pod's monitor ended while cribd was down")
        if pod.record.state is SandboxState.READY:
            node.save(pod, state=SandboxState.NOTREADY, message="the pod's monitor was lost", ips=())
        pod.stopping = True
        return
    pod.running = found
    watch(node, pod)
    await _compare(node, pod)


def _rebooted(node: Node, pod: Pod) -> None:
    """Nothing of it runs any more; its address is still owed to the network."""
    pod.stopping = True
    orphan(node, pod, "the node was restarted")
    if pod.record.state is not SandboxState.MAKING:
        node.save(pod, state=SandboxState.NOTREADY, boot_id=node.boot_id, message="the node was restarted", ips=())


async def _compare(node: Node, pod: Pod) -> None:
    """Bring the containers' records up to what the monitor knows."""
    facts = {fact.id: fact for fact in await pod.monitor.containers()}
    for container in pod.containers.values():
        fact = facts.pop(container.id, None)
        if container.state is ContainerState.STARTING and fact is not None and fact.started_ns:
            node.save_container(container, state=ContainerState.RUNNING, pid=fact.pid, started_ns=fact.started_ns)
        elif container.state is ContainerState.STARTING:
            with contextlib.suppress(CribError):  # a start that goes on would make what nobody knows of
                await pod.monitor.kill(container.id)
            why = "cribd ended while the container was being started"
            finish(node, container, START_ERROR_EXIT, "StartError", why, time.time_ns())
        elif container.state is ContainerState.RUNNING and fact is None:
            finish(node, container, UNKNOWN_EXIT, "Unknown", "the pod's monitor does not know it", time.time_ns())
        if fact is not None:
            on_log(node, fact)
        if fact is not None and fact.exited is not None:
            on_exit(node, fact.exited)
    for stranger in facts.values():  # its record is gone: the removal was cut short
        _logger.warning("container without a record", extra={"fields": {"container": stranger.id, "sandbox": pod.id}})
        await pod.monitor.kill(stranger.id)


async def _container(node: Node, container: Container) -> None:
    if container.alive:
        with contextlib.suppress(CribError):  # on cgroup v1 a kill that was cut short has left it frozen
            await node.work(node.cgroups.thaw, container.record.cgroup_path)
    if container.record.updating and container.alive:
        await resume(node, container)
    if container.state is ContainerState.CREATING:
        await settle(node, container)
        await node.work(node.images.discard, container.id)
        forget(node, container)
    elif container.record.stop_deadline_ns and container.alive:
        left_s = (container.record.stop_deadline_ns - time.time_ns()) / 1e9
        container.stop_by = asyncio.get_running_loop().time() + left_s
    elif container.state is ContainerState.EXITED:
        await settle(node, container)


async def _sweep(node: Node) -> None:
    """Give back what no record owns."""
    known = {pod.id for pod in node.pods}
    await node.work(node.network.reconcile, known)
    for key in await node.work(node.images.prepared):
        holder = volumes.owner(key)
        if node.containers.find(holder) is None and node.pods.find(holder) is None:
            await node.work(node.images.discard, key)
    for name in await node.work(_names, str(node.directory(""))):
        if name not in known:
            await _stranger(node, name)


async def _stranger(node: Node, id: str) -> None:
    """End a pod whose record is lost or set aside: nobody is shown it, and another may have its place by now."""
    _logger.warning("pod without a record is removed", extra={"fields": {"sandbox": id}})
    try:
        await node.engine.stop_pod(id)
        await node.work(node.pins.unpin, pin_of(id))
        await node.work(remove_tree, node.directory(id))
    except Exception as error:
        _logger.error("pod without a record stays", extra={"fields": {"sandbox": id, "error": str(error)}})


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []

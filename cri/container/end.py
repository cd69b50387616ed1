"""How a container ends: the exit that its monitor tells, the kill that makes sure, and what is given back then."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from cri.state.records import ContainerState
from runtime.engine import ContainerExit
from runtime.errors import DeadlineExceeded, Unavailable

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

UNKNOWN_EXIT: Final = 255
"""The exit code of a container whose end nobody saw."""
_SIGKILL_EXIT: Final = 128 + 9
_logger = logging.getLogger(__name__)


def on_exit(node: Node, fact: ContainerExit) -> None:
    """Take a monitor's word that a container has ended; twice is as good as once."""
    container = node.containers.find(fact.id)
    if container is None:
        _logger.debug("exit of an unknown container", extra={"fields": {"container": fact.id}})
    elif container.state is ContainerState.STARTING:
        container.exit = fact  # StartContainer is about to record the start that this ends
    elif container.state is ContainerState.RUNNING:
        take_exit(node, container, fact)


def take_exit(node: Node, container: Container, fact: ContainerExit) -> None:
    """Record the exit of a running container."""
    reason = "OOMKilled" if fact.oom_killed else "Completed" if fact.code == 0 else "Error"
    finish(node, container, fact.code, reason, "", fact.exited_ns)


def finish(node: Node, container: Container, code: int, reason: str, message: str, finished_ns: int) -> None:
    """Make it EXITED, and give back in the background what only a live container needs."""
    node.save_container(
        container,
        state=ContainerState.EXITED,
        exit_code=code,
        reason=reason,
        message=message,
        finished_ns=max(finished_ns, container.record.started_ns),
        stop_deadline_ns=0,
    )
    container.spec = container.rootfs = container.command = None
    fields = {"container": container.id, "sandbox": container.pod.id, "code": code, "reason": reason}
    _logger.info("container exited", extra={"fields": fields})
    node.spawn(asyncio.get_running_loop().create_task(_settled(node, container)))


async def _settled(node: Node, container: Container) -> None:
    try:
        await settle(node, container)
    except Exception as error:  # RemoveContainer tries again, and tells
        _logger.warning("giving back failed", extra={"fields": {"container": container.id, "error": str(error)}})


async def settle(node: Node, container: Container) -> None:
    """Remove the ended container's cgroup, killing what is left in it. Idempotent.

    It is done at the end and not at removal, so that the kubelet finds the pod's cgroup empty.
    """

    if not container.settled:
        await node.flights.join(("settle", container.id), lambda: _settle(node, container))


async def _settle(node: Node, container: Container) -> None:
    path = container.record.cgroup_path

    def remove() -> bool:
        """As a rule nothing is left in it."""
        if node.cgroups.remove(path):
            return True
        node.cgroups.kill(path)
        return node.cgroups.remove(path)

    if not await node.work(remove):
        await remove_cgroup(node, path)
    container.settled = True


async def dead(node: Node, container: Container) -> None:
    """Kill the container if it lives, and return when nothing of it is left.

    Goes through the cgroup and needs no monitor. Raises DeadlineExceeded where processes outlive SIGKILL (a file
    system that doesn't answer).
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + node.config.limits.kill_timeout_s
    pause_s = 0.05
    while container.alive:
        try:
            async with asyncio.timeout_at(until + 1):
                await node.work(node.cgroups.kill, container.record.cgroup_path)
        except TimeoutError:
            raise DeadlineExceeded(f"{container.title}: killing its cgroup takes too long") from None
        left_s = until - loop.time()
        if await ended(container, min(pause_s, left_s)):
            break
        pause_s = min(2 * pause_s, 1.0)
        if pause_s < 1.0 and left_s > 0:
            continue
        if pids := await node.work(node.cgroups.procs, container.record.cgroup_path):
            if left_s > 0:
                continue
            limit_s = node.config.limits.kill_timeout_s
            raise DeadlineExceeded(f"{container.title}: processes {_some(pids)} live on {limit_s:g} s after SIGKILL")
        if container.state is ContainerState.STARTING and left_s > 0:  # it may not have come to its cgroup yet
            continue
        why = "killed; the pod's monitor did not tell of its end"
        finish(node, container, _SIGKILL_EXIT, "Error", why, time.time_ns())
    await settle(node, container)


async def ended(container: Container, timeout_s: float | None) -> bool:
    """Wait for the container's end, at most `timeout_s`; whether it has ended."""
    if container.ended.is_set():
        return True
    try:
        async with asyncio.timeout(timeout_s):
            await container.ended.wait()
    except TimeoutError:
        pass
    return container.ended.is_set()


async def remove_cgroup(node: Node, path: str) -> None:
    """Remove a cgroup whose processes are dying or dead. Raises Unavailable when it stays busy."""
    pause_s = 0.001
    while not await node.work(node.cgroups.remove, path):
        if pause_s > 0.5:
            raise Unavailable(f"cgroup {path} is still in use by {_some(await node.work(node.cgroups.procs, path))}")
        await asyncio.sleep(pause_s)
        pause_s *= 2


def _some(pids: tuple[int, ...]) -> str:
    return ", ".join(map(str, pids[:8])) + (", …" if len(pids) > 8 else "")

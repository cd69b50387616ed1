"""StartContainer: from CREATED to RUNNING, or to EXITED with reason StartError."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING, Final

import msgspec

from cri.container import host
from cri.container.end import finish, take_exit
from cri.container.log import opened
from cri.state.records import ContainerState
from cri.timing import Timing
from runtime.engine import Cgroup, ContainerStart, Started
from runtime.errors import CribError, DeadlineExceeded, NotFound, WrongState
from runtime.images import RootFs
from runtime.spec import Spec

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

START_ERROR_EXIT: Final = 128
_PREPARED_S: Final = 10.0
_PREPARED: Final = 16
"""So many containers of the node at once have a process, a log and pipes for a start to come: a kubelet starts what it
makes, and what only makes them shall not take more than that."""
_decode_spec: Final = msgspec.json.Decoder(Spec).decode
_logger = logging.getLogger(__name__)


async def start(node: Node, container: Container) -> None:
    """Run the container's process; returns when it has become its program.

    The work goes on when the caller gives up. Raises WrongState unless the container is CREATED in a ready pod, and
    what the start failed with, after which the container is EXITED with code 128.
    """
    await node.flights.join(("start", container.id), lambda: _start(node, container))


async def _start(node: Node, container: Container) -> None:
    timing = Timing()
    async with container.pod.changing():
        container.pod.must_be_ready()
        if container.removing:
            raise WrongState(f"{container.title} is being removed")
        if container.state != ContainerState.CREATED:
            raise WrongState(f"{container.title} is {container.state}, not created")
        node.save_container(container, state=ContainerState.STARTING)
    try:
        started = await _run(node, container, timing)
    except Exception as error:
        _logger.warning("start failed", extra={"fields": {"container": container.id, "error": str(error)}})
        if container.alive:
            finish(node, container, START_ERROR_EXIT, "StartError", str(error), time.time_ns())
        node.spawn(asyncio.get_running_loop().create_task(_forget(container)))  # it may have come no further than here
        raise
    for warning in started.warnings:
        _logger.debug("started without", extra={"fields": {"container": container.id, "what": warning}})
    if not container.alive:  # killed, and given up on, meanwhile
        await node.work(node.cgroups.kill, container.record.cgroup_path)
        raise WrongState(f"{container.title} was killed while it was starting")
    node.save_container(
        container,
        state=ContainerState.RUNNING,
        pid=started.pid,
        started_ns=started.started_ns,
    )
    container.rootfs = None
    asyncio.get_running_loop().call_soon(_keep, node, container, timing, started)  # while the answer is on its way
    if container.exit is not None:
        take_exit(node, container, container.exit)


async def _run(node: Node, container: Container, timing: Timing) -> Started:
    pod, record = container.pod, container.record
    with timing.step("prepare", "take up the spec, the root file system and the cgroup"):
        request = container.prepared
        if request is None:
            rootfs = container.rootfs
            if rootfs is None:  # made by an earlier cribd
                rootfs = await node.work(node.images.prepare, container.id, record.image_id)
            request = _request(node, container, rootfs)
    opening, container.log, container.prepared = container.log, None, None
    log = None
    try:
        async with asyncio.timeout(node.config.limits.start_timeout_s):
            log = await (opening or opened(node, container))
            return await pod.monitor.start(dataclasses.replace(request, log=log))
    except TimeoutError:
        await node.work(node.cgroups.kill, record.cgroup_path)
        limit_s = node.config.limits.start_timeout_s
        raise DeadlineExceeded(f"{container.title} did not start within {limit_s:g} s") from None
    except OSError as error:
        raise CribError(f"{container.title}: {error}") from error
    finally:
        if log:
            os.close(log.fd)


def _keep(node: Node, container: Container, timing: Timing, started: Started) -> None:
    """Record how the start went."""
    at_ns = started.started_ns - sum(step.duration_ns for step in started.timeline)
    for step in started.timeline:
        timing.add(step.phase, step.text, at_ns, step.duration_ns)
        at_ns += step.duration_ns
    try:
        node.store.put_timeline(container.id, timing.timeline())
    except CribError as error:
        _logger.warning("timeline not kept", extra={"fields": {"container": container.id, "error": str(error)}})


def _request(node: Node, container: Container, rootfs: RootFs) -> ContainerStart:
    return ContainerStart(
        id=container.id,
        spec=spec_of(node, container),
        rootfs=rootfs,
        cgroup=Cgroup.of(node.cgroups, container.record.cgroup_path),
        stdin=container.config.stdin,
        stdin_once=container.config.stdin_once,
        pid_target=host.target(node, container),
        runtime=container.pod.record.runtime,
    )


def prepare(node: Node, container: Container) -> None:
    """Begin with what StartContainer needs for a container that was just made, since as a rule it follows at once.

    Its log is opened, its process waits, for a while, where not too many others wait. What goes wrong is for the start
    to tell.
    """
    if container.state is not ContainerState.CREATED or container.rootfs is None or not container.pod.ready:
        return
    if sum(other.log is not None for other in node.containers) >= _PREPARED:
        return
    loop = asyncio.get_running_loop()
    loop.call_later(_PREPARED_S, lambda: node.spawn(loop.create_task(_give_up(container))))
    container.log = loop.create_task(opened(node, container))
    try:
        request = _request(node, container, container.rootfs)
        if container.pod.monitor.prepare(request):
            container.prepared = request
    except (CribError, OSError) as error:
        _logger.debug("not prepared", extra={"fields": {"container": container.id, "error": str(error)}})


async def _give_up(container: Container) -> None:
    if container.state is ContainerState.CREATED:
        container.unprepare()
        await _forget(container)


async def _forget(container: Container) -> None:
    """Have the monitor drop a process that waits for its start."""
    if container.pod.running:
        with contextlib.suppress(CribError):  # there is none, or the monitor is gone, and it with that
            await container.pod.running.forget(container.id)


def spec_of(node: Node, container: Container) -> Spec:
    """The OCI spec that CreateContainer made. Raises NotFound where the record is lost."""
    if container.spec is not None:
        return container.spec
    body = node.store.spec(container.id)
    if body is None:
        raise NotFound(f"{container.title}: its OCI spec is not recorded any more")
    container.spec = _decode_spec(body)
    return container.spec

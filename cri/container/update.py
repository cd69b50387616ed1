"""UpdateContainerResources: limits changed while a container runs."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from cri.api import cri_pb2 as pb
from cri.container.create import encode_spec
from cri.container.start import spec_of
from cri.state.records import ContainerState
from cri.translate.resources import changed
from runtime.errors import CribError, InvalidSpec, WrongState
from runtime.spec import Resources

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

_logger = logging.getLogger(__name__)


async def update(node: Node, container: Container, requested: pb.LinuxContainerResources) -> None:
    """Set the limits that are given and leave the others: all of them or none.

    ContainerStatus tells the new ones. The work goes on when the caller gives up. Raises WrongState unless the
    container is CREATED or RUNNING, InvalidSpec for a limit that is malformed, that the kernel refuses, or that is
    below what is used.
    """
    await node.flights.join(object(), lambda: _update(node, container, requested))


async def _update(node: Node, container: Container, requested: pb.LinuxContainerResources) -> None:
    async with container.pod.changing():
        if container.state not in (ContainerState.CREATED, ContainerState.RUNNING):
            raise WrongState(f"{container.title} is {container.state}: its resources can't be changed")
        spec = spec_of(node, container)
        if spec.linux is None:
            raise InvalidSpec(f"{container.title} has no resources")
        wanted = changed(spec.linux.resources or Resources(), requested, cgroup_version=node.cgroups.version)
        node.save_container(container, updating=requested.SerializeToString())
        try:
            await node.work(node.cgroups.update, container.record.cgroup_path, wanted)
        except CribError:
            node.save_container(container, updating=b"")
            raise
        container.spec = msgspec.structs.replace(spec, linux=msgspec.structs.replace(spec.linux, resources=wanted))
        shown = merged(container.resources, requested, wanted).SerializeToString()
        node.save_container(container, spec=encode_spec(container.spec), resources=shown, updating=b"")


async def resume(node: Node, container: Container) -> None:
    """Make an update again that the end of cribd may have cut in two, so that what is told is in force."""
    try:
        await update(node, container, pb.LinuxContainerResources.FromString(container.record.updating))
    except CribError as error:  # refused, as perhaps before: what it had changed by then goes back to what is told
        fields = {"container": container.id, "error": str(error)}
        _logger.warning("an update that was cut short can't be made", extra={"fields": fields})
        linux = spec_of(node, container).linux
        if linux is not None and linux.resources is not None:
            with suppress(CribError):
                await node.work(node.cgroups.update, container.record.cgroup_path, linux.resources)


def merged(
    current: pb.LinuxContainerResources, requested: pb.LinuxContainerResources, wanted: Resources
) -> pb.LinuxContainerResources:
    """What ContainerStatus shows after an update to `wanted`: `current` with what `requested` names over it.

    What an update doesn't change, the processes' oom_score_adj, stays as it is.
    """
    result = pb.LinuxContainerResources()
    result.CopyFrom(current)
    pages = {limit.page_size: limit.limit for limit in (*current.hugepage_limits, *requested.hugepage_limits)}
    result.MergeFrom(requested)
    result.oom_score_adj = current.oom_score_adj
    if result.memory_swap_limit_in_bytes and wanted.memory and wanted.memory.swap:
        result.memory_swap_limit_in_bytes = wanted.memory.swap
    del result.hugepage_limits[:]
    result.hugepage_limits.extend(pb.HugepageLimit(page_size=size, limit=limit) for size, limit in pages.items())
    return result

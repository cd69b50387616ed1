"""UpdateContainerResources: limits changed while a container runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cri.api import cri_pb2 as pb
from cri.container.create import encode_spec
from cri.container.start import spec_of
from cri.state.records import ContainerState
from cri.translate.resources import changed
from runtime.errors import InvalidSpec, WrongState
from runtime.spec import Resources

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node


async def update(node: Node, container: Container, requested: pb.LinuxContainerResources) -> None:
    """Set the limits that are given and leave the others: all of them or none.

    ContainerStatus tells the new ones. Raises WrongState unless the container is CREATED or RUNNING, InvalidSpec for a
    limit that is malformed, that the kernel refuses, or that is below what is used.
    """
    async with container.pod.changing():
        if container.state not in (ContainerState.CREATED, ContainerState.RUNNING):
            raise WrongState(f"{container.title} is {container.state}: its resources can't be changed")
        spec = spec_of(node, container)
        if spec.linux is None:
            raise InvalidSpec(f"{container.title} has no resources")
        wanted = changed(spec.linux.resources or Resources(), requested, cgroup_version=node.cgroups.version)
        await node.work(node.cgroups.update, container.record.cgroup_path, wanted)
        container.spec = msgspec.structs.replace(spec, linux=msgspec.structs.replace(spec.linux, resources=wanted))
        shown = merged(container.resources, requested).SerializeToString()
        node.save_container(container, spec=encode_spec(container.spec), resources=shown)


def merged(current: pb.LinuxContainerResources, requested: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    """What ContainerStatus shows after an update: `current` with what `requested` names over it."""
    result = pb.LinuxContainerResources()
    result.CopyFrom(current)
    pages = {limit.page_size: limit.limit for limit in (*current.hugepage_limits, *requested.hugepage_limits)}
    result.MergeFrom(requested)
    del result.hugepage_limits[:]
    result.hugepage_limits.extend(pb.HugepageLimit(page_size=size, limit=limit) for size, limit in pages.items())
    return result

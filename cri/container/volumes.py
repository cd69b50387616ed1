"""Image volumes: images whose layers a container holds, read-only, besides those of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cri.state.records import VolumeRecord
from cri.translate.mounts import image_volumes
from runtime.errors import CribError, NotFound

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node


def owner(key: str) -> str:
    """The container that holds what `Images.prepared` lists as `key`."""
    return key.partition(".")[0]


def hold(node: Node, container: Container) -> tuple[VolumeRecord, ...]:
    """Keep the images of the request's volumes; blocks. Raises NotFound for an image or sub path that isn't there."""
    held = []
    for number, volume in enumerate(image_volumes(container.config.mounts)):
        wanted = volume.image.image or volume.image.image_ref
        try:
            image = node.images.get(wanted)
            if volume.sub_path and not node.images.has(image.id, volume.sub_path):
                raise NotFound(f"image_sub_path {volume.sub_path!r}: not in image {wanted}")
            rootfs = node.images.prepare(f"{container.id}.{number}", image.id)
        except CribError as error:
            raise type(error)(f"ImageVolumeMountFailed: mounts {volume.target!r}: {error}") from error
        # The empty directory on top: a single layer makes no overlay.
        lowers = (rootfs.upper, *(f"{rootfs.base}/{name}" for name in rootfs.lowers))
        held.append(VolumeRecord(target=volume.target, image_id=image.id, lowers=lowers))
    return tuple(held)


def release(node: Node, container: Container) -> None:
    """Let go of the root file system and of all volumes; blocks. Raises Unavailable."""
    for number in range(sum(mount.HasField("image") for mount in container.config.mounts)):
        node.images.discard(f"{container.id}.{number}")
    node.images.discard(container.id)

"""Image volumes: images that are mounted once per pod, read-only, for those of its containers that ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cri.state.records import PodImage, VolumeRecord
from cri.translate.mounts import image_volumes
from runtime.errors import CribError, NotFound
from runtime.volumes import part

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node
    from cri.sandbox.pod import Pod


def owner(key: str) -> str:
    """The container or pod that holds what `Images.prepared` lists as `key`."""
    return key.partition(".")[0]


async def mount(node: Node, container: Container) -> tuple[VolumeRecord, ...]:
    """Have the images of the request's volumes mounted; with the pod locked.

    They stay until the pod is stopped. Raises NotFound for an image or sub path that isn't there, Unavailable.
    """
    held = []
    for volume in image_volumes(container.config.mounts):
        wanted = volume.image.image or volume.image.image_ref
        try:
            image = await node.work(node.images.get, wanted)
            if volume.sub_path and not await node.work(node.images.has, image.id, volume.sub_path):
                raise NotFound(f"image_sub_path {volume.sub_path!r}: not in image {wanted}")
            path = await _mounted(node, container.pod, image.id)
            source = await node.work(part, path, volume.sub_path) if volume.sub_path else path
        except CribError as error:
            raise type(error)(f"ImageVolumeMountFailed: mounts {volume.target!r}: {error}") from error
        held.append(VolumeRecord(target=volume.target, image_id=image.id, source=source))
    return tuple(held)


async def _mounted(node: Node, pod: Pod, image_id: str) -> str:
    """Where the pod has the image, which is mounted when it isn't yet."""
    found = next((one for one in pod.record.images if one.image_id == image_id), None)
    if found is None:
        found = PodImage(image_id=image_id, key=f"{pod.id}.{len(pod.record.images)}")
        node.save(pod, images=(*pod.record.images, found))
    return await node.work(_mount, node, pod, found)


def _mount(node: Node, pod: Pod, image: PodImage) -> str:
    rootfs = node.images.prepare(image.key, image.image_id)
    # The empty directory on top: a single layer makes no overlay.
    lowers = (rootfs.upper, *(f"{rootfs.base}/{name}" for name in rootfs.lowers))
    name = image.image_id.rpartition(":")[2]
    return node.engine.volumes.image(pod.id, name, lowers, pod.monitor.namespaces.user, pod.plan.selinux.file)


async def unmount(node: Node, pod: Pod) -> None:
    """Unmount the pod's images and let go of their layers; its containers are dead. Raises Unavailable."""

    def release() -> None:
        node.engine.volumes.remove(pod.id)
        for image in pod.record.images:
            node.images.discard(image.key)

    if pod.record.images or node.engine.volumes.holds(pod.id):
        await node.work(release)
    if pod.record.images:
        node.save(pod, images=())

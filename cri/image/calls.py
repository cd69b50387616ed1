"""The CRI's image service: what the store does, as calls."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

from cri.api import cri_pb2 as pb
from cri.image.pull import pull
from cri.node import Node
from cri.rpc import Call, Handler, streamed
from cri.translate.image import image_to_cri
from runtime.errors import InvalidSpec, NotFound
from runtime.images import Auth, FsUsage, Image


class ImageCalls:
    """Requests in, answers out."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "ListImages": self.list,
            "StreamImages": streamed(self.list, pb.StreamImagesResponse),
            "ImageStatus": self.status,
            "PullImage": self.pull,
            "RemoveImage": self.remove,
            "ImageFsInfo": self.fs_info,
        }

    async def list(self, request: pb.ListImagesRequest, call: Call) -> pb.ListImagesResponse:
        return pb.ListImagesResponse(images=map(image_to_cri, self._listed(request.filter)))

    async def status(self, request: pb.ImageStatusRequest, call: Call) -> pb.ImageStatusResponse:
        """A missing image is an answer without one, not an error."""
        image = self._find(_named(request.image))
        if image is None:
            return pb.ImageStatusResponse()
        return pb.ImageStatusResponse(image=image_to_cri(image), info=_info(image) if request.verbose else {})

    async def pull(self, request: pb.PullImageRequest, call: Call) -> pb.PullImageResponse:
        """Goes on as long as bytes come and the caller waits: the kubelet sets no deadline."""
        self._node.handlers.options(request.image.runtime_handler)  # all have the one store
        auth = _auth(request.auth) if request.HasField("auth") else None
        image = await pull(self._node, _named(request.image), auth, None)
        return pb.PullImageResponse(image_ref=image.id)

    async def remove(self, request: pb.RemoveImageRequest, call: Call) -> pb.RemoveImageResponse:
        """Removes the image with all its names; one that isn't there is removed already."""
        await self._node.work(self._node.images.remove, _named(request.image))
        return pb.RemoveImageResponse()

    async def fs_info(self, request: pb.ImageFsInfoRequest, call: Call) -> pb.ImageFsInfoResponse:
        images, containers = await self._node.work(self._node.images.fs_info)
        return pb.ImageFsInfoResponse(image_filesystems=_usages(images), container_filesystems=_usages(containers))

    def _listed(self, wanted: pb.ImageFilter) -> Sequence[Image]:
        if not wanted.image.image:
            return self._node.images.list()
        found = self._find(wanted.image.image)
        return [found] if found else []

    def _find(self, reference: str) -> Image | None:
        try:
            return self._node.images.get(reference)
        except NotFound:
            return None


def _usages(usages: list[FsUsage]) -> list[pb.FilesystemUsage]:
    now_ns = time.time_ns()
    return [
        pb.FilesystemUsage(
            timestamp=now_ns,
            fs_id=pb.FilesystemIdentifier(mountpoint=usage.mountpoint),
            used_bytes=pb.UInt64Value(value=usage.used_bytes),
            inodes_used=pb.UInt64Value(value=usage.inodes_used),
        )
        for usage in usages
    ]


def _named(image: pb.ImageSpec) -> str:
    if not image.image:
        raise InvalidSpec("image.image is missing")
    return image.image


def _auth(auth: pb.AuthConfig) -> Auth:
    return Auth(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
        server_address=auth.server_address,
    )


def _info(image: Image) -> dict[str, str]:
    """The verbose part of ImageStatus; the image's own configuration as its author published it."""
    return {"info": json.dumps({"chainID": image.chain_id, "imageSpec": json.loads(image.raw_config)})}

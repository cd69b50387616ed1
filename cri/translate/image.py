"""An image of the store as CRI's message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cri.api import cri_pb2 as pb
from cri.translate.user import image_identity

if TYPE_CHECKING:
    from runtime.images import Image


def image_to_cri(image: Image) -> pb.Image:
    """CRI's Image. Either uid or username is set, which the kubelet's runAsNonRoot reads."""
    uid, username = image_identity(image.config.user)
    return pb.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        size=image.size_bytes,
        uid=None if uid is None else pb.Int64Value(value=uid),
        username=username,
        pinned=image.pinned,
    )

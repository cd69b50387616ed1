"""The form in which a layer lies on the disk: overlayfs', with one attribute of crib's."""

import os
import stat

OPAQUE = "trusted.overlay.opaque"
# On the root of a layer that lists it: what the container's root is to look like.
ROOT_LISTED = "trusted.crib.root"
# Overlay's own attributes could redirect lookups; labels and measurements belong to the host.
REFUSED_XATTRS = (
    *(b"trusted.overlay.", b"user.overlay.", b"trusted.crib."),
    *(b"security.selinux", b"security.ima", b"security.evm"),
)
# How archives say it (OCI image-spec, layer.md).
WHITEOUT = b".wh."
OPAQUE_MARK = b".wh..wh..opq"


def is_whiteout(there: os.stat_result) -> bool:
    return stat.S_ISCHR(there.st_mode) and there.st_rdev == 0

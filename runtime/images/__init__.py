"""Images: from a registry or an archive to the layers, upper and work directories of a container's overlay.

The names below load on first use, because the program that unpacks layers (`runtime.images.unpack`) starts once per
layer and must not pay for the store and its libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.images.image import Auth, FsUsage, Image, ImageConfig, ImagesConfig, Progress, RootFs
    from runtime.images.store import Images
    from runtime.images.volumes import Copying, Owner

_ELSEWHERE = {"Images": "store", "Copying": "volumes", "Owner": "volumes"}
__all__ = [
    "Auth",
    "Copying",
    "FsUsage",
    "Image",
    "ImageConfig",
    "Images",
    "ImagesConfig",
    "Owner",
    "Progress",
    "RootFs",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"runtime.images.{_ELSEWHERE.get(name, 'image')}"), name)

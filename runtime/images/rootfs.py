"""Containers' root file systems: an upper and a work directory each, and the image's layers below them. Beside them
are directories for the image's VOLUMEs (`runtime.images.volumes`)."""

import logging
import os
import re
import stat
import threading
from collections.abc import Collection
from pathlib import Path

from runtime.errors import CribError, InvalidSpec, NotFound, Unavailable, of_disk
from runtime.images.image import RootFs
from runtime.images.layers import short_name, usage_of
from runtime.images.records import RootFsRecords, StoredRootFs
from runtime.images.shelf import Shelf
from runtime.images.unpack.form import ROOT_LISTED
from runtime.linux.files import spread
from runtime.removal import remove_tree

log = logging.getLogger(__name__)

_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


def lowers(layers: tuple[int, ...]) -> tuple[str, ...]:
    """The short names of an image's layers, topmost first.

    A layer that comes twice counts where it is topmost; the kernel refuses it twice.
    """
    return tuple(map(short_name, dict.fromkeys(layers[::-1])))


class Roots:
    """Thread-safe; calls for one container come one at a time. Each root file system holds its layers."""

    def __init__(self, directory: Path, shelf: Shelf, records: RootFsRecords) -> None:
        self._directory = directory
        self._shelf = shelf
        self._records = records
        self._lock = threading.Lock()
        self._prepared: dict[str, StoredRootFs] = {}

    def load(self, layers: Collection[int]) -> list[tuple[int, ...]]:
        """Read the records; returns the layers of each, to be held. One that lacks a layer, or was about to be made or
        removed, is forgotten."""
        # A new directory looks at all that were removed within minutes in its group of an ext4 without a journal: 90 µs
        # for each mount point of a container, on a node where they come and go.
        spread(str(self._directory))
        present = set(os.listdir(self._directory))
        for rootfs in self._records.all():
            if rootfs.container in present and all(number in layers for number in rootfs.layers):
                self._prepared[rootfs.container] = rootfs
                continue
            if rootfs.container in present:
                log.error("root file system of %s lacks a layer and is removed", rootfs.container)
            self._records.remove(rootfs.container)
        return [rootfs.layers for rootfs in self._prepared.values()]

    def image(self, container_id: str) -> str | None:
        """The image that a container's root file system is prepared from."""
        rootfs = self._prepared.get(container_id)
        return rootfs.image if rootfs else None

    def layers(self, container_id: str) -> tuple[int, ...]:
        """The layers that a container's root file system holds."""
        return self._prepared[container_id].layers

    def all(self) -> list[str]:
        with self._lock:
            return list(self._prepared)

    def get(self, container_id: str) -> RootFs:
        """Raises NotFound."""
        rootfs = self._prepared.get(container_id)
        if rootfs is None:
            raise NotFound(f"container {container_id} has no root file system")
        directory = f"{self._directory}/{container_id}"
        return RootFs(str(self._shelf.base), lowers(rootfs.layers), f"{directory}/upper", f"{directory}/work")

    def make(self, container_id: str, image: str, layers: tuple[int, ...]) -> RootFs:
        """Record and make the directories; takes over the caller's hold on the layers, also when it fails.

        Raises InvalidSpec, Unavailable, Exhausted.
        """
        try:
            if not _CONTAINER_ID.fullmatch(container_id):
                raise InvalidSpec(f"container id {container_id[:200]!r} can't be a directory's name")
            self._records.add(StoredRootFs(container_id, image, layers))
        except BaseException:
            self._shelf.remove(self._shelf.release(layers))
            raise
        with self._lock:
            self._prepared[container_id] = StoredRootFs(container_id, image, layers)
        rootfs = self.get(container_id)
        try:
            self._make_directories(rootfs)
        except OSError as error:
            try:
                self.discard(container_id)
            except Unavailable as left:
                log.warning("%s", left)
            raise of_disk(f"root file system of {container_id}", error) from error
        return rootfs

    def _make_directories(self, rootfs: RootFs) -> None:
        """In full or not at all: they get their name when they are complete."""
        directory = os.path.dirname(rootfs.upper)
        made = f"{self._directory}/.{os.path.basename(directory)}.{os.urandom(4).hex()}"
        upper = f"{made}/upper"
        # The merged root directory looks like the upper one.
        root = os.stat(_root(rootfs))
        for path in (made, f"{made}/work", upper):
            os.mkdir(path, 0o700)
        if root.st_uid or root.st_gid:
            os.chown(upper, root.st_uid, root.st_gid)
        os.chmod(upper, stat.S_IMODE(root.st_mode))
        os.rename(made, directory)

    def discard(self, container_id: str) -> None:
        """Remove the directories, then the record; unknown is fine. Raises Unavailable."""
        if container_id not in self._prepared:
            return
        doomed = self._directory / f".{container_id}"
        try:
            _rename_aside(self._directory / container_id, doomed)
            remove_tree(doomed)
        except OSError as error:
            raise Unavailable(f"root file system of {container_id}: {error}") from error
        try:
            self._records.remove(container_id)
        except CribError as error:  # a full disk; without directories the next start forgets it
            log.warning("record of the removed root file system of %s is left behind: %s", container_id, error)
        with self._lock:
            rootfs = self._prepared.pop(container_id, None)
        if rootfs is not None:
            self._shelf.remove(self._shelf.release(rootfs.layers))

    def volumes(self, container_id: str) -> str:
        """Where the container's directories for the image's VOLUMEs are, if it has any."""
        return f"{self._directory}/{container_id}/volumes"

    def usage(self, container_id: str) -> tuple[int, int]:
        """Bytes and inodes in the upper directory, and in those of the image's VOLUMEs. Raises NotFound."""
        written = [self.get(container_id).upper]
        volumes = self.volumes(container_id)
        try:
            if os.path.lexists(volumes):
                written += (f"{volumes}/{name}" for name in os.listdir(volumes))
            return usage_of(f"{directory}/{name}" for directory in written for name in os.listdir(directory))
        except FileNotFoundError:  # it is being discarded
            return 0, 0


def _rename_aside(directory: Path, doomed: Path) -> None:
    """What is removed isn't half there under its own name, where that can be. Raises OSError."""
    try:
        os.rename(directory, doomed)
    except FileNotFoundError:
        pass  # done when its removal was first tried
    except OSError:  # something is left there, or a full disk has no room for the name
        remove_tree(directory)


def _root(rootfs: RootFs) -> str:
    """The root directory of the topmost layer that lists one."""
    layers = [os.path.join(rootfs.base, name) for name in rootfs.lowers]
    for layer in layers:
        try:
            os.getxattr(layer, ROOT_LISTED)
            return layer
        except OSError:
            continue
    return layers[0]

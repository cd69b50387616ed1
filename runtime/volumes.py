"""What is mounted on the host for pods: images once per pod, and /dev/shm where a kernel can't hold it detached.

All of it lies below one mount of crib's own, which is private: nothing of it propagates, and a container gets a copy by
binding it. Linux 5.15 to 6.14 can't clone a detached mount, and an OCI runtime needs a path: hence on the host.
"""

import os
import threading
from pathlib import Path

from runtime.errors import NotFound, Unavailable
from runtime.linux import files, mount
from runtime.linux.lib import SyscallError
from runtime.plan.layers import context_option, overlay


class Volumes:
    """Mounts below `directory`, by pod. Thread-safe; it blocks."""

    def __init__(self, directory: Path, *, overlay_of_descriptors: bool) -> None:
        self._directory = directory
        self._descriptors = overlay_of_descriptors
        self._lock = threading.Lock()

    def image(self, pod_id: str, name: str, lowers: tuple[str, ...], user: str, label: str = "") -> str:
        """The path where an image is mounted for the pod, read-only. The same again returns the same.

        `lowers` are its layers' directories, top first, at least two; `user` is the user namespace that they are shown
        through, or "", `label` the SELinux label of its files, or "". Raises Unavailable, and leaves nothing then.
        """
        with self._lock:
            path = self._place(pod_id, name)
            if mount.is_mount_point(path):
                return path
            mapping = -1
            try:
                mapping = os.open(user, os.O_RDONLY | os.O_CLOEXEC) if user else -1
                if self._descriptors:
                    tree = overlay(lowers, mapping, None, "", label)
                    try:
                        _attach(tree, path)
                    finally:
                        os.close(tree)
                else:
                    self._of_mounts(pod_id, lowers, mapping, path, label)
                mount.mount_setattr(mount.AT_FDCWD, path, set_=mount.MountAttr.RDONLY)
            except OSError as error:
                self._clear(path)
                raise Unavailable(f"mounting an image for pod {pod_id}: {error}") from error
            finally:
                if mapping >= 0:
                    os.close(mapping)
            return path

    def _of_mounts(self, pod_id: str, lowers: tuple[str, ...], mapping: int, path: str, label: str) -> None:
        """Mount by layers that are attached for as long; overlay keeps copies of its own."""
        places: list[str] = []
        opened: list[int] = []
        try:
            for number, lower in enumerate(lowers):
                places.append(self._place(pod_id, f"layer{number}"))
                tree = mount.open_tree(lower)
                try:
                    if mapping >= 0:
                        mount.idmap(tree, mapping)
                    _attach(tree, places[-1])
                finally:
                    os.close(tree)
                opened.append(os.open(places[-1], os.O_PATH | os.O_CLOEXEC))
            layers = ":".join(f"/proc/self/fd/{fd}" for fd in opened)
            mount.mount("overlay", path, "overlay", mount.MS.RDONLY, f"lowerdir={layers}{context_option(label)}")
        finally:
            for fd in opened:
                os.close(fd)
            for place in places:
                self._clear(place)

    def shm(self, pod_id: str) -> str:
        """A directory to mount the pod's /dev/shm on."""
        with self._lock:
            return self._place(pod_id, "shm")

    def holds(self, pod_id: str) -> bool:
        """Whether anything may be mounted for the pod. Doesn't block."""
        return os.path.lexists(self._directory / pod_id)

    def remove(self, pod_id: str) -> None:
        """Unmount all that is the pod's; nothing is fine. Raises Unavailable."""
        with self._lock:
            directory = self._directory / pod_id
            try:
                names = os.listdir(directory)
            except FileNotFoundError:
                return
            for name in names:
                self._clear(str(directory / name))
            try:
                directory.rmdir()
                if not any(self._directory.iterdir()):
                    mount.umount(str(self._directory))
                    self._directory.rmdir()
            except OSError as error:
                raise Unavailable(f"unmounting the volumes of pod {pod_id}: {error}") from error

    def _place(self, pod_id: str, name: str) -> str:
        """A directory to mount on, inside the private mount, which is made when it isn't there."""
        os.makedirs(self._directory, 0o700, exist_ok=True)
        if not mount.is_mount_point(str(self._directory)):
            mount.mount(str(self._directory), str(self._directory), "", mount.MS.BIND)
            mount.mount("", str(self._directory), "", mount.MS.PRIVATE)
        path = self._directory / pod_id / name
        os.makedirs(path, 0o700, exist_ok=True)
        return str(path)

    @staticmethod
    def _clear(path: str) -> None:
        """Nothing is removed but mounts and the empty directory."""
        try:
            while mount.is_mount_point(path):
                mount.umount(path)
            os.rmdir(path)
        except (SyscallError, FileNotFoundError):
            pass  # what is left shows when its parent is to be removed


def part(path: str, sub_path: str) -> str:
    """The path of what is at `sub_path` in the read-only tree at `path`, symlinks resolved inside. Raises NotFound."""
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = files.open_in_root(root, sub_path or "/", os.O_PATH)
    except SyscallError as error:
        raise NotFound(f"image_sub_path {sub_path!r}: {(error.strerror or '').lower()}") from error
    finally:
        os.close(root)
    try:
        return os.readlink(f"/proc/self/fd/{found}")
    finally:
        os.close(found)


def _attach(tree: int, path: str) -> None:
    target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mount.move_mount(tree, target, path)
    finally:
        os.close(target)

"""Overlays as detached mounts: of idmapped layers, and of images that are mounted into a container."""

from __future__ import annotations

import os

from runtime.linux import files
from runtime.linux.lib import SyscallError
from runtime.linux.mount import MS, detached, idmap, mount, move_mount, open_tree
from runtime.linux.namespaces import CLONE, unshare
from runtime.plan.plan import Context, Step


class OpenImage(Step):
    """Open an image's file system, or the part of it at `sub_path`, as the detached read-only mount `key`.

    `lowers` are its layers' directories, top first, at least two. `mapped`: shown through the container's mapping.
    `from_descriptors`: see `overlay`; else this process leaves the host's mount namespace, so other sources come first.
    """

    key: str
    lowers: tuple[str, ...]
    sub_path: str
    mapped: bool
    from_descriptors: bool
    at: str

    def run(self, context: Context) -> None:
        mapping = context.fds["user"] if self.mapped else -1
        context.fds[self.key] = overlay(
            self.lowers, mapping, None, "" if self.from_descriptors else self.at, self.sub_path
        )

    def describe(self) -> str:
        part = f", {self.sub_path} of it" if self.sub_path else ""
        return f"open an image of {len(self.lowers)} layers{part}"


def overlay(
    lowers: tuple[str, ...] | list[str], mapping: int, own: tuple[str, str] | None, at: str, sub_path: str = ""
) -> int:
    """An overlay of the directories `lowers`, top first, as a detached mount: all of it or the part at `sub_path`.

    Raises SyscallError.

    `mapping` is the user namespace to show the layers through, or -1. `own`: upper and work directory, None for a
    read-only one. Overlay takes descriptors of detached mounts as layers from Linux 6.15 on; before that, `at` is
    given: a directory to mount over, in a mount namespace that only this process has.
    """
    layers: list[int] = []
    try:
        for path in lowers:
            layers.append(open_tree(path))
            if mapping >= 0:
                idmap(layers[-1], mapping)
        if at:
            return _of_mounts(layers, own, at, sub_path)
        tree = _of_descriptors(layers, own)
        if not sub_path:
            return tree
        try:
            return _part(tree, sub_path)
        finally:
            os.close(tree)
    finally:
        for layer in layers:
            os.close(layer)


def _part(root: int, path: str) -> int:
    """A copy of what is at `path` below the open directory `root`, as a detached mount."""
    try:
        part = files.open_in_root(root, path, os.O_PATH)
    except SyscallError as error:
        raise SyscallError("image volume: sub path", error.errno or 0, path) from None
    try:
        return open_tree("", dirfd=part)
    finally:
        os.close(part)


def _of_descriptors(layers: list[int], own: tuple[str, str] | None) -> int:
    opened = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in own or ()]
    try:
        lowers = [("lowerdir+", layer) for layer in layers]
        return detached("overlay", (*lowers, *zip(("upperdir", "workdir"), opened, strict=False)))
    finally:
        for fd in opened:
            os.close(fd)


def _of_mounts(layers: list[int], own: tuple[str, str] | None, at: str, sub_path: str) -> int:
    unshare(CLONE.NEWNS)
    mount("", "/", "", MS.REC | MS.PRIVATE)
    mount("tmpfs", at, "tmpfs", MS.NOSUID | MS.NODEV | MS.NOEXEC, "mode=700")
    os.chdir(at)
    for number, layer in enumerate((*layers, -1)):
        os.mkdir(str(number))
        target = os.open(str(number), os.O_PATH | os.O_CLOEXEC)
        try:
            if layer >= 0:
                move_mount(layer, target, str(number))
        finally:
            os.close(target)
    options = f"lowerdir={':'.join(str(number) for number in range(len(layers)))}"
    if own:
        options += f",upperdir={own[0]},workdir={own[1]}"
    mount("overlay", str(len(layers)), "overlay", 0, options)
    root = os.open(str(len(layers)), os.O_PATH | os.O_CLOEXEC)  # a part of a mount can't be copied once it is detached
    try:
        return _part(root, sub_path) if sub_path else open_tree("", dirfd=root)
    finally:
        os.close(root)
        os.chdir("/")

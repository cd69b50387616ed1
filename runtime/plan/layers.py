"""Overlays as detached mounts: of idmapped layers, and of images that are volumes."""

from __future__ import annotations

import os

from runtime.linux.mount import MS, detached, idmap, mount, move_mount, open_tree
from runtime.linux.namespaces import CLONE, unshare


def overlay(
    lowers: tuple[str, ...] | list[str], mapping: int, own: tuple[str, str] | None, at: str, label: str = ""
) -> int:
    """An overlay of the directories `lowers`, top first, as a detached mount. Raises SyscallError.

    `label` is the SELinux label of all its files, or "".

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
        return _of_mounts(layers, own, at, label) if at else _of_descriptors(layers, own, label)
    finally:
        for layer in layers:
            os.close(layer)


def context_option(label: str) -> str:
    """What mount(2)'s data ends with for a file system all of whose files have this SELinux label."""
    return f',context="{label}"' if label else ""


def _of_descriptors(layers: list[int], own: tuple[str, str] | None, label: str) -> int:
    opened = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in own or ()]
    try:
        lowers = [("lowerdir+", layer) for layer in layers]
        context = (("context", label),) if label else ()
        return detached("overlay", (*lowers, *zip(("upperdir", "workdir"), opened, strict=False), *context))
    finally:
        for fd in opened:
            os.close(fd)


def _of_mounts(layers: list[int], own: tuple[str, str] | None, at: str, label: str) -> int:
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
    mount("overlay", str(len(layers)), "overlay", 0, options + context_option(label))
    try:
        return open_tree(str(len(layers)))
    finally:
        os.chdir("/")

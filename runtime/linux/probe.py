"""Kernel interfaces newer than the oldest supported kernel (5.15), each tried once at start.

`CRIB_PROBE_FAIL` (names, comma separated) makes probes fail, so that the fallbacks are tested everywhere.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields

from runtime.linux import userns
from runtime.linux.lib import SyscallError
from runtime.linux.mount import detached, idmap, move_mount, open_tree, umount


@dataclass(frozen=True, slots=True)
class Probes:
    """What this kernel can do; each false one has a fallback, named in `FALLBACKS`."""

    clone_detached_mount: bool
    idmapped_mounts: bool
    overlay_of_descriptors: bool
    user_namespaces: bool


FALLBACKS = {
    "clone_detached_mount": "a pod's /dev/shm is one mount in the host's mount namespace (the call came with 6.15)",
    "idmapped_mounts": "mounts with mappings are refused: the file system has no idmapped mounts",
    "overlay_of_descriptors": "a mapped root file system's layers are mounted where only its first process sees them "
    "(overlay takes descriptors of detached mounts from 6.15 on)",
    "user_namespaces": "pods with user namespaces are refused: overlay takes idmapped layers from 5.19 on",
}
_MAPS = ((0, 1 << 20, 1 << 16),)


def probe(directory: str = "") -> Probes:
    """Try each interface. Needs CAP_SYS_ADMIN.

    On the file system of `directory`, where two empty ones are made and kept: the next time the disk may be full. By
    default on that of /var/tmp, and leaves nothing behind.
    """
    if not directory:
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="probe-") as place:
            return probe(place)
    failing = os.environ.get("CRIB_PROBE_FAIL", "").split(",")
    layers = f"{directory}/probe/1", f"{directory}/probe/2"
    for path in layers:
        os.makedirs(path, 0o700, exist_ok=True)
    mapping = _mapping()
    try:
        tried: dict[str, Callable[[], bool]] = {
            "clone_detached_mount": _clone_detached_mount,
            "idmapped_mounts": lambda: _idmapped(directory, mapping),
            "overlay_of_descriptors": lambda: _overlay(*layers, mapping, attached=False),
            "user_namespaces": lambda: any(_overlay(*layers, mapping, attached=how) for how in (False, True)),
        }
        return Probes(**{item.name: item.name not in failing and tried[item.name]() for item in fields(Probes)})
    finally:
        if mapping >= 0:
            os.close(mapping)


def _mapping() -> int:
    """A user namespace, made by a program of its own as cribd never forks itself; -1 where there can be none."""
    program = "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000), flush=True); input()"
    command = [sys.executable, "-I", "-S", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"0\n":
                return -1
            userns.write_maps(process.pid, _MAPS, _MAPS)
            return os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1
        finally:
            process.kill()


def _idmapped(place: str, mapping: int) -> bool:
    if mapping < 0:
        return False
    tree = open_tree(place)
    try:
        idmap(tree, mapping)
    except SyscallError:
        return False
    finally:
        os.close(tree)
    return True


def _overlay(mapped: str, other: str, mapping: int, *, attached: bool) -> bool:
    """Whether overlay takes an idmapped layer, detached or (for a moment, in the host's namespace) attached."""
    if not _idmapped(mapped, mapping):
        return False
    with contextlib.ExitStack() as stack:
        tree = open_tree(mapped)
        stack.callback(os.close, tree)
        try:
            idmap(tree, mapping)
            below = _open(other, stack)
            layers: tuple[tuple[str, str | int], ...] = (("lowerdir+", tree), ("lowerdir+", below))
            if attached:
                target = _open(mapped, stack)
                move_mount(tree, target, mapped)
                stack.callback(umount, mapped)
                layers = (("lowerdir", f"/proc/self/fd/{_open(mapped, stack)}:/proc/self/fd/{below}"),)
            os.close(detached("overlay", layers))
        except SyscallError:
            return False
    return True


def _open(path: str, stack: contextlib.ExitStack) -> int:
    """By descriptor: an option of fsconfig(2) is short."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _clone_detached_mount() -> bool:
    try:
        tree = detached("tmpfs", (("size", "4096"),))
    except SyscallError:
        return False
    try:
        os.close(open_tree("", dirfd=tree))
    except SyscallError:
        return False
    finally:
        os.close(tree)
    return True

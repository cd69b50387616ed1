"""Kernel interfaces newer than the oldest supported kernel (5.15), each tried once at start.

`CRIB_PROBE_FAIL` (names, comma separated) makes probes fail, so that the fallbacks are tested everywhere.
"""

import os
from dataclasses import dataclass, fields

from runtime.linux.lib import SyscallError
from runtime.linux.mount import detached, open_tree


@dataclass(frozen=True, slots=True)
class Probes:
    """What this kernel can do; each false one has a fallback, named in `FALLBACKS`."""

    clone_detached_mount: bool


FALLBACKS = {
    "clone_detached_mount": "a pod's /dev/shm is one mount in the host's mount namespace (the call came with 6.15)",
}


def probe() -> Probes:
    """Try each interface. Needs CAP_SYS_ADMIN; leaves nothing behind."""
    tried = {"clone_detached_mount": _clone_detached_mount}
    failing = os.environ.get("CRIB_PROBE_FAIL", "").split(",")
    return Probes(**{item.name: item.name not in failing and tried[item.name]() for item in fields(Probes)})


def _clone_detached_mount() -> bool:
    try:
        tree = detached("tmpfs", {"size": "4096"})
    except SyscallError:
        return False
    try:
        os.close(open_tree("", dirfd=tree))
    except SyscallError:
        return False
    finally:
        os.close(tree)
    return True

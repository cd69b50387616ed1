"""Kernel parameters by name (sysctl(8)): which namespace they belong to, and which file they are."""

from __future__ import annotations

import re

_IPC = frozenset(
    {
        "kernel.auto_msgmni",
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.msg_next_id",
        "kernel.sem",
        "kernel.sem_next_id",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_next_id",
        "kernel.shm_rmid_forced",
    }
)
_UTS = frozenset({"kernel.hostname", "kernel.domainname"})
_SWAP = str.maketrans("./", "/.")


def dotted(name: str) -> str:
    """The name as sysctl(8) spells it with dots: "net/ipv4/conf/eth0.1/forwarding" is
    "net.ipv4.conf.eth0/1.forwarding". A path below /proc/sys has each "." as "/" and each "/" as "."."""
    separator = re.search(r"[./]", name)
    if separator and separator[0] == "/":
        return name.translate(_SWAP)
    return name


def file(name: str) -> str:
    """The parameter's path below /proc/sys."""
    return dotted(name).translate(_SWAP)


def namespace(name: str) -> str | None:
    """The OCI type of the namespace that a parameter (dotted) belongs to; None: it is the host's."""
    if name.startswith("net."):
        return "network"
    if name in _IPC or name.startswith("fs.mqueue."):
        return "ipc"
    return "uts" if name in _UTS else None

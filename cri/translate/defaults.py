"""What configuration and host decide about a pod or container, beside the request."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from cri.translate.capabilities import ALL, DEFAULT
from runtime.spec import Rlimit

UNLIMITED = (1 << 64) - 1
RLIMITS = tuple(
    Rlimit(type=f"RLIMIT_{name}", soft=soft, hard=hard)
    for name, soft, hard in (
        ("AS", UNLIMITED, UNLIMITED),
        ("CORE", 0, UNLIMITED),
        ("CPU", UNLIMITED, UNLIMITED),
        ("DATA", UNLIMITED, UNLIMITED),
        ("FSIZE", UNLIMITED, UNLIMITED),
        ("LOCKS", UNLIMITED, UNLIMITED),
        ("MEMLOCK", 8 << 20, 8 << 20),
        ("MSGQUEUE", 819_200, 819_200),
        ("NICE", 0, 0),
        ("NOFILE", 1024, 524_288),
        ("NPROC", UNLIMITED, UNLIMITED),
        ("RSS", UNLIMITED, UNLIMITED),
        ("RTPRIO", 0, 0),
        ("RTTIME", UNLIMITED, UNLIMITED),
        ("SIGPENDING", 65_536, 65_536),
        ("STACK", 8 << 20, UNLIMITED),
    )
)
"""Every limit there is, so that a container gets the same ones on every node and never the daemon's: the kernel's
boot-time values, with systemd's 1024:524288 for files; processes and memory are the cgroup's to limit."""
SHM_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """`seccomp_unset` and `apparmor_default`: what a container gets that asks for nothing, and what RuntimeDefault
    means for AppArmor ("" is unconfined). `sysctls` are the node's own additions."""

    capabilities: tuple[str, ...] = DEFAULT
    rlimits: tuple[Rlimit, ...] = RLIMITS
    shm_bytes: int = SHM_BYTES
    sysctls: Mapping[str, str] = field(default_factory=dict)
    umask: int = 0o022
    seccomp_unset: bool = False
    apparmor_default: str = ""
    node_name: str = field(default_factory=lambda: os.uname().nodename)


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor.split("-")[0])


def _capabilities() -> tuple[str, ...]:
    """Those that this process may pass on: a container host may lack some itself."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        sets = [int(line.split()[1], 16) for line in file if line.startswith(("CapPrm:", "CapBnd:"))]
    return tuple(name for number, name in enumerate(ALL) if all(held >> number & 1 for held in sets))


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What this host can do, from the probes made at start; a request for what it can't is refused.

    `apparmor_profiles` are the loaded ones, None where that isn't known. `capabilities` are all that it can give.
    """

    user_namespaces: bool = False
    idmapped_mounts: bool = False
    recursive_read_only: bool = True
    apparmor: bool = False
    apparmor_profiles: Set[str] | None = None
    selinux: bool = False
    selinux_types: tuple[str, str] = ("container_t", "container_file_t")
    capabilities: tuple[str, ...] = field(default_factory=_capabilities)
    machine: str = field(default_factory=lambda: os.uname().machine)
    kernel: tuple[int, int] = field(default_factory=_kernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """Options of a RuntimeClass handler. `annotations` are patterns, as for a shell, of those annotations of pods and
    containers that reach the OCI spec."""

    annotations: tuple[str, ...] = ()
    privileged_without_host_devices: bool = False
    writable_cgroup: bool = False

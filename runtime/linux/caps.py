"""Capabilities: capset(2), the bounding set and the ambient set."""

from __future__ import annotations

import struct

from runtime.linux.lib import syscall
from runtime.linux.process import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    prctl,
)

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

# By number; include/uapi/linux/capability.h.
NAMES: Final = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()
NUMBERS: Final = {f"CAP_{name}": number for number, name in enumerate(NAMES)}
_VERSION_3: Final = 0x20080522


def mask(names: tuple[str, ...]) -> int:
    """The bit mask of capability names (`CAP_CHOWN`). Raises KeyError for an unknown name."""
    bits = 0
    for name in names:
        bits |= 1 << NUMBERS[name]
    return bits


def last_cap() -> int:
    """The highest capability that the running kernel knows."""
    with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
        return int(file.read())


def packed(effective: int, permitted: int, inheritable: int) -> tuple[bytes, bytes]:
    """The two arguments of capset(2) for this process and these bit masks."""
    sets = effective, permitted, inheritable
    halves = [one & 0xFFFFFFFF for one in sets] + [one >> 32 for one in sets]
    return struct.pack("Ii", _VERSION_3, 0), struct.pack("6I", *halves)


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set this process's three sets, as bit masks. Raises SyscallError."""
    syscall("capset", *packed(effective, permitted, inheritable))


def drop_bounding(keep: int, last: int) -> None:
    """Drop every capability up to `last` that is not in the mask `keep` from the bounding set."""
    for number in range(last + 1):
        if not keep >> number & 1:
            prctl(PR_CAPBSET_DROP, number)


def set_ambient(wanted: int) -> None:
    """Make the ambient set exactly the mask `wanted`; each must be permitted and inheritable already."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(wanted.bit_length()):
        if wanted >> number & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)

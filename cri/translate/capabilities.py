"""The five capability sets of a container."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from cri.api import cri_pb2 as pb
from cri.translate.field import show
from runtime.errors import InvalidSpec, Unsupported
from runtime.spec import Capabilities

ALL = tuple(
    f"CAP_{name}"
    for name in (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
        "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
        "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL "
        "SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    ).split()
)
"""In the kernel's order, number 0 first. None was added since 5.9, and 5.15 is the oldest supported kernel."""

DEFAULT = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)
"""containerd's (and Docker's) fourteen. CRI-O's nine lack MKNOD, NET_RAW, SETFCAP, SYS_CHROOT and AUDIT_WRITE;
images are built and tested against the fourteen, and a stricter node asks for less in its configuration."""


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names), key=ALL.index))


def parse(field: str, names: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The names with their CAP_ prefix, in any case of letters, and whether "ALL" was among them."""
    found, every = [], False
    for name in names:
        word = name.upper()
        if word == "ALL":
            every = True
            continue
        word = word if word.startswith("CAP_") else f"CAP_{word}"
        if word not in ALL:
            raise InvalidSpec(f"{field} {show(name)}: not a capability")
        found.append(word)
    return tuple(found), every


def capabilities(
    requested: pb.Capability,
    *,
    default: Sequence[str] = DEFAULT,
    privileged: bool = False,
    uid: int = 0,
    host: Collection[str] = ALL,
) -> Capabilities:
    """The sets a container starts with.

    ALL in add or drop replaces the default by everything or nothing first; then names are added, then dropped, so
    that a name beats ALL. An ambient capability is added like any other and raised in the ambient set, which
    survives execve of a user who is not root; one that is dropped by name is refused.

    Inheritable holds the ambient ones only (CVE-2022-24769). A user who is not root gets no effective or permitted
    capability but the ambient ones: execve would take them away anyhow, and until then they would be a risk.

    `host` are those that can be given at all; the default and ALL are cut down to them.

    Raises:
        InvalidSpec: no such capability, or a contradiction.
        Unsupported: one added by name that the host can't give.
    """
    add, add_all = parse("add_capabilities", requested.add_capabilities)
    drop, drop_all = parse("drop_capabilities", requested.drop_capabilities)
    raised, raise_all = parse("add_ambient_capabilities", requested.add_ambient_capabilities)
    for name in raised:
        if name in drop:
            raise InvalidSpec(f"add_ambient_capabilities {name}: drop_capabilities names it as well")
    for field, names in (("add_capabilities", add), ("add_ambient_capabilities", raised)):
        for name in names:
            if name not in host:
                raise Unsupported(f"{field} {name}: this host doesn't have it to give")
    held = set(default) & set(host)
    if add_all or privileged:
        held = set(host)
    if drop_all and not privileged:
        held = set()
    held |= {*add, *raised}
    if not privileged:
        held -= set(drop)
    ambient = held if raise_all else set(raised)
    own = held if uid == 0 else ambient
    return Capabilities(
        bounding=_sorted(held),
        effective=_sorted(own),
        permitted=_sorted(own),
        inheritable=_sorted(ambient),
        ambient=_sorted(ambient),
    )

"""The few kernel parameters that pods' traffic needs, in this thread's network namespace. Source: ip-sysctl.rst."""

from pathlib import Path
from typing import Final

from net.errors import Unavailable

_ROOT: Final = Path("/proc/sys")


def exists(name: str) -> bool:
    return _path(name).exists()


def read(name: str) -> str:
    """The value; "" where the kernel has no such parameter."""
    try:
        return _path(name).read_text().strip()
    except OSError:
        return ""


def write(name: str, value: str) -> None:
    """Set the parameter unless it already has the value. Raises Unavailable, naming it."""
    path = _path(name)
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        raise Unavailable(f"kernel parameter {name} can't be set to {value}: {error}") from error


def forward_ipv6() -> None:
    """Forward IPv6; interfaces that listen to router advertisements go on doing so, which forwarding would end."""
    if read("net.ipv6.conf.all.forwarding") == "1":
        return
    for accept in _path("net.ipv6.conf").glob("*/accept_ra"):
        if accept.parent.name not in ("all", "default") and accept.read_text().strip() == "1":
            accept.write_text("2")
    write("net.ipv6.conf.all.forwarding", "1")


def _path(name: str) -> Path:
    """The parameter's file. The interface's name, which may hold dots, is the last but one part."""
    parts = name.split(".")
    if len(parts) > 5:
        parts[3:-1] = [".".join(parts[3:-1])]
    return _ROOT.joinpath(*parts)

"""Kernel parameters of a pod: only those that belong to a namespace the pod has of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cri.translate.field import show
from runtime.errors import InvalidSpec
from runtime.spec.sysctl import dotted, namespace

VALUE_LIMIT = 1024
_NAME = re.compile(r"[a-z0-9]([a-zA-Z0-9_-]*[a-zA-Z0-9])?([./][a-zA-Z0-9]([a-zA-Z0-9_-]*[a-zA-Z0-9])?)+")
# No newline, "+" or "=": a value must never become a second setting (CVE-2022-0811).
_VALUE = re.compile(r"[A-Za-z0-9_.,:/ \t-]+")
_OF_INTERFACE = re.compile(r"net\.(ipv4|ipv6|mpls)\.(conf|neigh)\.(?!(all|default|lo)\.)")
UNPRIVILEGED_NETWORK = {
    "net.ipv4.ip_unprivileged_port_start": "0",
    "net.ipv4.ping_group_range": "0 2147483647",
}
"""What a pod with its own network gets unless the request says otherwise: any user may bind any port and send echo
requests, which needs no capability inside one's own network namespace. Both established runtimes do the first."""


def pod_sysctls(
    requested: Mapping[str, str], *, own_network: bool, own_ipc: bool, own_user: bool, default: Mapping[str, str]
) -> dict[str, str]:
    """What is written once the pod's namespaces exist, names dotted, `default` first where the request is silent.

    Raises:
        InvalidSpec: a name or value of bad syntax, or a parameter that is the host's.
    """
    wanted: dict[str, str] = {}
    for name, value in requested.items():
        if len(name) > 256 or not _NAME.fullmatch(name):
            raise InvalidSpec(f"sysctls {show(name)}: not the name of a kernel parameter")
        if len(value) > VALUE_LIMIT or not _VALUE.fullmatch(value):
            raise InvalidSpec(f"sysctls {name}: the value {show(value)} holds a character that no parameter takes")
        key = dotted(name)
        if key in wanted:
            raise InvalidSpec(f"sysctls {show(name)}: given twice")
        _check(key, own_network=own_network, own_ipc=own_ipc)
        wanted[key] = value
    offered = {dotted(name): value for name, value in default.items()}
    if own_network and not own_user:
        offered = UNPRIVILEGED_NETWORK | offered
    for name, value in offered.items():
        if _owned(name, own_network=own_network, own_ipc=own_ipc):
            wanted.setdefault(name, value)
    return wanted


def of_interface(name: str) -> bool:
    """Whether a parameter (dotted) is one of an interface that the pod gets with its address."""
    return _OF_INTERFACE.match(name) is not None


def _owned(name: str, *, own_network: bool, own_ipc: bool) -> bool | None:
    """Whether the pod owns the namespace of this parameter; None for a parameter of no namespace."""
    return {"network": own_network, "ipc": own_ipc}.get(namespace(name) or "")


def _check(name: str, *, own_network: bool, own_ipc: bool) -> None:
    owned = _owned(name, own_network=own_network, own_ipc=own_ipc)
    if owned is None:
        raise InvalidSpec(f"sysctls {name}: belongs to no namespace of a pod, it would change the host")
    if not owned:
        kind = "network" if name.startswith("net.") else "ipc"
        raise InvalidSpec(f"sysctls {name}: the pod is in the host's {kind} namespace")

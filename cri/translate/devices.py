"""Device nodes of a container and the rules of its device cgroup.

What a host path is (symlinks resolved, directories expanded) is found out by the caller and comes as HostDevice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cri.api import cri_pb2 as pb
from cri.translate.field import absolute, on_host, show
from cri.translate.resources import ALL_DEVICE_RULES, DEFAULT_DEVICE_RULES
from runtime.errors import InvalidSpec
from runtime.spec import Device, DeviceCgroup

_NOBODYS = (1 << 32) - 2
"""An id that no user namespace has."""


@dataclass(frozen=True, slots=True)
class HostDevice:
    """A device node of the host: `type` "c" or "b"; `below` is its path under the requested directory, "" if the
    request names the node itself."""

    type: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    below: str = ""


def paths(devices: Iterable[pb.Device]) -> tuple[str, ...]:
    """The host paths that have to be looked up before `devices` can be translated."""
    return tuple(dict.fromkeys(_host_path(device) for device in devices))


def _host_path(device: pb.Device) -> str:
    return on_host("devices.host_path", device.host_path)


def permissions(value: str) -> str:
    """A subset of "rwm" in that order; empty means all of them."""
    if set(value) - set("rwm") or len(set(value)) != len(value):
        raise InvalidSpec(f"devices.permissions {show(value)}: not a subset of rwm")
    return "".join(letter for letter in "rwm" if letter in value) or "rwm"


def container_devices(
    requested: Sequence[pb.Device],
    found: Mapping[str, Sequence[HostDevice]],
    *,
    every: Mapping[str, HostDevice] | None = None,
    mapped: bool = False,
) -> tuple[tuple[Device, ...], tuple[DeviceCgroup, ...]]:
    """Nodes to make and cgroup rules, defaults first.

    `found` holds what each of `paths(requested)` is. `every` are the host's devices by path, given for a privileged
    container, which may use any device; in a user namespace (`mapped`) as anybody, not as their owner.
    """
    nodes: dict[str, Device] = {}
    rules = list(DEFAULT_DEVICE_RULES if every is None else ALL_DEVICE_RULES)
    for path, device in (every or {}).items():
        nodes[path] = _node(path, dataclasses.replace(device, uid=_NOBODYS, gid=_NOBODYS) if mapped else device)
    for entry in requested:
        host = _host_path(entry)
        target = absolute("devices.container_path", entry.container_path or host)
        if target == "/":
            raise InvalidSpec("devices.container_path '/': would be the container's root")
        access = permissions(entry.permissions)
        if not found.get(host):
            raise InvalidSpec(f"devices.host_path {show(host)}: no device there")
        for device in found[host]:
            path = f"{target}/{device.below}" if device.below else target
            nodes[path] = _node(path, device)
            if every is None:
                rules.append(
                    DeviceCgroup(allow=True, type=device.type, major=device.major, minor=device.minor, access=access)
                )
    return tuple(nodes.values()), tuple(rules)


def _node(path: str, device: HostDevice) -> Device:
    return Device(
        path=path,
        type=device.type,
        major=device.major,
        minor=device.minor,
        file_mode=device.mode & 0o7777,
        uid=device.uid,
        gid=device.gid,
    )

"""config.json "root", "mounts" and the device nodes of "linux"."""

from __future__ import annotations

from msgspec import field

from runtime.spec.base import Part


class Root(Part, frozen=True):
    path: str
    readonly: bool = False


class IDMapping(Part, frozen=True):
    container_id: int = field(name="containerID")
    host_id: int = field(name="hostID")
    size: int


class Mount(Part, frozen=True):
    """One mount, in the order of mounting. `options` are OCI's strings, flags and filesystem data mixed."""

    destination: str
    type: str = ""
    source: str = ""
    options: tuple[str, ...] = ()
    uid_mappings: tuple[IDMapping, ...] = ()
    gid_mappings: tuple[IDMapping, ...] = ()


class Device(Part, frozen=True):
    """A node to make: `type` is "c", "b", "u" or "p"; `file_mode` holds permission bits only."""

    path: str
    type: str
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    uid: int | None = None
    gid: int | None = None

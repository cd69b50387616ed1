"""config.json itself and its "linux" member."""

from __future__ import annotations

from msgspec import field

from runtime.spec.base import Part
from runtime.spec.hooks import Hooks
from runtime.spec.mounts import Device, IDMapping, Mount, Root
from runtime.spec.process import Process
from runtime.spec.resources import Resources
from runtime.spec.seccomp import Seccomp

OCI_VERSION = "1.2.0"


class Namespace(Part, frozen=True):
    """`type` is pid, network, ipc, uts, mount, cgroup or user; an empty `path` makes a new one, else it is joined.

    A type that the list does not have is the host's.
    """

    type: str
    path: str = ""


class Linux(Part, frozen=True):
    """`cgroups_path` is absolute below the hierarchy's root and final."""

    namespaces: tuple[Namespace, ...] = ()
    uid_mappings: tuple[IDMapping, ...] = ()
    gid_mappings: tuple[IDMapping, ...] = ()
    devices: tuple[Device, ...] = ()
    cgroups_path: str = ""
    resources: Resources | None = None
    rootfs_propagation: str = ""
    seccomp: Seccomp | None = None
    sysctl: dict[str, str] = field(default_factory=dict)
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    mount_label: str = ""


class Spec(Part, frozen=True):
    """A container as an OCI runtime is told of it: `msgspec.json.encode(spec)` is its config.json."""

    process: Process
    root: Root
    oci_version: str = field(default_factory=lambda: OCI_VERSION)  # a factory, since omit_defaults would drop it
    hostname: str = ""
    domainname: str = ""
    mounts: tuple[Mount, ...] = ()
    hooks: Hooks | None = None
    annotations: dict[str, str] = field(default_factory=dict)
    linux: Linux | None = None

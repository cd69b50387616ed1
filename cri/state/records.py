"""What cribd knows of pods and containers, as it is kept on disk.

A record is written before the resources it names are made, and goes when they are gone. Fields may be added with a
default; any other change raises SCHEMA_VERSION in `cri.state.store`.
"""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

from runtime.external import Runtime

SandboxId = NewType("SandboxId", str)
ContainerId = NewType("ContainerId", str)


class SandboxState(enum.StrEnum):
    MAKING = "making"  # RunPodSandbox is at it: in no list; a cribd that finds one takes it down
    READY = "ready"
    NOTREADY = "notready"


class ContainerState(enum.StrEnum):
    CREATING = "creating"  # CreateContainer is at it: in no list; a cribd that finds one takes it down
    CREATED = "created"
    STARTING = "starting"  # listed as created
    RUNNING = "running"
    EXITED = "exited"


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class PodImage(_Record, frozen=True):
    """An image that is, or is about to be, mounted for a pod; `key` holds its layers (`Images.prepare`)."""

    image_id: str
    key: str


class SandboxRecord(_Record, frozen=True):
    """One pod. Times in ns since the epoch.

    `config` is the request's PodSandboxConfig, serialised deterministically. Its containers' cgroups are below
    `cgroup_path`; `cgroups` are those made for the pod itself, outermost first, `init_cgroup` among them where the pod
    shares a pid namespace. `owes` names what teardown has still to give back, and is empty once all of it is gone.
    `resources` is the last UpdatePodSandboxResourcesRequest, if there was one. `images` are those mounted for the pod.
    `selinux_level` was chosen for it, where SELinux is on.
    `runtime`: who runs its containers for as long as it lives, whatever the configuration says by then; None for the
    built-in engine.
    """

    id: SandboxId
    config: bytes
    handler: str
    state: SandboxState
    created_ns: int
    boot_id: str
    cgroup_path: str
    init_cgroup: str = ""
    cgroups: tuple[str, ...] = ()
    network: bool = False
    netns_path: str = ""
    ips: tuple[str, ...] = ()
    monitor_pid: int = 0
    owes: tuple[str, ...] = ()
    message: str = ""
    resources: bytes = b""
    images: tuple[PodImage, ...] = ()
    selinux_level: str = ""
    runtime: Runtime | None = None


class UserRecord(_Record, frozen=True):
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class VolumeRecord(_Record, frozen=True):
    """An image that a container has at `target`; `source` is where the host has that, or the part of it."""

    target: str
    image_id: str
    source: str = ""


class ContainerRecord(_Record, frozen=True):
    """One container. Times in ns since the epoch, 0 where it has not come to that.

    `config` is the request's ContainerConfig, serialised deterministically. `image_ref` is the repo digest (or the id,
    where the image has none) that ContainerStatus reports, `image_name` what the user asked for. `stop_sent` and
    `stop_deadline_ns` keep a stop going over cribd's restart. `resources` is a LinuxContainerResources once they have
    been updated: `config` stays what was asked for. `updating` is the one that may be half in force.
    """

    id: ContainerId
    sandbox_id: SandboxId
    config: bytes
    image_id: str
    image_ref: str
    image_name: str
    state: ContainerState
    created_ns: int
    cgroup_path: str
    cgroups: tuple[str, ...] = ()
    user: UserRecord | None = None
    volumes: tuple[VolumeRecord, ...] = ()
    log_path: str = ""
    stop_signal: int = 15
    pid: int = 0
    started_ns: int = 0
    finished_ns: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    stop_sent: bool = False
    stop_deadline_ns: int = 0
    resources: bytes = b""
    updating: bytes = b""


class StepRecord(_Record, frozen=True):
    """One step of a start as `crib plan` shows it."""

    phase: str
    text: str
    started_ns: int
    duration_ns: int
    error: str = ""


class Timeline(_Record, frozen=True):
    """What a pod or container was built with. `total_ns` is from the call's arrival to its answer."""

    steps: tuple[StepRecord, ...]
    total_ns: int

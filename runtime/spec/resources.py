"""config.json "linux.resources": what the container's cgroup allows.

Field names and units are OCI's; None means "leave as it is". Values in bytes, microseconds or counts.
"""

from __future__ import annotations

from msgspec import field

from runtime.spec.base import Part


class DeviceCgroup(Part, frozen=True):
    """A device rule, later rules win. `type` "a", "c" or "b"; None for major or minor means all of them."""

    allow: bool
    type: str = "a"
    major: int | None = None
    minor: int | None = None
    access: str = ""


class Memory(Part, frozen=True):
    """`swap` is memory plus swap, as on cgroup v1; -1 is unlimited."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None
    kernel: int | None = None
    kernel_tcp: int | None = field(name="kernelTCP", default=None)
    swappiness: int | None = None
    disable_oom_killer: bool | None = field(name="disableOOMKiller", default=None)
    use_hierarchy: bool | None = None
    check_before_update: bool | None = None


class CPU(Part, frozen=True):
    """`shares` on cgroup v1's scale (2 to 262144); `quota` and `period` in microseconds, quota -1 is unlimited."""

    shares: int | None = None
    quota: int | None = None
    burst: int | None = None
    period: int | None = None
    realtime_runtime: int | None = None
    realtime_period: int | None = None
    cpus: str = ""
    mems: str = ""
    idle: int | None = None


class Pids(Part, frozen=True):
    limit: int


class WeightDevice(Part, frozen=True):
    major: int
    minor: int
    weight: int | None = None
    leaf_weight: int | None = None


class ThrottleDevice(Part, frozen=True):
    major: int
    minor: int
    rate: int


class BlockIO(Part, frozen=True):
    weight: int | None = None
    leaf_weight: int | None = None
    weight_device: tuple[WeightDevice, ...] = ()
    throttle_read_bps_device: tuple[ThrottleDevice, ...] = field(name="throttleReadBpsDevice", default=())
    throttle_write_bps_device: tuple[ThrottleDevice, ...] = field(name="throttleWriteBpsDevice", default=())
    throttle_read_iops_device: tuple[ThrottleDevice, ...] = field(name="throttleReadIOPSDevice", default=())
    throttle_write_iops_device: tuple[ThrottleDevice, ...] = field(name="throttleWriteIOPSDevice", default=())


class HugepageLimit(Part, frozen=True):
    """`page_size` as the kernel writes it in file names: "64KB", "2MB", "1GB"."""

    page_size: str
    limit: int


class InterfacePriority(Part, frozen=True):
    name: str
    priority: int


class NetworkClass(Part, frozen=True):
    class_id: int | None = field(name="classID", default=None)
    priorities: tuple[InterfacePriority, ...] = ()


class Rdma(Part, frozen=True):
    hca_handles: int | None = None
    hca_objects: int | None = None


class Resources(Part, frozen=True):
    """`unified` maps cgroup v2 file names to what is written there, verbatim."""

    devices: tuple[DeviceCgroup, ...] = ()
    memory: Memory | None = None
    cpu: CPU | None = None
    pids: Pids | None = None
    block_io: BlockIO | None = field(name="blockIO", default=None)
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    network: NetworkClass | None = None
    rdma: dict[str, Rdma] = field(default_factory=dict)
    unified: dict[str, str] = field(default_factory=dict)

"""The OCI runtime spec 1.2 as data: the boundary between the API room and the engine."""

from runtime.spec.container import OCI_VERSION, Linux, Namespace, Spec
from runtime.spec.hooks import Hook, Hooks
from runtime.spec.mounts import Device, IDMapping, Mount, Root
from runtime.spec.process import (
    Capabilities,
    ConsoleSize,
    CPUAffinity,
    IOPriority,
    Process,
    Rlimit,
    Scheduler,
    User,
)
from runtime.spec.resources import (
    CPU,
    BlockIO,
    DeviceCgroup,
    HugepageLimit,
    InterfacePriority,
    Memory,
    NetworkClass,
    Pids,
    Rdma,
    Resources,
    ThrottleDevice,
    WeightDevice,
)
from runtime.spec.seccomp import Seccomp, SeccompArg, SeccompRule

__all__ = [
    "CPU",
    "OCI_VERSION",
    "BlockIO",
    "CPUAffinity",
    "Capabilities",
    "ConsoleSize",
    "Device",
    "DeviceCgroup",
    "Hook",
    "Hooks",
    "HugepageLimit",
    "IDMapping",
    "IOPriority",
    "InterfacePriority",
    "Linux",
    "Memory",
    "Mount",
    "Namespace",
    "NetworkClass",
    "Pids",
    "Process",
    "Rdma",
    "Resources",
    "Rlimit",
    "Root",
    "Scheduler",
    "Seccomp",
    "SeccompArg",
    "SeccompRule",
    "Spec",
    "ThrottleDevice",
    "User",
    "WeightDevice",
]

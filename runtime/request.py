"""What the engine is asked for, and what it tells."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.external import Runtime
from runtime.images import RootFs
from runtime.linux.userns import mapped
from runtime.plan.compile import Cgroup, Maps, id_maps
from runtime.spec import Linux, Process, Spec


@dataclass(frozen=True, slots=True)
class PodStart:
    """What a pod's monitor is asked to make. `hostname` None, `net` and `ipc` False: the host's namespace.

    `pid`: a pid namespace shared by the pod's containers, whose init joins `init_cgroup`. `shm_bytes`: size of the
    pod's own /dev/shm, 0 for none. `uids` and `gids`: the mapping of a user namespace that owns the others.
    `mount_label`: the SELinux label of /dev/shm.
    """

    id: str
    hostname: str | None = None
    net: bool = True
    ipc: bool = True
    pid: bool = False
    shm_bytes: int = 64 << 20
    sysctls: Mapping[str, str] = field(default_factory=dict)
    init_cgroup: tuple[str, ...] = ()
    uids: Maps = ()
    gids: Maps = ()
    mount_label: str = ""


@dataclass(frozen=True, slots=True)
class LogFile:
    """Where a container's output goes: `fd` is what `open_log(path)` gave, and stays the caller's; `size` of the file.

    When it has grown to `max_bytes` that is told by `Pod.on_log`; 0 is no limit.
    """

    path: str
    fd: int
    size: int = 0
    max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ContainerStart:
    """A container to start. `log` None: output is read and dropped.

    `stdin`: an attached client can write to it, else it is /dev/null; `stdin_once`: it ends with the first such client.
    `pid_target`: the running container of this pod whose pid namespace it joins, whatever path the spec has for it.
    `runtime`: who runs it, None for the built-in engine.
    """

    id: str
    spec: Spec
    rootfs: RootFs
    cgroup: Cgroup
    log: LogFile | None = None
    stdin: bool = False
    stdin_once: bool = False
    pid_target: str = ""
    runtime: Runtime | None = None

    @property
    def owner(self) -> int:
        """See `owner`."""
        return owner(self.spec.process, self.spec.linux or Linux())


def owner(process: Process, linux: Linux) -> int:
    """The host's number of the user who a process runs as: its pipes are theirs, for /dev/stdout to be opened."""
    return mapped(process.user.uid, id_maps(linux.uid_mappings))


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One part of a start as it went; each began when the one before it ended.

    The first two are the compilation of the plan and the making of the process; the last one's time is until the kernel
    has closed the old program's files.
    """

    phase: str
    text: str
    duration_ns: int


@dataclass(frozen=True, slots=True)
class Started:
    """A container whose process has become its program. `warnings`: what the kernel refused and was done without."""

    pid: int
    started_ns: int
    timeline: tuple[StepTiming, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ContainerExit:
    """How a container ended: `code` is 128 and the signal for one that was killed."""

    id: str
    pid: int
    code: int
    started_ns: int
    exited_ns: int
    oom_killed: bool


@dataclass(frozen=True, slots=True)
class LogLoss:
    """How much of a container's output didn't get into its log, in lines of the log, and why the last of it."""

    lines: int = 0
    size_bytes: int = 0
    cause: str = ""


@dataclass(frozen=True, slots=True)
class ContainerFact:
    """What a monitor knows of a container; `exited` None while it runs. `log_full`: its log has grown to its limit."""

    id: str
    pid: int
    started_ns: int
    exited: ContainerExit | None
    log_loss: LogLoss = LogLoss()
    log_full: bool = False


@dataclass(frozen=True, slots=True)
class ExecStart:
    """A process to run in a running container: `linux` gives its seccomp filter, `runtime` is the container's."""

    id: str
    container_id: str
    process: Process
    linux: Linux
    join_files: tuple[str, ...]
    clone_dir: str
    runtime: Runtime | None = None


@dataclass(frozen=True, slots=True)
class ExecExit:
    code: int
    exited_ns: int

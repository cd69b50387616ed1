"""config.json "process": what runs in the container, and as whom."""

from __future__ import annotations

from msgspec import field

from runtime.spec.base import Part


class User(Part, frozen=True):
    uid: int
    gid: int
    umask: int | None = None
    additional_gids: tuple[int, ...] = ()
    username: str = ""


class Capabilities(Part, frozen=True):
    """The five sets, each of names like "CAP_CHOWN"."""

    bounding: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


class Rlimit(Part, frozen=True):
    """`type` is "RLIMIT_NOFILE" and so on; 2**64-1 is unlimited."""

    type: str
    soft: int
    hard: int


class ConsoleSize(Part, frozen=True):
    height: int
    width: int


class Scheduler(Part, frozen=True):
    policy: str
    nice: int = 0
    priority: int = 0
    flags: tuple[str, ...] = ()
    runtime: int = 0
    deadline: int = 0
    period: int = 0


class IOPriority(Part, frozen=True):
    class_: str = field(name="class")
    priority: int


class CPUAffinity(Part, frozen=True):
    initial: str = ""
    final: str = ""


class Process(Part, frozen=True):
    """`env` holds "K=V" strings in which no key comes twice."""

    cwd: str
    user: User
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    terminal: bool = False
    console_size: ConsoleSize | None = None
    capabilities: Capabilities | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    apparmor_profile: str = ""
    oom_score_adj: int | None = None
    selinux_label: str = ""
    scheduler: Scheduler | None = None
    io_priority: IOPriority | None = None
    exec_cpu_affinity: CPUAffinity | None = field(name="execCPUAffinity", default=None)

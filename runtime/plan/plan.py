"""A plan is data: steps that describe themselves, go over a wire as plain values, and run one after the other."""

from __future__ import annotations

import marshal
import os
import time

from runtime.linux.lib import SyscallError

# Neither typing nor dataclasses at run time: what they import would cost every monitor memory.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


KINDS: Final[dict[str, type[Step]]] = {}


class Context:
    """What the steps of one plan share: descriptors by name, and the root file system being built.

    `fds` holds what the parent handed in and what steps opened for later ones. `announce` tells the parent of a process
    (pid, pidfd) that takes this one's place, `pause` waits for its word to go on, and returns what is wrong, or "".
    """

    __slots__ = ("announce", "directory", "executable", "fds", "pause", "proc_device", "root", "warnings")

    def __init__(self, fds: dict[str, int]) -> None:
        self.fds = fds
        self.announce: Callable[[int, int], None] | None = None
        self.pause: Callable[[], str] | None = None
        self.root = -1
        self.proc_device = 0  # of the container's /proc, once it is mounted
        self.executable = ""
        self.directory = "/"
        self.warnings: list[str] = []

    def take(self, name: str) -> int:
        """The descriptor `name`, which the caller now owns."""
        return self.fds.pop(name)


@dataclass_transform(frozen_default=True)
class Step:
    """One act on the kernel: a record of strings, numbers, booleans and tuples of them, declared like a dataclass's.

    `phase` is the part of a start that it belongs to: namespaces, rootfs, mounts, cgroup, identity, hooks, exec.
    """

    fields: tuple[str, ...] = ()
    phase = "mounts"

    def __init_subclass__(cls) -> None:
        cls.fields = tuple(cls.__annotations__) if "__annotations__" in vars(cls) else ()
        KINDS[cls.__name__] = cls

    def __init__(self, *values: Any, **named: Any) -> None:
        given = dict(zip(self.fields, values, strict=False))
        given.update(named)
        if not len(given) == len(values) + len(named) == len(self.fields) or (named and named.keys() - self.fields):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.fields)}")
        self.__dict__ = given

    def values(self) -> list[Any]:
        """The fields' values, in order."""
        return [self.__dict__[name] for name in self.fields]

    def run(self, context: Context) -> None:
        """Do it. Raises OSError."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for a person: verb, object, options. Never a secret."""
        raise NotImplementedError


Plan = tuple[Step, ...]


def encode(plan: Plan) -> bytes:
    """The plan as plain values, `[[kind, field, …], …]`, in marshal's format 4 (see `runtime.zygote.messages`)."""
    return marshal.dumps([[type(step).__name__, *map(_plain, step.values())] for step in plan], 4)


def _plain(value: Any) -> Any:
    """The value itself, or the number that a flag is."""
    return int(value) if isinstance(value, int) and type(value) not in (int, bool) else value


def decode(data: bytes) -> Plan:
    """The inverse of `encode`. Raises ValueError for an unknown kind."""
    plan = []
    for kind, *fields in marshal.loads(data):
        if kind not in KINDS:
            raise ValueError(f"unknown step {kind!r}")
        plan.append(KINDS[kind](*fields))
    return tuple(plan)


class Outcome:
    """How far a plan came: the time of each step that ran in ns, and the failure if there was one.

    `failed` is the index of the step that failed, or -1; `errno` is 0 where no system call failed.
    """

    __slots__ = ("detail", "durations_ns", "errno", "failed", "started_ns")

    def __init__(self, started_ns: int, durations_ns: list[int], failed: int, errno: int, detail: str) -> None:
        self.started_ns = started_ns
        self.durations_ns = durations_ns
        self.failed = failed
        self.errno = errno
        self.detail = detail


def run(plan: Plan, context: Context, begin: int = 0, end: int | None = None) -> Outcome:
    """Run the steps, or those from `begin` to before `end`, in order, and stop at the first that fails."""
    clock = time.monotonic_ns
    started = time.time_ns()
    durations: list[int] = []
    before = clock()
    for index, step in enumerate(plan[begin:end], begin):
        try:
            step.run(context)
        except SyscallError as error:
            return Outcome(started, durations, index, error.errno or 0, str(error))
        except OSError as error:
            detail = (error.strerror or os.strerror(error.errno or 0)).lower()
            return Outcome(started, durations, index, error.errno or 0, detail)
        after = clock()
        durations.append(after - before)
        before = after
    return Outcome(started, durations, -1, 0, "")

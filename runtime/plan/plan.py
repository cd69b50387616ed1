"""A plan is data: steps that describe themselves, go over a wire as JSON, and run one after the other."""

import dataclasses
import json
import os
import time
from typing import Any, ClassVar, Final

from runtime.linux.lib import SyscallError

KINDS: Final[dict[str, type["Step"]]] = {}


class Context:
    """What the steps of one plan share: descriptors by name, and the root file system being built.

    `fds` holds what the parent handed in and what steps opened for later ones.
    """

    __slots__ = ("directory", "executable", "fds", "root", "warnings")

    def __init__(self, fds: dict[str, int]) -> None:
        self.fds = fds
        self.root = -1
        self.executable = ""
        self.directory = "/"
        self.warnings: list[str] = []

    def take(self, name: str) -> int:
        """The descriptor `name`, which the caller now owns."""
        return self.fds.pop(name)


class Step:
    """One act on the kernel: a frozen dataclass of strings, numbers, booleans and tuples of them."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def run(self, context: Context) -> None:
        """Do it. Raises OSError."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for a person: verb, object, options. Never a secret."""
        raise NotImplementedError

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls


Plan = tuple[Step, ...]


def encode(plan: Plan) -> bytes:
    """The plan as JSON: `[[kind, field, …], …]`."""
    return json.dumps(
        [[type(step).__name__, *(getattr(step, name) for name in step.__dataclass_fields__)] for step in plan],
        separators=(",", ":"),
    ).encode("ascii")


def decode(data: bytes) -> Plan:
    """The inverse of `encode`; tuples come back as lists. Raises ValueError for an unknown kind."""
    plan = []
    for kind, *fields in json.loads(data):
        if kind not in KINDS:
            raise ValueError(f"unknown step {kind!r}")
        plan.append(KINDS[kind](*fields))
    return tuple(plan)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How far a plan came: the time of each step that ran in ns, and the failure if there was one.

    `failed` is the index of the step that failed, or -1; `errno` is 0 where no system call failed.
    """

    started_ns: int
    durations_ns: list[int]
    failed: int
    errno: int
    detail: str


def run(plan: Plan, context: Context) -> Outcome:
    """Run the steps in order and stop at the first that fails."""
    clock = time.monotonic_ns
    started = time.time_ns()
    durations: list[int] = []
    before = clock()
    for index, step in enumerate(plan):
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

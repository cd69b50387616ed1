"""A plan lowered to system calls, for one that comes again as a probe's does: the same acts, in the same order.

A child that runs steps touches some two hundred pages of the interpreter's, each of which is copied for it: half of
what a probe costs. One that makes calls from a list touches few. Only where all goes well: from a step on of which a
call fails the child runs the steps instead, and they decide what that means.
"""

from __future__ import annotations

import os
import resource
import struct

from runtime.linux import caps
from runtime.linux.lib import NR, placed
from runtime.linux.process import (
    CLOSE_RANGE_CLOEXEC,
    KEYCTL_JOIN_SESSION_KEYRING,
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    PR_SET_KEEPCAPS,
    PR_SET_NO_NEW_PRIVS,
    SCHEDULING,
)
from runtime.linux.seccomp import SECCOMP_SET_MODE_FILTER
from runtime.plan import identity

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Final

    from runtime.plan.plan import Plan, Step

    Call = tuple[int, ...]
    """A number, and six arguments."""

SYNC: Final = 3
CONTAINER: Final = 4
_OPENED: Final = 5  # whatever is opened: no lower number is free, and it is closed at once
LABEL: Final = 6
_ROOM: Final = 16  # descriptors; with fewer the steps fail where the calls don't
_PATHS_BYTES: Final = 16 << 10
"""Of the program's candidates, which the pod's author chooses, and the monitor keeps."""
_LAST: Final = 0xFFFFFFFF
_AT_FDCWD: Final = -100
_RESOLVE_NO_MAGICLINKS: Final = 2
_UNLIMITED: Final = (1 << 64) - 1


class Lowered:
    """What a child does, whose descriptors are in order (see `descriptors`).

    `steps` are the calls of each step of `plan` but the last two; what `instead` has is tried where a call fails.
    The program is `named`, or it is the first of `candidates` that can be executed and is no directory, as the call
    tells that succeeds, and the one that fails. `execute` comes before `program` is run; `close` after a call that
    failed.

    Raises NotImplementedError for a plan with what isn't lowered, struct.error for one with an impossible number.
    """

    def __init__(self, plan: Plan) -> None:
        if [type(step) for step in plan[-2:]] != [identity.FindExecutable, identity.Execute]:
            raise NotImplementedError
        *steps, find, execute = plan
        assert isinstance(find, identity.FindExecutable)
        assert isinstance(execute, identity.Execute)
        if "/" not in find.name and len(find.path) + (find.path.count(":") + 1) * len(find.name) > _PATHS_BYTES:
            raise NotImplementedError
        self.plan = plan
        self.close = _call("close", _OPENED)
        self.instead: dict[Call, Call] = {}
        self._buffers: list[Any] = []
        self.steps = [list(self._step(step)) for step in steps]
        self.named = os.fsencode(find.name) if "/" in find.name else b""
        self.candidates = [
            (path, self._access(path, os.X_OK), self._access(path + b"/.", os.F_OK))
            for path in map(os.fsencode, () if self.named else find.candidates())
        ]
        self.program, _ = execute.prepare()
        self.execute = list(self._execute(execute))

    def _call(self, name: str, *arguments: int | bytes) -> Call:
        """As `_call`, with the addresses of strings, which are kept."""
        words = []
        for argument in arguments:
            if isinstance(argument, bytes):
                buffer, argument = placed(argument)
                self._buffers.append(buffer)
            words.append(argument)
        return _call(name, *words)

    def _step(self, step: Step) -> Iterator[Call]:
        if isinstance(step, identity.Detach):
            if step.key_label:
                yield from self._write(identity.KEY_LABEL, step.key_label)
            yield self._call("keyctl", KEYCTL_JOIN_SESSION_KEYRING)
            for name, arguments in SCHEDULING:
                yield self._call(name, *arguments)
            if os.path.exists("/proc/self/numa_maps"):
                yield self._call("set_mempolicy")
            yield self._call("umask")
            yield self._call("chdir", b"/")
            yield self._call("setsid")
        elif isinstance(step, identity.JoinCgroup):
            for name in step.files:
                yield from self._write(name, "0")
        elif isinstance(step, identity.OomScoreAdj):
            yield from self._write("/proc/self/oom_score_adj", str(step.value))
        elif isinstance(step, identity.Rlimits):
            for number, soft, hard in step.limits:
                if number == resource.RLIMIT_NOFILE and soft < _ROOM:
                    raise NotImplementedError
                kept = resource.getrlimit(number)[1] & _UNLIMITED
                wanted = self._limit(number, soft, hard)
                self.instead[wanted] = self._limit(number, min(soft, kept), kept)
                yield wanted
        elif isinstance(step, identity.OpenLabel):
            yield self._open(step.path)
            yield self._call("dup3", _OPENED, LABEL, os.O_CLOEXEC)
            yield self.close
        elif isinstance(step, identity.JoinProcess):
            yield self._call("setns", CONTAINER, step.flags)
            if step.flags & identity.NEWUSER:
                yield from self._identity(0, 0, ())
        elif isinstance(step, identity.WorkingDirectory) and step.path == "/":
            yield self._call("chdir", b"/")
        elif isinstance(step, identity.WorkingDirectory) and step.path.startswith("/"):
            how = struct.pack("3Q", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE_NO_MAGICLINKS)
            yield self._call("openat2", _AT_FDCWD, os.fsencode(step.path), how, len(how))
            yield self._call("fchdir", _OPENED)
            yield self.close
        else:
            raise NotImplementedError

    def _open(self, path: str) -> Call:
        return self._call("openat", _AT_FDCWD, os.fsencode(path), os.O_WRONLY | os.O_CLOEXEC)

    def _write(self, path: str, value: str) -> Iterator[Call]:
        yield self._open(path)
        yield self._call("write", _OPENED, value.encode(), len(value.encode()))
        yield self.close

    def _access(self, path: bytes, mode: int) -> Call:
        return self._call("faccessat", _AT_FDCWD, path, mode)

    def _limit(self, number: int, soft: int, hard: int) -> Call:
        return self._call("prlimit64", 0, number, struct.pack("2q", identity.limit(soft), identity.limit(hard)))

    def _identity(self, uid: int, gid: int, groups: tuple[int, ...]) -> Iterator[Call]:
        yield self._call("setgroups", len(groups), struct.pack(f"{len(groups)}I", *groups))
        yield self._call("setresgid", gid, gid, gid)
        yield self._call("setresuid", uid, uid, uid)

    def _execute(self, step: identity.Execute) -> Iterator[Call]:
        _, program = step.prepare()
        load = [self._call("seccomp", SECCOMP_SET_MODE_FILTER, step.seccomp_flags, program.address)] if program else []
        yield self._call("close_range", SYNC, _LAST, CLOSE_RANGE_CLOEXEC)
        yield self._call("umask", step.umask)
        if step.label:
            yield self._call("write", LABEL, step.label.encode(), len(step.label.encode()))
        for number in range(step.last_cap + 1):
            if not step.bounding >> number & 1:
                yield self._call("prctl", PR_CAPBSET_DROP, number)
        if step.no_new_privileges:
            yield self._call("prctl", PR_SET_NO_NEW_PRIVS, 1)
        else:
            yield from load
        if step.uid:
            yield self._call("prctl", PR_SET_KEEPCAPS, 1)
        yield from self._identity(step.uid, step.gid, step.groups)
        header, sets = caps.packed(step.effective, step.permitted, step.inheritable)
        yield self._call("capset", header, sets)
        yield self._call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        for number in range(step.ambient.bit_length()):
            if step.ambient >> number & 1:
                yield self._call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)
        if step.no_new_privileges:
            yield from load


def descriptors(fds: dict[str, int], sync: int) -> list[Call]:
    """The calls that come first: each descriptor gets its number, and all others are closed.

    By way of numbers above all of these, so that none overwrites another.
    """
    wanted = (fds["stdin"], fds["stdout"], fds["stderr"], sync, fds["container"])
    aside = max(wanted) + 1
    flags = (0, 0, 0, os.O_CLOEXEC, os.O_CLOEXEC)
    return [
        *[_call("dup3", fd, aside + number, os.O_CLOEXEC) for number, fd in enumerate(wanted)],
        *[_call("dup3", aside + number, number, flag) for number, flag in enumerate(flags)],
        _call("close_range", _OPENED, _LAST),
    ]


def _call(name: str, *arguments: int) -> Call:
    return (NR[name], *arguments, *(0,) * (6 - len(arguments)))

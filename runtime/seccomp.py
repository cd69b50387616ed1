"""The OCI seccomp object to a BPF program.

libseccomp compiles the rules; a prologue of our own goes before its program. It answers ENOSYS to calls newer than
all that the profile knows (a C library then falls back to an older call, which it doesn't on EPERM), and it handles
calls that the profile names but an old libseccomp doesn't know. Both become one smaller program
(`runtime.seccomp_tree`). Compiling takes 4 to 22 ms, so results are kept.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import threading
from dataclasses import dataclass, field

import msgspec

from runtime.errors import InvalidSpec, Unavailable
from runtime.linux import libseccomp as lib
from runtime.seccomp_tree import ARCH, AT_LEAST, EQUAL, GREATER, JUMP, LOAD, NUMBER, RETURN, smaller
from runtime.spec import Seccomp, SeccompArg, SeccompRule

_ACTIONS = {
    "SCMP_ACT_ALLOW": lib.ALLOW,
    "SCMP_ACT_ERRNO": lib.ERRNO,
    "SCMP_ACT_KILL": lib.KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": lib.KILL_PROCESS,
    "SCMP_ACT_KILL_THREAD": lib.KILL_THREAD,
    "SCMP_ACT_LOG": lib.LOG,
    "SCMP_ACT_TRACE": lib.TRACE,
    "SCMP_ACT_TRAP": lib.TRAP,
}
_WITH_DATA = frozenset({lib.ERRNO, lib.TRACE})
_PERMISSIVE = frozenset({lib.ALLOW, lib.LOG})
_OPERATORS = {
    "SCMP_CMP_EQ": lib.EQ,
    "SCMP_CMP_GE": lib.GE,
    "SCMP_CMP_GT": lib.GT,
    "SCMP_CMP_LE": lib.LE,
    "SCMP_CMP_LT": lib.LT,
    "SCMP_CMP_MASKED_EQ": lib.MASKED_EQ,
    "SCMP_CMP_NE": lib.NE,
}
_ARCHES = {
    "SCMP_ARCH_AARCH64": lib.AARCH64,
    "SCMP_ARCH_ARM": lib.ARM,
    "SCMP_ARCH_X32": lib.X32,
    "SCMP_ARCH_X86": lib.X86,
    "SCMP_ARCH_X86_64": lib.X86_64,
}
_OTHERS = frozenset(
    "LOONGARCH64 M68K MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PARISC PARISC64 PPC PPC64 PPC64LE RISCV64 S390 "
    "S390X SH SHEB".split()
)
"""What the runtime spec and libseccomp have besides; no program of theirs runs here."""
_NATIVE = {"x86_64": lib.X86_64, "aarch64": lib.AARCH64}
_COMPATIBLE = {lib.X86_64: {lib.X86_64, lib.X86, lib.X32}, lib.AARCH64: {lib.AARCH64, lib.ARM}}
_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
}
_FLAG_OF_A_LISTENER = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
_X32_BIT = 0x40000000
_ARM_PRIVATE = 0x0F0000
_ERRNO_MAX = 4095
_DATA_MAX = 0xFFFF
_ARGUMENTS = 6
_PROGRAM_LIMIT = 4096  # BPF_MAXINSNS

_SINCE_450 = {
    name: number
    for number, name in enumerate(
        (
            "set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue "
            "statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal "
            "setxattrat getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr listns "
            "rseq_slice_yield"
        ).split(),
        450,
    )
}
_ONLY_X86_64 = {"uretprobe": 335, "uprobe": 336}
"""Calls that Debian 12's libseccomp 2.5.4 doesn't know. From 424 on every machine has the same numbers."""

NEWER_CALLS = (*_SINCE_450, *_ONLY_X86_64)

_CACHE_LIMIT = 256
_cache: dict[bytes, bytes] = {}
_lock = threading.Lock()


def bpf(seccomp: Seccomp) -> bytes:
    """The program for seccomp(2) on this machine, an array of struct sock_filter. Thread-safe; the result is kept.

    System calls that nobody knows are skipped.

    Raises:
        InvalidSpec: an action, operator, architecture, flag or number that the profile language doesn't have, a notify
            action (nothing here would answer it), or a program beyond the kernel's limit.
        Unavailable: libseccomp is not installed.
    """
    key = hashlib.sha256(msgspec.json.encode(seccomp)).digest()
    with _lock:
        program = _cache.get(key)
        if program is None:
            program = _compile(seccomp)
            if len(_cache) >= _CACHE_LIMIT:
                _cache.pop(next(iter(_cache)))
            _cache[key] = program
    return program


def flags(seccomp: Seccomp) -> int:
    """The flags for seccomp(2). A profile that names none gets SPEC_ALLOW, as with runc: until Linux 5.16 a filter
    would otherwise switch off speculation, which slows the container down."""
    value = 0
    for name in seccomp.flags:
        if name == _FLAG_OF_A_LISTENER:
            raise InvalidSpec(f"seccomp: flag {name} needs a process that answers SCMP_ACT_NOTIFY; crib has none")
        if name not in _FLAGS:
            raise InvalidSpec(f"seccomp: flag {name[:64]!r} is unknown")
        value |= _FLAGS[name]
    return value if seccomp.flags else _FLAGS["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]


@dataclass(slots=True)
class _Arch:
    """What the prologue does for one architecture: `special` calls by number, ENOSYS above `largest`."""

    token: int
    largest: int = -1
    special: dict[int, int] = field(default_factory=dict)


def _compile(seccomp: Seccomp) -> bytes:
    flags(seccomp)
    if seccomp.listener_path or seccomp.listener_metadata:
        raise InvalidSpec("seccomp: listenerPath needs a process that answers SCMP_ACT_NOTIFY; crib has none")
    machine = os.uname().machine
    native = _NATIVE.get(machine)
    if native is None:
        raise InvalidSpec(f"seccomp: machine {machine} is not supported")
    default = _action("defaultAction", seccomp.default_action, seccomp.default_errno_ret)
    tokens = [native, *(token for token in map(_arch, seccomp.architectures) if token in _COMPATIBLE[native])]
    arches = {token: _Arch(token) for token in tokens}
    try:
        with lib.context(default) as context:
            for token in arches:
                context.add_arch(token)
            for rule in seccomp.syscalls:
                _add(context, rule, default, arches)
            program = context.export()
    except lib.LibraryError as error:
        raise InvalidSpec(f"seccomp: {error.call}: {error.strerror}") from error
    except OSError as error:
        raise Unavailable(f"seccomp: {error}") from error
    program = smaller(_prologue(arches, deny_newer=default not in _PERMISSIVE) + program)
    if len(program) > 8 * _PROGRAM_LIMIT:
        raise InvalidSpec(f"seccomp: {len(program) // 8} instructions, the kernel's limit is {_PROGRAM_LIMIT}")
    return program


def _add(context: lib.Context, rule: SeccompRule, default: int, arches: dict[int, _Arch]) -> None:
    action = _action("action", rule.action, rule.errno_ret)
    comparisons = [_comparison(arg) for arg in rule.args]
    # libseccomp can't join two comparisons of one argument; runc adds them as alternatives, and profiles rely on it.
    alternatives = [comparisons]
    if len({arg.index for arg in rule.args}) < len(rule.args):
        alternatives = [[comparison] for comparison in comparisons]
    for name in rule.names:
        call = lib.number(name)
        known = False
        for arch in arches.values():
            number = lib.number_on(arch.token, name)
            if number is None and call is None:
                number = newer(arch.token, name)
                # No comparisons are made in the prologue: such an allowance is left out, such a denial is complete.
                if number is not None and action != default and not (rule.args and action in _PERMISSIVE):
                    arch.special.setdefault(number, action)
            if number is not None and not (arch.token == lib.ARM and number >= _ARM_PRIVATE):
                arch.largest = max(arch.largest, number)
                known = True
        if call is not None and action != default and (known or call < 0):
            for alternative in alternatives:
                context.add_rule(action, call, alternative)


def newer(token: int, name: str) -> int | None:
    """The number on an architecture of one of NEWER_CALLS; None where it has none."""
    number = _SINCE_450.get(name)
    if number is None and token == lib.X86_64:
        return _ONLY_X86_64.get(name)
    if number is None or (name == "map_shadow_stack" and token in (lib.ARM, lib.X32)):
        return None
    return number | _X32_BIT if token == lib.X32 else number


def _arch(name: str) -> int:
    """The token of an architecture's name, 0 for one that OCI knows and this machine can't run."""
    if name in _ARCHES:
        return _ARCHES[name]
    if name.removeprefix("SCMP_ARCH_") in _OTHERS and name.startswith("SCMP_ARCH_"):
        return 0
    raise InvalidSpec(f"seccomp: architecture {name[:64]!r} is unknown")


def _action(what: str, name: str, errno_ret: int | None) -> int:
    if name == "SCMP_ACT_NOTIFY":
        raise InvalidSpec(f"seccomp: {what} SCMP_ACT_NOTIFY needs a process that answers it; crib has none")
    if name not in _ACTIONS:
        raise InvalidSpec(f"seccomp: {what} {name[:64]!r} is unknown")
    action = _ACTIONS[name]
    if action not in _WITH_DATA:
        return action
    data = errno.EPERM if errno_ret is None else errno_ret
    if not 0 <= data <= (_ERRNO_MAX if action == lib.ERRNO else _DATA_MAX):
        raise InvalidSpec(f"seccomp: errnoRet {data} is out of range")
    return action | data


def _comparison(arg: SeccompArg) -> lib.Comparison:
    if arg.op not in _OPERATORS:
        raise InvalidSpec(f"seccomp: operator {arg.op[:64]!r} is unknown")
    if not 0 <= arg.index < _ARGUMENTS:
        raise InvalidSpec(f"seccomp: argument index {arg.index}: a system call has {_ARGUMENTS}")
    for value in (arg.value, arg.value_two):
        if not 0 <= value < 1 << 64:
            raise InvalidSpec(f"seccomp: value {value} is not a 64-bit number")
    return lib.Comparison(arg.index, _OPERATORS[arg.op], arg.value, arg.value_two)


_MAIN = -1  # stands for the distance to libseccomp's program
_Code = list[tuple[int, int, int, int]]


def _prologue(arches: dict[int, _Arch], *, deny_newer: bool) -> bytes:
    """Runs before libseccomp's program and either returns an action or falls through to it; empty if it never would."""
    if not deny_newer and not any(arch.special for arch in arches.values()):
        return b""
    code: _Code = [(LOAD, 0, 0, ARCH)]
    for arch in arches.values():
        if arch.token == lib.X32:
            continue  # the kernel reports x32 as x86_64, with a bit in the number
        body: _Code = [(LOAD, 0, 0, NUMBER)]
        if arch.token == lib.X86_64:
            x32 = _section(arches.get(lib.X32), deny_newer)
            body += [(AT_LEAST, 1, 0, _X32_BIT), (JUMP, 0, 0, len(x32)), *x32]
        elif arch.token == lib.ARM:
            body += [(AT_LEAST, 0, 1, _ARM_PRIVATE), (JUMP, 0, 0, _MAIN)]
        body += _section(arch, deny_newer)
        code += [(EQUAL, 1, 0, arch.token), (JUMP, 0, 0, len(body)), *body]
    return b"".join(
        struct.pack("=HBBI", op, yes, no, len(code) - index - 1 if constant == _MAIN else constant)
        for index, (op, yes, no, constant) in enumerate(code)
    )


def _section(arch: _Arch | None, deny_newer: bool) -> _Code:
    """With the number loaded."""
    if arch is None:
        return [(JUMP, 0, 0, _MAIN)]
    code: _Code = []
    for number, action in sorted(arch.special.items()):
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, action)]
    if deny_newer and arch.largest >= 0:
        code += [(GREATER, 0, 1, arch.largest), (RETURN, 0, 0, lib.ERRNO | errno.ENOSYS)]
    return [*code, (JUMP, 0, 0, _MAIN)]

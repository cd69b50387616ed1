"""Seccomp programs made smaller: they answer as those that they were made of."""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.translate.seccomp import default_profile
from runtime import seccomp
from runtime.linux import libseccomp as lib
from runtime.seccomp_tree import AT_LEAST, EQUAL, GREATER, JUMP, LOAD, RETURN, smaller
from runtime.spec import Seccomp, SeccompArg, SeccompRule
from tests.runtime.bpf_machine import run

AND, ANY_BIT = 0x54, 0x45
LARGEST = 0xFFFFFFFF
ARCHES = (lib.X86_64, lib.X86, lib.AARCH64, lib.ARM, 0)
NUMBERS = (*range(480), *range(1 << 30, (1 << 30) + 560), *range(0xF0000, 0xF0008), (1 << 30) - 1, 1 << 31, LARGEST)
CAPABILITIES = ("CAP_CHOWN", "CAP_SETUID", "CAP_SYS_CHROOT")
Code = list[tuple[int, int, int, int]]


def packed(code: Code) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def unpacked(program: bytes) -> Code:
    return list(struct.iter_unpack("=HBBI", program))


def around(values: set[int]) -> list[int]:
    return sorted({value + by & LARGEST for value in values for by in (-1, 0, 1)})


def compiled(monkeypatch: pytest.MonkeyPatch, profile: Seccomp, machine: str) -> tuple[bytes, bytes]:
    """What a profile is compiled to on a machine, before it is made smaller and after."""
    before: list[bytes] = []

    def seen(program: bytes) -> bytes:
        before.append(program)
        return smaller(program)

    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    monkeypatch.setattr(seccomp, "smaller", seen)
    after = seccomp._compile(profile)
    return before[0], after


def assert_same(before: bytes, after: bytes) -> None:
    """They answer the same to every number, and to every argument that a check may tell from another."""
    code = unpacked(before)
    checked = {one[3] for last, one in pairwise(code) if last[0] in (LOAD, AND) and last[3] >= 16}
    words = [(), *((word,) for word in around(checked)), *((word << 32 | word, word) for word in checked)]
    for arch in ARCHES:
        known = (EQUAL, arch) in {(operation, constant) for operation, _, _, constant in code}
        for number in NUMBERS:
            for arguments in words if known else words[:1]:
                expected = run(before, arch, number, arguments)
                assert run(after, arch, number, arguments) == expected, (hex(arch), number, arguments)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_default_profile(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    before, after = compiled(monkeypatch, default_profile(CAPABILITIES, machine, (6, 18)), machine)
    assert len(after) * 3 < len(before)
    assert_same(before, after)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_comparison_of_arguments(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    def rule(name: str, action: str, *args: tuple[int, str, int, int]) -> SeccompRule:
        made = tuple(SeccompArg(index=index, op=f"SCMP_CMP_{op}", value=a, value_two=b) for index, op, a, b in args)
        return SeccompRule(names=(name,), action=f"SCMP_ACT_{action}", args=made)

    large = 7 << 32 | 9
    profile = Seccomp(
        default_action="SCMP_ACT_ERRNO",
        architectures=("SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"),
        syscalls=(
            rule("read", "ALLOW", (0, "EQ", large, 0)),
            rule("write", "ALLOW", (0, "NE", large, 0)),
            rule("close", "ALLOW", (0, "GT", large, 0)),
            rule("fstat", "ALLOW", (0, "GE", large, 0)),
            rule("lseek", "ALLOW", (0, "LT", large, 0)),
            rule("mmap", "ALLOW", (0, "LE", large, 0), (1, "NE", 9, 0)),
            rule("ioctl", "ALLOW", (0, "MASKED_EQ", 0xFF00000000FF, large)),
            rule("dup", "LOG", (0, "EQ", 1, 0)),
            rule("dup", "TRAP", (0, "EQ", 1, 0), (1, "EQ", 2, 0)),
            rule("dup3", "KILL", (0, "EQ", 1, 0), (0, "EQ", 3, 0)),
        ),
    )
    assert_same(*compiled(monkeypatch, profile, machine))


def test_answers_out_of_a_jump_s_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name for rule in default_profile(CAPABILITIES, "x86_64", (6, 18)).syscalls for name in rule.names}
    profile = Seccomp(
        default_action="SCMP_ACT_ALLOW",
        syscalls=tuple(
            SeccompRule(names=(name,), action="SCMP_ACT_ERRNO", errno_ret=number)
            for number, name in enumerate(sorted(names), 1)
        ),
    )
    before, after = compiled(monkeypatch, profile, "x86_64")
    assert len(unpacked(after)) > 512
    assert_same(before, after)


def test_what_libseccomp_does_not_write_stays() -> None:
    program = packed([(LOAD, 0, 0, 0), (ANY_BIT, 0, 1, 4), (RETURN, 0, 0, lib.ALLOW), (RETURN, 0, 0, lib.TRAP)])
    assert smaller(program) is program


def test_numbers_are_told_apart_where_no_arch_is() -> None:
    code = [*[(LOAD, 0, 0, 0)] * 7, (EQUAL, 0, 1, 0), (RETURN, 0, 0, 1), (RETURN, 0, 0, 2)]
    after = smaller(packed(code))
    assert len(unpacked(after)) < len(code)
    assert_same(packed(code), after)


def test_never_longer() -> None:
    program = packed([(RETURN, 0, 0, lib.ALLOW)])
    assert smaller(program) == program


WORDS = st.sampled_from([0, 4, 16, 20, 24])
CONSTANTS = st.sampled_from([0, 1, 2, 3, 1 << 30, 1 << 31, LARGEST, *ARCHES])


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    length = draw(st.integers(1, 30))
    code: Code = [(RETURN, 0, 0, value) for value in range(1, 4)]
    for _ in range(length):
        distance = st.integers(0, len(code) - 1)
        kind = draw(st.sampled_from([LOAD, AND, JUMP, EQUAL, GREATER, AT_LEAST, RETURN]))
        if kind in (EQUAL, GREATER, AT_LEAST):
            code.insert(0, (kind, draw(distance), draw(distance), draw(CONSTANTS)))
        else:
            constant = {LOAD: WORDS, JUMP: distance}.get(kind, CONSTANTS)
            code.insert(0, (kind, 0, 0, draw(constant)))
    return packed(code)


@given(programs(), st.lists(st.tuples(CONSTANTS, CONSTANTS, CONSTANTS, CONSTANTS), min_size=10, max_size=10))
def test_any_program(program: bytes, calls: list[tuple[int, int, int, int]]) -> None:
    after = smaller(program)
    for number, arch, low, high in calls:
        arguments = (low | high << 32, high)
        assert run(after, arch, number, arguments) == run(program, arch, number, arguments)

"""One list of device rules: the policy, v1's lines, and the v2 program run by an interpreter of its instructions."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cgroup.devices import Policy, parse_v1_list, policy
from runtime.errors import InvalidSpec
from runtime.linux import bpf
from runtime.spec import DeviceCgroup

DENY_ALL = DeviceCgroup(allow=False, type="a", access="rwm")
ALLOW_ALL = DeviceCgroup(allow=True, type="a", access="rwm")


def _rule(allow: bool, text: str) -> DeviceCgroup:
    kind, numbers, access = text.split()
    major, minor = (None if number == "*" else int(number) for number in numbers.split(":"))
    return DeviceCgroup(allow=allow, type=kind, major=major, minor=minor, access=access)


def test_no_rules_leave_everything_open() -> None:
    assert policy(()).open
    assert policy((DENY_ALL, ALLOW_ALL)).open


def test_lines_for_v1() -> None:
    rules = (DENY_ALL, _rule(True, "c 1:3 rwm"), _rule(True, "c *:* m"), _rule(True, "c 136:* wr"))
    assert policy(rules).v1_writes() == (
        ("devices.deny", "a"),
        ("devices.allow", "c 1:3 rwm"),
        ("devices.allow", "c *:* m"),
        ("devices.allow", "c 136:* rw"),
    )
    assert policy((ALLOW_ALL, _rule(False, "b 8:* w"))).v1_writes() == (
        ("devices.allow", "a"),
        ("devices.deny", "b 8:* w"),
    )


def test_what_is_covered_is_left_out() -> None:
    rules = (DENY_ALL, _rule(True, "c 1:3 rw"), _rule(True, "c 1:* rwm"), _rule(True, "c 1:5 r"))
    assert policy(rules).exceptions == (("c", 1, None, "rwm"),)


def test_a_later_rule_takes_back() -> None:
    rules = (DENY_ALL, _rule(True, "c 1:3 rwm"), _rule(True, "c 1:5 rw"), _rule(False, "c 1:* w"))
    assert policy(rules).exceptions == (("c", 1, 3, "rm"), ("c", 1, 5, "r"))


def test_minus_one_is_every_number() -> None:
    (exception,) = policy((DENY_ALL, DeviceCgroup(allow=True, type="c", major=1, minor=-1, access="r"))).exceptions
    assert exception == ("c", 1, None, "r")


@pytest.mark.parametrize(
    "rule",
    [
        DeviceCgroup(allow=True, type="x"),
        DeviceCgroup(allow=True, type="c", access="rwx"),
        DeviceCgroup(allow=True, type="c", major=-2),
        DeviceCgroup(allow=True, type="c", minor=2**32),
        DeviceCgroup(allow=True, type="a", major=1),
    ],
)
def test_malformed_rules(rule: DeviceCgroup) -> None:
    with pytest.raises(InvalidSpec, match="device rule"):
        policy((DENY_ALL, rule))


def test_a_hole_cannot_be_expressed() -> None:
    with pytest.raises(InvalidSpec, match=r"c 1:3 w cuts into c 1:\* rwm"):
        policy((DENY_ALL, _rule(True, "c 1:* rwm"), _rule(False, "c 1:3 w")))


def test_devices_list_is_read_back() -> None:
    assert parse_v1_list("a *:* rwm\n").open
    assert parse_v1_list("c 1:3 rwm\nb *:* m\n") == Policy(False, (("c", 1, 3, "rwm"), ("b", None, None, "m")))


def _allows(program: bytes, kind: int, access: int, major: int, minor: int) -> bool:
    """What the kernel would answer: an interpreter for the few instructions that are used."""
    registers = [0] * 11
    context = {0: access << 16 | kind, 4: major, 8: minor}
    code = [struct.unpack("=BBhI", program[at : at + 8]) for at in range(0, len(program), 8)]
    at = 0
    while True:
        opcode, both, offset, imm = code[at]
        dst, src = both & 15, both >> 4
        at += 1
        match opcode:
            case 0x61:
                registers[dst] = context[offset]
            case 0xB4:
                registers[dst] = imm
            case 0xBC:
                registers[dst] = registers[src]
            case 0x54:
                registers[dst] &= imm
            case 0x74:
                registers[dst] >>= imm
            case 0x16:
                at += offset if registers[dst] == imm else 0
            case 0x56:
                at += offset if registers[dst] != imm else 0
            case 0x5E:
                at += offset if registers[dst] != registers[src] else 0
            case 0x95:
                return bool(registers[0])
            case _:
                raise AssertionError(hex(opcode))


def _v1_allows(state: Policy, kind: int, access: int, major: int, minor: int) -> bool:
    """The rule of the v1 controller, as its source has it."""
    for device_type, its_major, its_minor, letters in state.exceptions:
        mask = sum({"m": 1, "r": 2, "w": 4}[letter] for letter in letters)
        if {"b": 1, "c": 2}[device_type] != kind or its_major not in (None, major) or its_minor not in (None, minor):
            continue
        if state.default_allow and access & mask:
            return False
        if not state.default_allow and not access & ~mask:
            return True
    return state.default_allow


numbers = st.one_of(st.none(), st.integers(0, 2))
rules = st.lists(
    st.builds(
        DeviceCgroup,
        allow=st.booleans(),
        type=st.sampled_from("bc"),
        major=numbers,
        minor=numbers,
        access=st.sampled_from(["r", "w", "m", "rw", "rwm"]),
    ),
    max_size=6,
)


@given(first=st.sampled_from([DENY_ALL, ALLOW_ALL]), more=rules)
def test_the_program_agrees_with_v1(first: DeviceCgroup, more: list[DeviceCgroup]) -> None:
    try:
        state = policy((first, *more))
    except InvalidSpec:
        return
    program = bpf.assemble(state.default_allow, state.exceptions)
    for kind, access, major, minor in itertools.product((1, 2), range(1, 8), range(4), range(4)):
        assert _allows(program, kind, access, major, minor) == _v1_allows(state, kind, access, major, minor)


@given(more=rules)
def test_single_accesses_follow_the_last_rule_that_matches(more: list[DeviceCgroup]) -> None:
    try:
        state = policy((DENY_ALL, *more))
    except InvalidSpec:
        return
    program = bpf.assemble(state.default_allow, state.exceptions)
    for kind, letter, major, minor in itertools.product("bc", "mrw", range(4), range(4)):
        last = [
            rule.allow
            for rule in (DENY_ALL, *more)
            if rule.type in ("a", kind)
            and rule.major in (None, major)
            and rule.minor in (None, minor)
            and letter in rule.access
        ][-1]
        access = {"m": 1, "r": 2, "w": 4}[letter]
        assert _allows(program, {"b": 1, "c": 2}[kind], access, major, minor) == last

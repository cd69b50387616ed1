"""Compiled seccomp filters: what they answer, in a machine for BPF and under the kernel."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterable

import pytest

from runtime import seccomp
from runtime.errors import InvalidSpec
from runtime.linux import libseccomp as lib
from runtime.seccomp import _Arch, _prologue, bpf, flags
from runtime.spec import Seccomp, SeccompArg, SeccompRule
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.bpf_machine import run

x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")
EPERM, ENOSYS = lib.ERRNO | errno.EPERM, lib.ERRNO | errno.ENOSYS
READ, UNSHARE, KEYCTL, FCHMODAT2, URETPROBE, NEWEST = 0, 272, 250, 452, 335, 469


def profile(*rules: SeccompRule, default: str = "SCMP_ACT_ERRNO", arches: Iterable[str] = ()) -> Seccomp:
    return Seccomp(default_action=default, architectures=tuple(arches), syscalls=rules)


def allow(*names: str, args: Iterable[SeccompArg] = ()) -> SeccompRule:
    return SeccompRule(names=names, action="SCMP_ACT_ALLOW", args=tuple(args))


def deny(*names: str, errno_ret: int | None = None, args: Iterable[SeccompArg] = ()) -> SeccompRule:
    return SeccompRule(names=names, action="SCMP_ACT_ERRNO", errno_ret=errno_ret, args=tuple(args))


@x86
def test_newer_than_the_profile_is_enosys_and_older_is_denied() -> None:
    program = bpf(profile(allow("read", "statx")))
    answers = [run(program, lib.X86_64, number) for number in (READ, 332, UNSHARE, 333, NEWEST, 100_000)]
    assert answers == [lib.ALLOW, lib.ALLOW, EPERM, ENOSYS, ENOSYS, ENOSYS]


@x86
@pytest.mark.parametrize("default", ["SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL", "SCMP_ACT_TRAP"])
def test_newer_calls_are_enosys_under_every_denying_default(default: str) -> None:
    program = bpf(profile(allow("read"), default=default))
    assert run(program, lib.X86_64, NEWEST) == ENOSYS


@x86
@pytest.mark.parametrize("default", ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG"])
def test_a_permissive_default_holds_for_newer_calls(default: str) -> None:
    program = bpf(profile(deny("unshare"), default=default))
    assert run(program, lib.X86_64, NEWEST) in (lib.ALLOW, lib.LOG)
    assert run(program, lib.X86_64, UNSHARE) == EPERM


@x86
def test_calls_that_libseccomp_may_not_know() -> None:
    known = profile(allow("read", "fchmodat2", "uretprobe", "file_setattr"), arches=["SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    program = bpf(known)
    assert run(program, lib.X86_64, FCHMODAT2) == lib.ALLOW
    assert run(program, lib.X86_64, URETPROBE) == lib.ALLOW
    assert run(program, lib.X86_64, NEWEST) == lib.ALLOW
    assert run(program, lib.X86_64, NEWEST + 1) == ENOSYS
    assert run(program, lib.X86_64, UNSHARE) == EPERM
    assert run(program, lib.X86, FCHMODAT2) == lib.ALLOW
    assert run(program, lib.X86, URETPROBE) == EPERM, "335 is another call on i386"
    assert run(program, lib.X86_64, 0x40000000 | FCHMODAT2) == lib.ALLOW, "x32 has a bit in the number"
    assert run(program, lib.X86_64, 0x40000000 | NEWEST + 1) == ENOSYS


@x86
def test_a_conditional_denial_of_an_unknown_call_is_complete_and_an_allowance_left_out() -> None:
    condition = [SeccompArg(index=0, value=1, op="SCMP_CMP_EQ")]
    denied = bpf(profile(deny("file_setattr", args=condition), default="SCMP_ACT_ALLOW"))
    allowed = bpf(profile(allow("read", "file_getattr"), allow("file_setattr", args=condition)))
    if lib.number("file_setattr") is not None:
        pytest.skip("this libseccomp knows the call")
    assert run(denied, lib.X86_64, NEWEST, [0]) == EPERM
    assert run(allowed, lib.X86_64, NEWEST, [1]) == EPERM


@x86
def test_arguments() -> None:
    masked = SeccompArg(index=0, value=0x7E020000, value_two=0, op="SCMP_CMP_MASKED_EQ")
    program = bpf(profile(allow("clone", args=[masked])))
    assert run(program, lib.X86_64, 56, [0x11]) == lib.ALLOW
    assert run(program, lib.X86_64, 56, [0x20000]) == EPERM


@x86
def test_two_comparisons_of_one_argument_are_alternatives() -> None:
    either = [SeccompArg(index=0, value=value, op="SCMP_CMP_EQ") for value in (1, 3)]
    program = bpf(profile(allow("read", args=either)))
    assert [run(program, lib.X86_64, READ, [value]) for value in range(4)] == [EPERM, lib.ALLOW, EPERM, lib.ALLOW]


@x86
def test_a_rule_s_own_errno_and_a_default_s() -> None:
    program = bpf(Seccomp(default_action="SCMP_ACT_ERRNO", default_errno_ret=13, syscalls=(deny("read", errno_ret=2),)))
    assert run(program, lib.X86_64, READ) == lib.ERRNO | 2
    other = bpf(Seccomp(default_action="SCMP_ACT_ERRNO", default_errno_ret=13, syscalls=(allow("unshare"),)))
    assert run(other, lib.X86_64, READ) == lib.ERRNO | 13


@x86
def test_unknown_calls_are_skipped() -> None:
    program = bpf(profile(allow("read", "no_such_call", "s390_pci_mmio_read")))
    assert run(program, lib.X86_64, READ) == lib.ALLOW


@x86
def test_an_unlisted_architecture_is_killed() -> None:
    assert run(bpf(profile(allow("read"))), lib.X86, 3) == lib.KILL_PROCESS


@x86
def test_an_architecture_of_another_machine_is_left_out() -> None:
    program = bpf(profile(allow("read"), arches=["SCMP_ARCH_S390X", "SCMP_ARCH_AARCH64", "SCMP_ARCH_X86"]))
    assert run(program, lib.X86, 3) == lib.ALLOW


def test_the_prologue_for_aarch64_and_arm() -> None:
    arches = {
        lib.AARCH64: _Arch(lib.AARCH64, 452, {452: lib.ALLOW}),
        lib.ARM: _Arch(lib.ARM, 441),
    }
    code = _prologue(arches, deny_newer=True) + b"\x06\0\0\0\x2a\0\0\0"
    through = 42
    assert run(code, lib.AARCH64, 0) == through
    assert run(code, lib.AARCH64, 451) == through
    assert run(code, lib.AARCH64, 452) == lib.ALLOW
    assert run(code, lib.AARCH64, 453) == ENOSYS
    assert run(code, lib.ARM, 441) == through
    assert run(code, lib.ARM, 442) == ENOSYS
    assert run(code, lib.ARM, 0x0F0002) == through, "cacheflush is a private call of arm"
    assert run(code, lib.X86_64, 500) == through


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Seccomp(default_action="SCMP_ACT_NOTIFY"), "SCMP_ACT_NOTIFY"),
        (profile(SeccompRule(names=("read",), action="SCMP_ACT_NOTIFY")), "SCMP_ACT_NOTIFY"),
        (Seccomp(default_action="SCMP_ACT_ALLOW", listener_path="/x"), "listenerPath"),
        (Seccomp(default_action="allow"), "'allow'"),
        (Seccomp(default_action="SCMP_ACT_ERRNO", default_errno_ret=4096), "4096"),
        (profile(allow("read"), arches=["x86"]), "'x86'"),
        (profile(allow("read"), arches=["SCMP_ARCH_Z80"]), "'SCMP_ARCH_Z80'"),
        (Seccomp(default_action="SCMP_ACT_ALLOW", flags=("SECCOMP_NEW",)), "'SECCOMP_NEW'"),
        (Seccomp(default_action="SCMP_ACT_ALLOW", flags=("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",)), "crib has none"),
        (profile(allow("read", args=[SeccompArg(index=6, value=0, op="SCMP_CMP_EQ")])), "index 6"),
        (profile(allow("read", args=[SeccompArg(index=0, value=0, op="==")])), "'=='"),
        (profile(allow("read", args=[SeccompArg(index=0, value=-1, op="SCMP_CMP_EQ")])), "-1"),
        (profile(allow("read", args=[SeccompArg(index=0, value=1 << 64, op="SCMP_CMP_EQ")])), "64-bit"),
    ],
)
def test_refused(wrong: Seccomp, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said.replace("(", "\\(")):
        bpf(wrong)


def test_flags() -> None:
    assert flags(Seccomp(default_action="SCMP_ACT_ALLOW")) == 4
    log = Seccomp(default_action="SCMP_ACT_ALLOW", flags=("SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"))
    assert flags(log) == 3
    with pytest.raises(InvalidSpec, match="flag 'x'"):
        flags(Seccomp(default_action="SCMP_ACT_ALLOW", flags=("x",)))


def test_a_program_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = profile(allow("read", "gettid"))
    first = bpf(given)
    monkeypatch.setattr(seccomp, "_compile", lambda _: pytest.fail("compiled again"))
    assert bpf(profile(allow("read", "gettid"))) is first


def under(given: Seccomp, *calls: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.seccomp_program", str(flags(given)), *calls],
        input=bpf(given),
        capture_output=True,
        timeout=scaled(30),
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


@x86
@requires("seccomp")
def test_under_the_kernel() -> None:
    given = profile(
        deny("unshare", errno_ret=errno.EXDEV), deny("keyctl"), allow("fchmodat2"), default="SCMP_ACT_ALLOW"
    )
    assert under(given, f"{UNSHARE}:0", f"{KEYCTL}:0", "39") == [errno.EXDEV, errno.EPERM, 0]

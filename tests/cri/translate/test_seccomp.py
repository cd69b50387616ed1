"""Seccomp profiles: which one a container gets, the profile language, and the default profile's answers."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from cri.translate import Defaults, localhost_file
from cri.translate.capabilities import ALL, DEFAULT
from cri.translate.document import decode
from cri.translate.seccomp import FILE_LIMIT_BYTES, Profile, default_profile, resolve
from runtime.errors import InvalidSpec
from runtime.linux import libseccomp as lib
from runtime.seccomp import bpf, flags
from runtime.spec import Seccomp, SeccompArg, SeccompRule
from tests.cri.translate.given import linux, sandbox_with, secured, spec
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.bpf_machine import run

RuntimeDefault = pb.SecurityProfile.ProfileType.RuntimeDefault
Unconfined = pb.SecurityProfile.ProfileType.Unconfined
Localhost = pb.SecurityProfile.ProfileType.Localhost
FILE = b'{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}'
PARSED = Seccomp(default_action="SCMP_ACT_ALLOW", syscalls=(SeccompRule(names=("chmod",), action="SCMP_ACT_ERRNO"),))
x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")


def chosen(file: bytes | None = None, defaults: Defaults | None = None, **context: Any) -> Seccomp | None:
    return linux(spec(secured(**context), seccomp_file=file, defaults=defaults or Defaults(node_name="n"))).seccomp


def default(*capabilities: str) -> Seccomp:
    return default_profile(capabilities or DEFAULT, os.uname().machine, (6, 18))


def test_nothing_asked_for_is_unconfined_unless_configured() -> None:
    assert chosen() is None
    configured = chosen(defaults=Defaults(node_name="n", seccomp_unset=True))
    assert configured is not None
    assert configured.default_action == "SCMP_ACT_ERRNO"


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ({"seccomp": pb.SecurityProfile(profile_type=Unconfined)}, None),
        ({"seccomp": pb.SecurityProfile(profile_type=Localhost, localhost_ref="/p.json")}, PARSED),
        ({"seccomp_profile_path": "localhost//p.json"}, PARSED),
        ({"seccomp_profile_path": "unconfined"}, None),
        ({"seccomp": pb.SecurityProfile(profile_type=Unconfined), "seccomp_profile_path": "runtime/default"}, None),
    ],
)
def test_chosen(context: dict[str, Any], expected: Seccomp | None) -> None:
    assert chosen(FILE, **context) == expected


@pytest.mark.parametrize("context", [{"seccomp": pb.SecurityProfile()}, {"seccomp_profile_path": "docker/default"}])
def test_runtime_default(context: dict[str, Any]) -> None:
    found = chosen(**context)
    assert found is not None
    assert "SCMP_ARCH_X86" in found.architectures
    assert any("openat2" in rule.names for rule in found.syscalls)


def test_privileged_has_none() -> None:
    pod = sandbox_with(pb.LinuxSandboxSecurityContext(privileged=True))
    config = secured(privileged=True, seccomp=pb.SecurityProfile(profile_type=Localhost, localhost_ref="/p"))
    assert linux(spec(config, pod=pod)).seccomp is None
    assert localhost_file(config.linux.security_context) is None


def test_the_file_to_read() -> None:
    def wanted(**context: Any) -> str | None:
        return localhost_file(pb.LinuxContainerSecurityContext(**context))

    assert wanted() is None
    assert wanted(seccomp=pb.SecurityProfile(profile_type=Localhost, localhost_ref="/a/b.json")) == "/a/b.json"
    for path in ("a/b.json", "/a/../b", "/a\0b", "/" + "a" * 5000):
        with pytest.raises(InvalidSpec, match=r"seccomp\.localhost_ref"):
            wanted(seccomp=pb.SecurityProfile(profile_type=Localhost, localhost_ref=path))


LOCAL = {"seccomp": pb.SecurityProfile(profile_type=Localhost, localhost_ref="/p.json")}


@pytest.mark.parametrize(
    ("file", "context", "said"),
    [
        (None, LOCAL, "seccomp profile '/p.json': no such file"),
        (b"{", LOCAL, "seccomp profile '/p.json': "),
        (b"\xff", LOCAL, "seccomp profile '/p.json': "),
        (b"{}", LOCAL, "defaultAction"),
        (b'{"defaultAction":1}', LOCAL, "defaultAction"),
        (b" " * (FILE_LIMIT_BYTES + 1), LOCAL, "longer than 1048576 bytes"),
        (
            rb"""{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],
            "archMap":[{"architecture":"SCMP_ARCH_X86_64"}]}""",
            LOCAL,
            "architectures and archMap exclude each other",
        ),
        (
            b'{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"name":"a","names":["b"],"action":"SCMP_ACT_ALLOW"}]}',
            LOCAL,
            "name 'a' and names exclude each other",
        ),
        (
            rb"""{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["b"],"action":"SCMP_ACT_ALLOW",
            "includes":{"minKernel":"six"}}]}""",
            LOCAL,
            "minKernel 'six'",
        ),
        (None, {"seccomp": pb.SecurityProfile(profile_type=Localhost)}, "seccomp.localhost_ref is missing"),
        (None, {"seccomp_profile_path": "localhost/"}, "seccomp profile 'localhost/'"),
        (None, {"seccomp_profile_path": "my/own"}, "seccomp profile 'my/own'"),
    ],
)
def test_refused(file: bytes | None, context: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        chosen(file, **context)
    assert said in str(error.value)


def test_the_language_beyond_oci_s() -> None:
    text = b"""{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "flags": null, "comment": "ignored",
      "archMap": [{"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
                  {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": null}],
      "syscalls": [
        {"name": "old", "names": null, "action": "SCMP_ACT_ALLOW", "args": null, "includes": {"caps": null}},
        {"names": ["admin"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["user"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["arm"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
        {"names": ["notarm"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["arm64"]}},
        {"names": ["new"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "6.2"}, "excludes": null},
        {"names": ["args"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]}
      ]}"""
    profile = decode(text, Profile)

    def names(capabilities: tuple[str, ...], machine: str, kernel: tuple[int, int]) -> list[str]:
        found = resolve(profile, capabilities, machine, kernel)
        return [name for rule in found.syscalls for name in rule.names]

    assert names((), "x86_64", (6, 1)) == ["old", "user", "notarm", "args"]
    assert names(("CAP_SYS_ADMIN",), "aarch64", (6, 12)) == ["old", "admin", "arm", "new", "args"]
    plain = resolve(profile, (), "aarch64", (6, 1))
    assert plain.architectures == ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM")
    assert plain.default_errno_ret == 38
    assert plain.syscalls[-1].args == (SeccompArg(index=1, value=2, op="SCMP_CMP_EQ"),)


def named() -> set[str]:
    text = resources.files("cri.translate").joinpath("seccomp_default.json").read_bytes()
    return {name for rule in decode(text, Profile).syscalls for name in rule.names}


def test_the_default_profile_decides_on_every_call_of_the_table() -> None:
    since_450 = """
        set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue statmount
        listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat
        removexattrat open_tree_attr file_getattr file_setattr listns rseq_slice_yield
    """.split()
    table = {*since_450, "uretprobe", "uprobe"}
    for header in Path("/usr/include").glob("*/asm/unistd_[36][24].h"):
        table |= set(re.findall(r"#define __NR_(\w+)", header.read_text()))
    assert table - named() == set()


@x86
@pytest.mark.parametrize(
    ("number", "arguments", "capability", "without"),
    [
        (165, (), "CAP_SYS_ADMIN", errno.EPERM),  # mount
        (272, (), "CAP_SYS_ADMIN", errno.EPERM),  # unshare
        (308, (), "CAP_SYS_ADMIN", errno.EPERM),  # setns
        (435, (), "CAP_SYS_ADMIN", errno.ENOSYS),  # clone3
        (467, (), "CAP_SYS_ADMIN", errno.EPERM),  # open_tree_attr
        (470, (), "CAP_SYS_ADMIN", errno.EPERM),  # listns
        (321, (), "CAP_BPF", errno.EPERM),  # bpf
        (298, (), "CAP_PERFMON", errno.EPERM),  # perf_event_open
        (304, (), "CAP_DAC_READ_SEARCH", errno.EPERM),  # open_by_handle_at
        (169, (), "CAP_SYS_BOOT", errno.EPERM),  # reboot
        (161, (), "CAP_SYS_CHROOT", errno.EPERM),  # chroot
        (175, (), "CAP_SYS_MODULE", errno.EPERM),  # init_module
        (237, (), "CAP_SYS_NICE", errno.EPERM),  # mbind
        (163, (), "CAP_SYS_PACCT", errno.EPERM),  # acct
        (438, (), "CAP_SYS_PTRACE", errno.EPERM),  # pidfd_getfd
        (173, (), "CAP_SYS_RAWIO", errno.EPERM),  # ioperm
        (164, (), "CAP_SYS_TIME", errno.EPERM),  # settimeofday
        (153, (), "CAP_SYS_TTY_CONFIG", errno.EPERM),  # vhangup
        (103, (), "CAP_SYSLOG", errno.EPERM),  # syslog
    ],
)
def test_calls_that_a_capability_opens(number: int, arguments: tuple[int, ...], capability: str, without: int) -> None:
    closed = default_profile(("CAP_CHOWN",), "x86_64", (6, 18))
    assert run(bpf(closed), lib.X86_64, number, arguments) == lib.ERRNO | without
    assert run(bpf(default_profile((capability,), "x86_64", (6, 18))), lib.X86_64, number, arguments) == lib.ALLOW


NEWNS, NEWUSER, SIGCHLD = 0x20000, 0x10000000, 17


@x86
@pytest.mark.parametrize(
    ("number", "arguments", "answer"),
    [
        (0, (), 0),  # read
        (332, (), 0),  # statx
        (452, (), 0),  # fchmodat2
        (462, (), 0),  # mseal
        (469, (), 0),  # file_setattr
        (471, (), 0),  # rseq_slice_yield, 7.0
        (472, (), errno.ENOSYS),
        (600, (), errno.ENOSYS),
        (335, (), 0),  # uretprobe
        (101, (), 0),  # ptrace
        (41, (2,), 0),  # AF_INET
        (41, (16,), 0),  # AF_NETLINK
        (41, (38,), errno.EPERM),  # AF_ALG
        (41, (39,), 0),
        (41, (40,), errno.EPERM),  # AF_VSOCK
        (41, (44,), 0),
        (56, (SIGCHLD,), 0),  # clone
        (56, (NEWNS | SIGCHLD,), errno.EPERM),
        (56, (NEWUSER,), errno.EPERM),
        (135, (0,), 0),  # personality
        (135, (0xFFFFFFFF,), 0),
        (135, (0x40000,), errno.EPERM),  # ADDR_NO_RANDOMIZE
        (248, (), errno.EPERM),  # add_key
        (250, (), errno.EPERM),  # keyctl
        (323, (), errno.EPERM),  # userfaultfd
        (425, (), errno.EPERM),  # io_uring_setup
        (246, (), errno.EPERM),  # kexec_load
        (155, (), errno.EPERM),  # pivot_root
    ],
)
def test_the_default_profile_s_answers(number: int, arguments: tuple[int, ...], answer: int) -> None:
    expected = lib.ERRNO | answer if answer else lib.ALLOW
    assert run(bpf(default()), lib.X86_64, number, arguments) == expected


@x86
def test_the_default_profile_covers_32_bit_programs() -> None:
    program = bpf(default())
    assert run(program, lib.X86, 3) == lib.ALLOW, "read"
    assert run(program, lib.X86, 403) == lib.ALLOW, "clock_gettime64"
    assert run(program, lib.X86, 21) == lib.ERRNO | errno.EPERM, "mount"
    assert run(program, lib.X86, 452) == lib.ALLOW, "fchmodat2"
    assert run(program, lib.X86, 500) == lib.ERRNO | errno.ENOSYS
    assert run(program, lib.X86_64, 0x40000000) == lib.ALLOW, "read of x32"
    assert run(program, lib.X86_64, 0x40000000 | 165) == lib.ERRNO | errno.EPERM, "mount of x32"


def test_all_capabilities_open_clone() -> None:
    found = default(*ALL)
    assert any("clone3" in rule.names and rule.action == "SCMP_ACT_ALLOW" for rule in found.syscalls)
    assert not any("clone3" in rule.names and rule.action == "SCMP_ACT_ERRNO" for rule in found.syscalls)


@x86
@requires("root", "seccomp")
def test_the_default_profile_under_the_kernel() -> None:
    calls = {"getpid": "39", "unshare": "272:0x20000", "mount": "165:0,0,0,0,0", "keyctl": "250:0,0", "future": "600:0"}
    calls |= {"clone3": "435:0,0", "mseal": "462:0,0,0", "socket": "41:2,1,0", "vsock": "41:40,1,0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.seccomp_program", str(flags(default())), *calls.values()],
        input=bpf(default()),
        capture_output=True,
        timeout=scaled(30),
        check=True,
    )
    answers = dict(zip(calls, map(int, done.stdout.split()), strict=True))
    mseal = answers.pop("mseal")
    assert mseal in (0, errno.ENOSYS), "not refused; older kernels lack it"
    assert answers == {
        "getpid": 0,
        "unshare": errno.EPERM,
        "mount": errno.EPERM,
        "keyctl": errno.EPERM,
        "future": errno.ENOSYS,
        "clone3": errno.ENOSYS,
        "socket": 0,
        "vsock": errno.EPERM,
    }

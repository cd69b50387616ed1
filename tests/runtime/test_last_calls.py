"""The end of a start under seccomp filters that kill on any call but those that it needs: one fewer, and it is killed.

A process that its filter kills at execve can't be told from a program that it kills later: it has started and ended.
The program is an ELF file of a few instructions, so that nothing but exit_group comes on top.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from pathlib import Path

import pytest
from msgspec.structs import replace

from runtime.engine import Cgroup, ExecStart, Maps, Pod, PodStart
from runtime.spec import Linux, Mount, Process, Seccomp, SeccompRule, Spec, User
from tests.requires import requires
from tests.runtime.conftest import MAPS, POD_ID, TIMEOUT_S, Bench, container

pytestmark = [requires("root", "overlay", "busybox", "seccomp"), pytest.mark.asyncio]
# With no_new_privs the filter comes last; without it loading takes a privilege, and so comes before the identity.
NEEDED = {
    True: ("execve",),
    False: ("capset", "execve", "prctl", "setgroups", "setresgid", "setresuid"),
}
_CODE = {
    "x86_64": (62, b"\xb8\xe7\x00\x00\x00" + b"\x31\xff" + b"\x0f\x05"),  # mov eax, 231; xor edi, edi; syscall
    "aarch64": (183, struct.pack("<III", 0xD2800BC8, 0xD2800000, 0xD4000001)),  # mov x8, 94; mov x0, 0; svc 0
}
KILLED = 128 + signal.SIGSYS
EACH = pytest.mark.parametrize("maps", [(), pytest.param(MAPS, marks=requires("userns"))])
BOTH = pytest.mark.parametrize("no_new_privileges", [True, False])


@pytest.fixture
def program(tmp_path: Path) -> Mount:
    """/true in the container."""
    machine, code = _CODE[os.uname().machine]
    start, headers = 0x400000, 64 + 56
    path = tmp_path / "true"
    path.write_bytes(
        struct.pack(
            "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine, 1, start + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0
        )
        + struct.pack("<IIQQQQQQ", 1, 5, 0, start, start, headers + len(code), headers + len(code), 4096)
        + code
    )
    path.chmod(0o755)
    return Mount(destination="/true", type="bind", source=str(path), options=("bind", "ro"))


def only(calls: tuple[str, ...]) -> Seccomp:
    rule = SeccompRule(names=(*calls, "exit_group"), action="SCMP_ACT_ALLOW")
    return Seccomp(default_action="SCMP_ACT_KILL_PROCESS", syscalls=(rule,))


def filtered(pod: Pod, program: Mount, calls: tuple[str, ...], *, no_new_privileges: bool) -> Spec:
    def process(given: Process) -> Process:
        user = User(uid=7, gid=8, additional_gids=(8, 9))
        return replace(given, user=user, no_new_privileges=no_new_privileges)

    def linux(given: Linux) -> Linux:
        return replace(given, seccomp=only(calls))

    return container(pod, "/true", mounts=(program,), process=process, linux=linux)


async def pod_of(bench: Bench, maps: Maps) -> Pod:
    return await bench.pod(PodStart(id=POD_ID, hostname="pod", uids=maps, gids=maps))


@EACH
@BOTH
async def test_a_start_takes_no_more_and_no_fewer(
    bench: Bench, program: Mount, maps: Maps, no_new_privileges: bool
) -> None:
    pod = await pod_of(bench, maps)
    calls = NEEDED[no_new_privileges]
    for round in range(5):  # an allocation that happens now and then would show
        spec = filtered(pod, program, calls, no_new_privileges=no_new_privileges)
        exited, _ = await bench.run(pod, f"c{round}", spec)
        assert exited.code == 0
    for one in calls:
        fewer = tuple(call for call in calls if call != one)
        spec = filtered(pod, program, fewer, no_new_privileges=no_new_privileges)
        exited, _ = await bench.run(pod, f"without-{one}", spec)
        assert exited.code == KILLED


@EACH
@BOTH
async def test_an_exec_takes_no_more_and_no_fewer(
    bench: Bench, program: Mount, maps: Maps, no_new_privileges: bool, null: int
) -> None:
    pod = await pod_of(bench, maps)
    await bench.start(pod, "c", container(pod, "sleep", "100", mounts=(program,)))
    cgroup = Cgroup.of(bench.cgroups, f"{bench.cgroup}/c")

    async def run(number: int, calls: tuple[str, ...]) -> int:
        spec = filtered(pod, program, calls, no_new_privileges=no_new_privileges)
        assert spec.linux is not None
        request = ExecStart(f"e{number}", "c", spec.process, spec.linux, cgroup.join_files, cgroup.clone_dir)
        return (await asyncio.wait_for(pod.exec(request, null, null, null).wait(), TIMEOUT_S)).code

    calls = NEEDED[no_new_privileges]
    for number in range(5):
        assert await run(number, calls) == 0
    for number, one in enumerate(calls, 5):
        assert await run(number, tuple(call for call in calls if call != one)) == KILLED

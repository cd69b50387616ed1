"""AppArmor profiles are what containers and their execs run under."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator

import msgspec
import pytest

from runtime import apparmor
from runtime.engine import Cgroup, ExecStart
from runtime.errors import StepFailed
from runtime.spec import Linux, Process, User
from tests.requires import requires
from tests.runtime.conftest import TIMEOUT_S, Bench, container

pytestmark = [requires("root", "overlay", "busybox", "apparmor"), pytest.mark.asyncio]
_NO_WRITES = "profile crib-test-no-writes flags=(attach_disconnected) { file, deny /** w, }"
_SHOW = (
    "cat /proc/self/attr/current; echo x > /new && echo written; "
    "(echo x > /proc/sys/vm/swappiness) 2> /dev/null || echo refused"
)


@pytest.fixture
def no_writes() -> Iterator[str]:
    def parser(*arguments: str) -> None:
        subprocess.run(["apparmor_parser", *arguments], input=_NO_WRITES, text=True, check=True, capture_output=True)

    parser("--replace", "--skip-cache")
    yield "crib-test-no-writes"
    parser("--remove")


async def test_a_profile_is_applied(bench: Bench, no_writes: str, null: int) -> None:
    def confined(process: Process) -> Process:
        return msgspec.structs.replace(process, apparmor_profile=no_writes)

    pod = await bench.pod()
    _, log = await bench.run(pod, "c", container(pod, "sh", "-c", _SHOW, process=confined))
    assert log.startswith(f"{no_writes} (enforce)\n")
    assert "written" not in log
    await bench.start(pod, "d", container(pod, "sleep", "100"))
    process = Process(cwd="/", user=User(uid=0, gid=0), args=("cat", "/proc/self/attr/current"), env=("PATH=/bin",))
    cgroup = Cgroup.of(bench.cgroups, f"{bench.cgroup}/d")
    read, write = os.pipe()
    start = ExecStart("e", "d", confined(process), Linux(), cgroup.join_files, cgroup.clone_dir)
    await asyncio.wait_for(pod.exec(start, null, write, write).wait(), TIMEOUT_S)
    os.close(write)
    assert os.read(read, 99) == f"{no_writes} (enforce)\n".encode()
    os.close(read)


async def test_the_default_profile(bench: Bench) -> None:
    assert apparmor.enabled()
    name = apparmor.load_default()
    assert name in apparmor.loaded()
    pod = await bench.pod()
    spec = container(
        pod,
        "sh",
        "-c",
        _SHOW + "; kill -0 $$ && echo own",
        process=lambda process: msgspec.structs.replace(process, apparmor_profile=name),
    )
    _, log = await bench.run(pod, "c", spec)
    lines = log.splitlines()
    assert lines[:2] == [f"{name} (enforce)", "written"]
    assert lines[-2:] == ["refused", "own"]
    await bench.start(
        pod, "d", msgspec.structs.replace(spec, process=msgspec.structs.replace(spec.process, args=("sleep", "9")))
    )
    await pod.signal("d", 9)
    assert (await asyncio.wait_for(bench.exited("d"), TIMEOUT_S)).code == 137


async def test_what_newer_kernels_mediate_is_allowed_by_the_default(bench: Bench) -> None:
    """Local sockets, user namespaces (containerd #12726); and a namespace's own parameters, below /proc/sys."""
    name = apparmor.load_default()
    pod = await bench.pod()
    script = (
        "syslogd -O /said && logger over a local socket; until grep -o 'over.*' /said; do :; done; unshare -U echo in; "
        "cat /proc/sys/kernel/shmmni > /proc/sys/kernel/shmmni && echo set"
    )
    spec = container(
        pod, "sh", "-c", script, process=lambda process: msgspec.structs.replace(process, apparmor_profile=name)
    )
    _, log = await bench.run(pod, "c", spec)
    assert log.splitlines() == ["over a local socket", "in", "set"]


async def test_a_profile_that_is_not_loaded(bench: Bench) -> None:
    pod = await bench.pod()
    spec = container(
        pod, "true", process=lambda process: msgspec.structs.replace(process, apparmor_profile="crib-test-none")
    )
    with pytest.raises(StepFailed):
        await bench.start(pod, "c", spec)

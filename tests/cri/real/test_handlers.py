"""RuntimeClass handlers end to end: an OCI runtime of the host's runs a pod's containers, and crib does the rest."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from cri.api import cri_pb2 as pb
from runtime.cgroup import detect
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN, RUNTIME
from tests.cri.real.test_resources import cgroup_path
from tests.limits import scaled
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay", "runc")]


LATE = 'case "$1" in *.pid) file=$1; set -- "$@" "$1.late";; *) set -- "$@" "$1";; esac; shift'
"""Of a runtime's arguments: the pid goes to another file."""


def program() -> str:
    return RUNTIME or cast(str, shutil.which("runc"))


@pytest.fixture
def settings(run_dir: Path) -> str:
    """The handlers `oci`, a runtime of the host's, and `gone`, one that can be taken away."""
    (run_dir / "rt").symlink_to(program())
    own = f"[handlers.oci]\npath = '{program()}'\nannotations = ['allowed/*']\n"
    return f"{BUILTIN}{own}[handlers.gone]\npath = '{run_dir}/rt'\n"


async def pod_of(real: Real, handler: str, pod_name: str = "pod", **fields: Any) -> str:
    request = pb.RunPodSandboxRequest(config=real.pod_config(pod_name, **fields), runtime_handler=handler)
    return str((await real.client.RunPodSandbox(request)).pod_sandbox_id)


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def info_of(real: Real, container: str) -> dict[str, Any]:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    found: dict[str, Any] = json.loads((await real.client.ContainerStatus(request)).info["info"])
    return found


async def test_a_handlers_containers_are_its_runtimes(real: Real) -> None:
    pod = await pod_of(real, "oci", annotations={"allowed/a": "1", "other/b": "2"})
    mounts = Path("/proc/self/mountinfo").read_text()
    container = await real.run(pod, "sh", "-c", "echo out; echo err >&2; exec sleep 1000")
    info = await info_of(real, container)
    assert (info["runtimeHandler"], info["runtimeType"]) == ("oci", program())
    assert info["runtimeSpec"]["annotations"]["allowed/a"] == "1"
    assert "other/b" not in info["runtimeSpec"]["annotations"]
    bundle = real.daemon.state / "pods" / pod / f"bundle-{container}"
    assert json.loads((bundle / "config.json").read_text())["process"]["args"][-1].startswith("echo out")
    runtimes = real.daemon.state / "pods" / pod / "runtime"
    assert [path.name for path in runtimes.iterdir() if path.name[0] != "."] == [container]  # crun has one of its own
    assert Path("/proc/self/mountinfo").read_text() == mounts, "what is mounted for it is seen by the host"
    status = Path(f"/proc/{info['pid']}/status").read_text()
    parent = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
    assert "crib-monitor" in Path(f"/proc/{parent}/cmdline").read_text()
    await until(lambda: (real.logs / "c.log").exists() and "stderr F err" in (real.logs / "c.log").read_text())
    assert "stdout F out" in (real.logs / "c.log").read_text()
    answer = await real.sh(container, "echo one; echo two >&2; exit 7")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"one\n", b"two\n", 7)
    assert not [path for path in bundle.iterdir() if path.suffix in (".json", ".pid") and path.stem not in _OF_CREATE]
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    assert not bundle.exists()
    assert not (runtimes / container).exists()


_OF_CREATE = ("config", "create", "start")


async def test_two_handlers_on_one_node(real: Real) -> None:
    builtin, external = await real.pod(), await pod_of(real, "oci", "external")
    for pod in (builtin, external):
        container = await real.run(pod, "sleep", "1000")
        assert (await real.sh(container, "cat /proc/1/cmdline")).stdout == b"sleep\0001000\0"
    listed = (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    assert {item.id: item.runtime_handler for item in listed} == {builtin: "", external: "oci"}


async def test_what_the_runtime_says_is_what_the_kubelet_hears(real: Real) -> None:
    pod = await pod_of(real, "oci")
    container = await real.create(pod, "/nothing")
    code, said = await refused(real.start(container))
    assert code is grpc.StatusCode.UNKNOWN
    assert "runtime handler 'oci'" in said
    assert "/nothing" in said
    found = await real.status(container)
    assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert "/nothing" in found.message
    running = await real.run(pod, "sleep", "1000", name="running")
    code, said = await refused(
        real.client.ExecSync(pb.ExecSyncRequest(container_id=running, cmd=["/nothing"], timeout=10))
    )
    assert "/nothing" in said
    assert (await real.sh(running, "echo on")).stdout == b"on\n"


async def test_a_runtime_that_is_gone(real: Real) -> None:
    status = await real.client.Status(pb.StatusRequest())
    shown = {handler.name: handler.features for handler in status.runtime_handlers}
    assert set(shown) == {"", "gone", "oci"}
    assert shown["gone"] == shown["oci"]
    pod = await pod_of(real, "gone")
    container = await real.run(pod, "sleep", "1000")
    late = await real.create(pod, "true", name="late")
    link = real.daemon.directory / "rt"
    link.unlink()
    status = await real.client.Status(pb.StatusRequest())
    shown = {handler.name: handler.features for handler in status.runtime_handlers}
    assert shown["gone"] == pb.RuntimeHandlerFeatures()
    code, said = await refused(pod_of(real, "gone", "other"))
    assert (code, said) == (grpc.StatusCode.INVALID_ARGUMENT, f"runtime_handler 'gone': {link} is no program")
    code, said = await refused(real.start(late))
    assert f"exec {link}: no such file or directory" in said
    code, said = await refused(real.sh(container, "true"))
    assert f"exec {link}: no such file or directory" in said
    assert (await real.status(container)).state == pb.CONTAINER_RUNNING
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
    assert (await real.status(container)).exit_code == 137


async def test_a_command_that_is_killed_while_the_runtime_makes_it(real: Real) -> None:
    """Its caller goes at any moment; of what the runtime has made by then nothing is left."""
    container = await real.run(await pod_of(real, "oci"), "sleep", "1000")
    path = cgroup_path(await real.pid(container))
    request = pb.ExecSyncRequest(container_id=container, cmd=["sleep", "1234"])

    async def once(number: int) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await real.client.ExecSync(request, timeout=scaled(number / 200))

    for begin in range(1, 41, 4):
        await asyncio.gather(*(once(number) for number in range(begin, begin + 4)))
    await until(lambda: len(detect().procs(path)) == 1)
    assert (await real.sh(container, "echo on")).stdout == b"on\n"


async def test_a_command_that_the_runtime_never_gets_made(real: Real) -> None:
    link, hung = real.daemon.directory / "rt", real.daemon.directory / "hung"
    container = await real.run(await pod_of(real, "gone"), "sleep", "1000")
    link.unlink()
    hangs = f"echo $$ > {hung}.new; mv {hung}.new {hung}; sleep 1000"
    link.write_text(f'#!/bin/sh\ncase " $* " in *" exec "*) {hangs};; esac\nexec {program()} "$@"\n')
    link.chmod(0o755)
    code, _ = await refused(real.client.ExecSync(pb.ExecSyncRequest(container_id=container, cmd=["true"], timeout=1)))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not Path(f"/proc/{hung.read_text().strip()}").exists()
    assert "killing a command failed" not in real.daemon.log()
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))


async def test_a_command_that_has_ended_before_the_runtime_names_it(real: Real) -> None:
    """As crun's may, whose process is nobody's child before its pid is written."""
    link = real.daemon.directory / "rt"
    container = await real.run(await pod_of(real, "gone"), "sleep", "1000")
    link.unlink()
    ended = 'while [ -e "/proc/$(cat "$file.late")" ]; do sleep 0.01; done; mv "$file.late" "$file"; exit 0'
    link.write_text(
        f'#!/bin/sh\ncase " $* " in *" exec "*)\n'
        f'n=$#; while [ $n -gt 0 ]; do {LATE}; n=$((n - 1)); done\n{program()} "$@" || exit; {ended};; esac\n'
        f'exec {program()} "$@"\n'
    )
    link.chmod(0o755)
    for code in (0, 7):
        said = await real.sh(container, f"echo said; exit {code}")
        assert (said.exit_code, said.stdout) == (code, b"said\n")


async def test_a_command_that_is_made_and_never_named(real: Real) -> None:
    """The runtime hangs when the process runs already; others of the container, by then and later, are left alone."""
    link, made = real.daemon.directory / "rt", real.daemon.directory / "made"
    container = await real.run(await pod_of(real, "gone"), "sh", "-c", "setsid sh -c 'sleep 1001 & sleep 1002' & wait")
    path = cgroup_path(await real.pid(container))

    def sleeping() -> set[str]:
        found = set()
        for pid in detect().procs(path):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                found |= {words[1]} if words[0] == "sleep" else set()
        return found

    other = asyncio.ensure_future(real.sh(container, "sleep 1003; true", limit_s=1000))
    await until(lambda: sleeping() == {"1001", "1002", "1003"})
    link.unlink()
    link.write_text(
        f'#!/bin/sh\ncase " $* " in *" exec "*)\n'
        f"n=$#; while [ $n -gt 0 ]; do {LATE}; n=$((n - 1)); done\n"
        f'{program()} "$@" || exit; touch {made}; sleep 1000;; esac\nexec {program()} "$@"\n'
    )
    link.chmod(0o755)
    for _ in range(2):
        request = pb.ExecSyncRequest(container_id=container, cmd=["sleep", "1004"], timeout=2)
        code, _ = await refused(real.client.ExecSync(request))
        assert (code, made.exists()) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        made.unlink()
        await until(lambda: sleeping() == {"1001", "1002", "1003"})
    assert not other.done()
    other.cancel()
    await until(lambda: sleeping() == {"1001", "1002"})


async def test_an_unknown_handler(real: Real) -> None:
    image = pb.ImageSpec(image="localhost/crib/busybox:latest", runtime_handler="nobody")
    for asked in (pod_of(real, "nobody"), real.client.PullImage(pb.PullImageRequest(image=image))):
        code, said = await refused(asked)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said == "runtime_handler 'nobody': this node has '', 'gone', 'oci'"


@pytest.mark.parametrize("when", ["create", "start"])
async def test_a_crash_in_the_middle_of_a_start(real: Real, when: str) -> None:
    """The runtime hangs in `create` or in `start`; the next cribd ends what nobody knows to be running."""
    link = real.daemon.directory / "rt"
    pod = await pod_of(real, "gone")
    link.unlink()
    hung = real.daemon.directory / "hung"
    link.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" {when} "*) echo $$ > {hung}.new; mv {hung}.new {hung}; sleep 1000;; esac\n'
        f'exec {program()} "$@"\n'
    )
    link.chmod(0o755)
    container = await real.create(pod, "sleep", "1000")
    start = asyncio.ensure_future(real.start(container))
    await until(hung.exists)
    real.daemon.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await start
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    found = await real.status(container)
    assert (found.state, found.reason) == (pb.CONTAINER_EXITED, "StartError")
    if when == "start":  # a child of the cribd that was killed
        os.killpg(int(hung.read_text()), signal.SIGKILL)
    link.unlink()
    link.symlink_to(program())
    again = await real.run(pod, "sleep", "1000", name="again")
    assert (await real.sh(again, "echo on")).stdout == b"on\n"

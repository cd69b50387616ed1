"""Hooks run where and when the OCI runtime spec says, and a failing or hanging one ends the start."""

from __future__ import annotations

import asyncio
import json
import os
from functools import partial
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from runtime.engine import Maps, PodStart
from runtime.errors import CribError, InvalidSpec, StepFailed
from runtime.pod import gone
from runtime.spec import Hook, Hooks, Linux, Spec
from runtime.zygote.launch import interpreter
from tests.requires import requires
from tests.runtime.conftest import MAPS, POD_ID, TIMEOUT_S, Bench, container

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]


def hook(script: str, *env: str, timeout: int | None = None, path: str = "/bin/sh") -> Hook:
    return Hook(path=path, args=("sh", "-c", script), env=env, timeout=timeout)


def with_hooks(spec: Spec, **stages: tuple[Hook, ...]) -> Spec:
    return msgspec.structs.replace(spec, hooks=Hooks(**stages))


async def test_each_stage_runs_in_its_namespaces_with_the_state(bench: Bench, tmp_path: Path) -> None:
    pod = await bench.pod()

    def note(stage: str, then: str = "true") -> tuple[Hook, ...]:
        tell = (
            "(readlink /proc/self/ns/mnt; readlink /proc/self/ns/net; cat; echo; echo $A $PATH $PWD) > "
            f"{tmp_path}/{stage}"
        )
        return (hook(f"{tell}; {then}", "A=b", "PATH=/bin:/usr/bin"),)

    inside = Hook(path="/bin/sh", args=("sh", "-c", "cat > /state; id -u > /id; grep CapEff /proc/self/status >> /id"))
    spec = with_hooks(
        container(pod, "sh", "-c", "cat /made; cat /state; cat /id"),
        create_runtime=note("createRuntime"),
        create_container=note("createContainer", f"echo made > {pod.environment.staging}/made"),
        start_container=(msgspec.structs.replace(inside, env=("PATH=/bin",)),),
        poststart=note("poststart"),
        poststop=note("poststop"),
    )
    exited, log = await bench.run(pod, "c", spec)
    assert exited.code == 0, log
    await bench.engine.stopped(POD_ID, "c", lambda: spec)
    found = {
        path.name: path.read_text().splitlines()
        for path in tmp_path.iterdir()
        if path.name in Hooks.__struct_encode_fields__
    }
    own = [os.readlink("/proc/self/ns/mnt"), os.readlink("/proc/self/ns/net")]
    assert {stage for stage, lines in found.items() if lines[:2] == own} == {"createRuntime", "poststart", "poststop"}
    assert found["createContainer"][0] != own[0]
    assert found["createContainer"][1] != own[1]
    statuses = {"createRuntime": "creating", "createContainer": "creating", "poststart": "running"}
    for stage, status in (statuses | {"poststop": "stopped"}).items():
        state = json.loads(found[stage][2])
        assert (state["id"], state["status"], state["ociVersion"]) == ("c", status, "1.2.0")
        assert found[stage][3] == "b /bin:/usr/bin /"
    assert json.loads(found["createRuntime"][2])["pid"] == json.loads(found["poststart"][2])["pid"] == exited.pid
    lines = log.splitlines()
    assert lines[0] == "made"
    state, _ = json.JSONDecoder().raw_decode(lines[1])
    assert (state["pid"], state["status"]) == (1, "created")
    assert "CapEff:\t00000000080000e1" in log  # the container's, not the host's
    assert not Path(json.loads(found["createRuntime"][2])["bundle"]).exists()


@pytest.mark.parametrize("stage", ["create_runtime", "create_container", "start_container"])
async def test_a_hook_that_fails_or_hangs_ends_the_start(bench: Bench, stage: str) -> None:
    pod = await bench.pod()
    for number, (script, cause) in enumerate(
        (("echo no >&2; exit 3", "exit code 3: no"), ("sleep 60", "longer than 1 s"))
    ):
        one = (hook(script, "PATH=/bin:/usr/bin", timeout=1),)
        with pytest.raises(StepFailed, match=cause):
            await asyncio.wait_for(
                bench.start(pod, f"c{number}", with_hooks(container(pod, "true"), **{stage: one})), TIMEOUT_S
            )
    with pytest.raises(StepFailed, match=r"(?i)no such file"):
        await bench.start(pod, "c2", with_hooks(container(pod, "true"), **{stage: (Hook(path="/no/hook"),)}))
    assert await pod.containers() == []


@pytest.mark.parametrize("stage", ["create_runtime", "create_container", "start_container"])
async def test_a_hook_is_over_when_it_has_ended_whatever_it_leaves_writing(bench: Bench, stage: str) -> None:
    pod = await bench.pod()
    leave = "cat /dev/zero >&2 & head -c 1000000 /dev/zero >&2; exit"
    for code in (0, 3):
        one = (hook(f"{leave} {code}", "PATH=/bin:/usr/bin"),)
        spec = with_hooks(container(pod, "true"), **{stage: one})
        start = asyncio.wait_for(bench.start(pod, f"c{code}", spec), TIMEOUT_S)
        if not code:
            await start
            continue
        with pytest.raises(StepFailed, match="exit code 3"):
            await start


async def test_a_failing_poststart_hook_is_a_warning(bench: Bench) -> None:
    pod = await bench.pod()
    spec = with_hooks(container(pod, "sleep", "100"), poststart=(hook("exit 4"),), poststop=(hook("exit 5"),))
    started = await bench.start(pod, "c", spec)
    assert any("poststart hook /bin/sh: exit code 4" in warning for warning in started.warnings)
    with pytest.raises(CribError, match="exit code 5"):
        await bench.engine.stopped(POD_ID, "c", lambda: spec)


# As a createContainer hook may: the bundle by the state on stdin, and the root by the bundle.
_BY_BUNDLE = """
import json, sys
state = json.load(sys.stdin)
config = json.load(open(state["bundle"] + "/config.json"))
open(config["root"]["path"] + "/made", "w").write(" ".join(config["process"]["args"]))
"""


@requires("userns")
async def test_hooks_of_a_mapped_container(bench: Bench, tmp_path: Path) -> None:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", uids=MAPS, gids=MAPS))
    spec = with_hooks(
        container(pod, "cat", "/made", "/id"),
        create_runtime=(hook(f"cat > {tmp_path}/state"),),
        create_container=(Hook(path=interpreter(), args=("python", "-I", "-S", "-c", _BY_BUNDLE)),),
        start_container=(hook("/bin/id -u > /id"),),
    )
    exited, log = await bench.run(pod, "c", spec)
    assert (exited.code, log) == (0, "cat /made /id0\n")
    assert json.loads((tmp_path / "state").read_text())["pid"] == exited.pid


async def test_a_hook_that_hangs_dies_with_all_that_it_has_started(bench: Bench, tmp_path: Path) -> None:
    pod = await bench.pod()
    tell = f"echo $$ >> {tmp_path}/pids; exec sleep 1000"
    script = f"setsid sh -c '{tell}' & setsid setsid sh -c 'sh -c \"{tell}\" & sh -c \"{tell}\"' & {tell}"
    spec = with_hooks(container(pod, "true"), create_runtime=(hook(script, "PATH=/bin:/usr/bin", timeout=2),))
    with pytest.raises(StepFailed, match="longer than 2 s"):
        await asyncio.wait_for(bench.start(pod, "c", spec), TIMEOUT_S)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 4
    assert [pid for pid in pids if Path("/proc", pid).exists()] == []


async def test_what_a_hook_leaves_running_runs_on(bench: Bench, tmp_path: Path) -> None:
    pod = await bench.pod()
    leave = f"setsid sh -c 'echo $$ > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/left; exec sleep 1000' &"
    wait = f"while [ ! -e {tmp_path}/left ]; do sleep 0.01; done"
    hooked = (hook(f"{leave} {wait}", "PATH=/bin:/usr/bin", timeout=30),)
    exited, _ = await bench.run(pod, "c", with_hooks(container(pod, "true"), create_runtime=hooked))
    assert exited.code == 0
    pid = int((tmp_path / "left").read_text())
    assert Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    pidfd = os.pidfd_open(pid)
    os.kill(pid, 9)
    await gone(pidfd, TIMEOUT_S)
    os.close(pidfd)


async def test_poststop_needs_no_monitor(bench: Bench, tmp_path: Path) -> None:
    pod = await bench.pod()
    spec = with_hooks(container(pod, "sleep", "100"), poststop=(hook(f"/bin/cat > {tmp_path}/state"),))
    await bench.start(pod, "c", spec)
    await bench.engine.stop_pod(POD_ID)
    await bench.engine.stopped(POD_ID, "c", lambda: spec)
    state = json.loads((tmp_path / "state").read_text())
    assert (state["id"], state["status"]) == ("c", "stopped")
    (tmp_path / "state").unlink()
    await bench.engine.stopped(POD_ID, "c", lambda: spec)
    assert not (tmp_path / "state").exists()  # once


@pytest.mark.parametrize("maps", [(), pytest.param(MAPS, marks=requires("userns"))])
async def test_kernel_parameters_of_a_spec(bench: Bench, maps: Maps) -> None:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", uids=maps, gids=maps))
    given = {"net.ipv4.ip_forward": "1", "net/ipv4/conf/lo/forwarding": "0"}
    if not maps:  # who is root only inside may not write that one
        given["kernel.domainname"] = "example"
    names = " ".join(f"/proc/sys/{name.replace('.', '/')}" for name in given)
    spec = container(pod, "sh", "-c", f"cat {names}", linux=lambda linux: replace(linux, sysctl=given))
    exited, log = await bench.run(pod, "c", spec)
    assert (exited.code, log) == (0, "1\n0\n" + "example\n" * (not maps))

    def one(name: str, linux: Linux) -> Linux:
        return replace(linux, sysctl={name: "1"})

    for name in ("kernel.core_pattern", "vm.overcommit_memory"):
        with pytest.raises(InvalidSpec, match=name):
            await bench.start(pod, "d", container(pod, "true", linux=partial(one, name)))
    hosts = container(pod, "true", namespaces={"network": None}, linux=lambda linux: replace(linux, sysctl=given))
    with pytest.raises(InvalidSpec, match="ip_forward"):
        await bench.start(pod, "e", hosts)

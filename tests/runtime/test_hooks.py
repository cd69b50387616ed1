"""Hooks run where and when the OCI runtime spec says, and a failing or hanging one ends the start."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import msgspec
import pytest

from runtime.engine import PodStart
from runtime.errors import CribError, StepFailed
from runtime.spec import Hook, Hooks, Spec
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
            f"(readlink /proc/self/ns/mnt; readlink /proc/self/ns/net; cat; echo; echo $A $PATH) > {tmp_path}/{stage}"
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
    await pod.stopped("c", spec)
    found = {
        path.name: path.read_text().splitlines()
        for path in tmp_path.iterdir()
        if path.name in Hooks.__struct_encode_fields__
    }
    own = [os.readlink("/proc/self/ns/mnt"), os.readlink("/proc/self/ns/net")]
    assert {stage for stage, lines in found.items() if lines[:2] == own} == {"createRuntime", "poststart", "poststop"}
    assert found["createContainer"][0] != own[0]
    assert found["createContainer"][1] != own[1]
    for stage, status in (("createRuntime", "creating"), ("poststart", "running"), ("poststop", "stopped")):
        state = json.loads(found[stage][2])
        assert (state["id"], state["status"], state["ociVersion"]) == ("c", status, "1.2.0")
        assert found[stage][3] == "b /bin:/usr/bin"
    assert json.loads(found["createRuntime"][2])["pid"] == json.loads(found["poststart"][2])["pid"] == exited.pid
    lines = log.splitlines()
    assert lines[0] == "made"
    assert (
        json.loads(
            lines[1].partition("}")[0] + "}}" if lines[1].count("}") == 1 else lines[1].rpartition("}")[0] + "}"
        )["pid"]
        == 1
    )
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


async def test_a_failing_poststart_hook_is_a_warning(bench: Bench) -> None:
    pod = await bench.pod()
    spec = with_hooks(container(pod, "sleep", "100"), poststart=(hook("exit 4"),), poststop=(hook("exit 5"),))
    started = await bench.start(pod, "c", spec)
    assert any("poststart hook /bin/sh: exit code 4" in warning for warning in started.warnings)
    with pytest.raises(CribError, match="exit code 5"):
        await pod.stopped("c", spec)


@requires("userns")
async def test_hooks_of_a_mapped_container(bench: Bench, tmp_path: Path) -> None:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", uids=MAPS, gids=MAPS))
    spec = with_hooks(
        container(pod, "cat", "/made", "/id"),
        create_runtime=(hook(f"cat > {tmp_path}/state"),),
        create_container=(hook("echo made > /sys/made"),),
        start_container=(hook("/bin/id -u > /id"),),
    )
    exited, log = await bench.run(pod, "c", spec)
    assert (exited.code, log) == (0, "made\n0\n")
    assert json.loads((tmp_path / "state").read_text())["pid"] == exited.pid

"""How containers are stopped, and what a node's hooks have to say about their starts, end to end."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN, IMAGE, RUNTIME
from tests.cri.real.test_images import busybox, load
from tests.cri.real.test_modes import refused
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]
STUBBORN = 'trap "echo TERM" TERM; trap "echo USR1" USR1; trap "echo USR2" USR2; echo up; while :; do sleep 0.02; done'
STAGES = ("createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@pytest.fixture
def hooks_dir(run_dir: Path) -> Path:
    path = run_dir / "hooks.d"
    path.mkdir()
    return path


@pytest.fixture
def settings(hooks_dir: Path) -> str:
    return f'hooks_dirs = ["{hooks_dir}"]\n{BUILTIN}'


def said(real: Real, name: str = "c") -> list[str]:
    path = real.logs / f"{name}.log"
    return [line.split(" ", 3)[3] for line in path.read_text().splitlines()] if path.exists() else []


def stop(real: Real, container: str, timeout_s: int, **call: Any) -> Any:
    return real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=timeout_s), **call)


async def stubborn(real: Real, pod: str, **fields: Any) -> str:
    container = await real.run(pod, "sh", "-c", STUBBORN, **fields)
    await until(lambda: said(real, fields.get("name", "c")))
    return container


async def test_a_shorter_stop_wins_and_sends_no_second_signal(real: Real) -> None:
    container = await stubborn(real, await real.pod())
    first = asyncio.ensure_future(stop(real, container, 1000))
    await until(lambda: "TERM" in said(real))
    code, _ = await refused(stop(real, container, 900, timeout=0.5))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED, "its caller has gone, and it goes with it"
    found = await real.sh(container, "echo inside")
    assert found.stdout == b"inside\n", "a container that is being stopped takes commands"
    await stop(real, container, 1)
    await first
    status = await real.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 137, "Error")
    assert said(real) == ["up", "TERM"]
    code, text = await refused(real.sh(container, "true"))
    assert (code, "not running" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)


async def test_a_stop_whose_caller_goes_leaves_the_container_running(real: Real) -> None:
    container = await stubborn(real, await real.pod())
    code, _ = await refused(stop(real, container, 1, timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    found = await real.sh(container, "sleep 2; echo later")  # past the deadline of the one that is gone
    assert found.stdout == b"later\n"
    assert said(real) == ["up", "TERM"]
    await stop(real, container, 1)
    assert said(real) == ["up", "TERM"]


async def test_the_signal_is_the_requests_or_the_images(real: Real) -> None:
    image = await load(real, busybox(), StopSignal="SIGUSR2")
    pod = await real.pod()
    for name, fields, signal in (
        ("request", {"stop_signal": pb.SIGNAL_SIGUSR1, "image": image}, "USR1"),
        ("image", {"image": image}, "USR2"),
        ("default", {}, "TERM"),
    ):
        container = await stubborn(real, pod, name=name, **fields)
        assert (await real.status(container)).stop_signal == getattr(pb, f"SIGNAL_SIG{signal}")
        await stop(real, container, 1)
        assert said(real, name) == ["up", signal]


async def test_a_retry_of_what_timed_out_joins_it(real: Real) -> None:
    run = pb.RunPodSandboxRequest(config=real.pod_config())
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="c"), image=pb.ImageSpec(image=IMAGE), command=["true"]
    )

    async def again(method: Any, request: Any, begun: Path) -> set[str]:
        """What the same request is answered while, or after, the first one's caller has gone."""
        first = asyncio.ensure_future(method(request))
        await until(lambda: begun.exists() and any(begun.iterdir()))
        first.cancel()
        answers = await asyncio.gather(*(method(request) for _ in range(3)))
        return {getattr(answer, answer.DESCRIPTOR.fields[0].name) for answer in answers}

    pods = await again(real.client.RunPodSandbox, run, real.daemon.state / "pods")
    assert len(pods) == 1
    assert pods == {item.id for item in (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items}
    create = pb.CreateContainerRequest(pod_sandbox_id=pods.pop(), config=config)
    made = await again(real.client.CreateContainer, create, real.daemon.root / "rootfs")
    assert len(made) == 1
    assert made == {one.id for one in (await real.client.ListContainers(pb.ListContainersRequest())).containers}


def hook(directory: Path, name: str, script: str, stage: str, **fields: Any) -> None:
    """A hook for containers whose annotation `crib.test` is the name, or "all"."""
    asked = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin", "OWN=1"]} | fields
    when = {"annotations": {"^crib.test$": f"^({name}|all)$"}}
    file = {"version": "1.0.0", "hook": asked, "when": when, "stages": [stage]}
    (directory / f"{name}.json").write_text(json.dumps(file))


async def test_hooks_of_every_kind(real: Real, hooks_dir: Path, tmp_path: Path) -> None:
    tell = "(readlink /proc/self/ns/mnt; readlink /proc/self/ns/net; env | sort; cat) > "
    for stage in STAGES:
        where = "" if stage == "startContainer" else tmp_path
        hook(hooks_dir, stage, f"{tell} {where}/{stage}", stage)
    pod = await real.pod()
    secret = [pb.KeyValue(key="LD_PRELOAD", value=b"/evil.so"), pb.KeyValue(key="SECRET", value=b"1")]
    fields: dict[str, Any] = {"annotations": {"crib.test": "all"}, "envs": secret}
    container = await real.run(pod, "sleep", "1000", **fields)
    inside = await real.sh(container, "readlink /proc/self/ns/mnt; readlink /proc/self/ns/net; cat /startContainer")
    mount_ns, net_ns, *told = inside.stdout.decode().splitlines()
    await stop(real, container, 0)
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    found = {stage: (tmp_path / stage).read_text().splitlines() for stage in STAGES if stage != "startContainer"}
    found["startContainer"] = told
    begins = {stage: lines.index(next(line for line in lines if line[0] == "{")) for stage, lines in found.items()}
    states = {stage: json.loads("".join(lines[begins[stage] :])) for stage, lines in found.items()}
    host = [os.readlink("/proc/self/ns/mnt"), os.readlink("/proc/self/ns/net")]
    for stage, status in (("createRuntime", "creating"), ("poststart", "running"), ("poststop", "stopped")):
        assert found[stage][1] == host[1], stage
        if not RUNTIME or stage == "poststop":  # runc runs the others in `create`, in a mount namespace of its own
            assert found[stage][0] == host[0], stage
            assert states[stage]["status"] == status
    assert found["createContainer"][:2] == [mount_ns, net_ns]
    assert found["startContainer"][:2] == [mount_ns, net_ns]
    for stage in STAGES:
        assert states[stage]["id"] == container
        names = {line.partition("=")[0] for line in found[stage][2 : begins[stage]]}
        assert "OWN" in names
        assert not names & {"LD_PRELOAD", "SECRET"}, stage
    plain = await real.run(pod, "sleep", "1000", name="plain")
    assert (await real.sh(plain, "test -e /startContainer")).exit_code == 1, "its condition doesn't hold"


@requires("builtin")  # another runtime has other words
async def test_a_hook_that_fails_or_hangs(real: Real, hooks_dir: Path, tmp_path: Path) -> None:
    """The start fails, says what the hook said, and leaves nothing; others' calls are answered meanwhile."""
    hook(hooks_dir, "fails", "echo no room here >&2; exit 3", "createRuntime")
    begun = tmp_path / "begun"
    hook(hooks_dir, "hangs", f"echo $$ > {begun}.new; mv {begun}.new {begun}; sleep 1000", "createRuntime", timeout=3)
    pod, other = await real.pod(), await real.pod(real.pod_config("other"))
    calls = []
    for name, word in (("fails", "exit code 3: no room here"), ("hangs", "took longer than 3 s")):
        container = await real.create(pod, "sleep", "1000", name=name, annotations={"crib.test": name})
        calls.append((name, container, word, asyncio.ensure_future(refused(real.start(container)))))
    await until(begun.exists)
    assert (await real.sh(await real.run(other, "sleep", "1000", name="undisturbed"), "echo on")).stdout == b"on\n"
    assert not calls[-1][-1].done()
    for name, container, word, call in calls:
        _, text = await call
        assert word in text, name
        assert "createRuntime hook /bin/sh" in text
        status = await real.status(container)
        assert (status.exit_code, status.reason, word in status.message) == (128, "StartError", True)
    assert not Path("/proc", begun.read_text().strip()).exists()
    again = await real.run(pod, "sleep", "1000", name="again")
    assert (await real.sh(again, "echo on")).stdout == b"on\n"
    (hooks_dir / "broken.json").write_text("{")
    code, text = await refused(real.create(pod, "true", name="broken"))
    assert (code, "broken.json" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)

"""Containers over the socket, on fake rooms."""

from __future__ import annotations

import asyncio
import functools
import json
import threading

import grpc
import pytest

from cri.api import cri_pb2 as pb
from runtime.errors import Exhausted, InvalidSpec, Unavailable
from tests.cri.client import container_config, create, pod_config, run, run_pod, status, until
from tests.cri.conftest import Served, Start
from tests.cri.fakes import SIGTERM, FakeProcess
from tests.cri.test_sandbox import code_of
from tests.limits import scaled

pytestmark = pytest.mark.asyncio


def create_request(pod: str, config: pb.ContainerConfig) -> pb.CreateContainerRequest:
    return pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)


def stop_request(container: str, timeout: int) -> pb.StopContainerRequest:
    return pb.StopContainerRequest(container_id=container, timeout=timeout)


def start_request(container: str) -> pb.StartContainerRequest:
    return pb.StartContainerRequest(container_id=container)


def process(served: Served, container: str) -> FakeProcess:
    return next(one for one in served.world.processes() if one.id == container)


def _gone(served: Served, cgroup: str) -> bool:
    return cgroup not in served.world.cgroups


async def test_from_created_to_removed(served: Served) -> None:
    client = served.client
    pod = await run_pod(client, pod_config(log_directory=str(served.node.directory("logs"))))
    config = container_config(
        "c", labels={"a": "b"}, annotations={"c": "d"}, log_path="c/0.log", stop_signal=pb.SIGNAL_SIGINT
    )
    container = await create(client, pod, config)
    found = await status(client, container)
    assert found.state == pb.CONTAINER_CREATED
    assert found.metadata.name == "c"
    assert (found.started_at, found.finished_at) == (0, 0)
    assert found.image.image == "busybox"
    assert found.image_ref.startswith("busybox@sha256:")
    assert found.image_id == served.images.list()[0].id
    assert (dict(found.labels), dict(found.annotations)) == ({"a": "b"}, {"c": "d"})
    assert found.log_path.endswith("/logs/c/0.log")
    assert found.stop_signal == pb.SIGNAL_SIGINT
    await client.StartContainer(start_request(container))
    found = await status(client, container)
    assert found.state == pb.CONTAINER_RUNNING
    assert found.started_at >= found.created_at
    code, text = await code_of(client.StartContainer(start_request(container)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "running" in text
    await client.StopContainer(stop_request(container, 10))
    found = await status(client, container)
    assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 130, "Error")
    assert found.finished_at >= found.started_at
    await client.StopContainer(stop_request(container, 10))
    await client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    await client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    assert not (await client.ListContainers(pb.ListContainersRequest())).containers
    assert not served.world.rootfs
    code, _ = await code_of(status(client, container))
    assert code == grpc.StatusCode.NOT_FOUND


async def prepared(served: Served, container: str) -> set[str]:
    """Which containers' processes wait for their start, in the pod of this one."""
    await status(served.client, container)  # what follows an answer is done before the next call
    pod = served.world.monitors[served.node.containers.get(container).pod.id].pod
    assert pod is not None
    return pod.prepared


async def test_what_is_made_waits_for_its_start(served: Served) -> None:
    container = await create(served.client, await run_pod(served.client))
    waiting = await prepared(served, container)
    assert waiting == {container}
    await served.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    assert not waiting


async def test_what_is_not_started_does_not_wait_for_ever(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.container.start._PREPARED_S", 0.0)
    container = await create(served.client, await run_pod(served.client))
    waiting = await prepared(served, container)
    await until(lambda: not waiting)
    await served.client.StartContainer(start_request(container))
    assert (await status(served.client, container)).state == pb.CONTAINER_RUNNING


async def test_filters(served: Served) -> None:
    client = served.client
    one, two = await run_pod(client, pod_config("one")), await run_pod(client, pod_config("two"))
    first = await run(client, one, container_config("c", labels={"a": "b"}))
    second = await create(client, two, container_config("c"))

    async def ids(**fields: object) -> set[str]:
        wanted = pb.ContainerFilter(**fields)  # type: ignore[arg-type]
        answer = await client.ListContainers(pb.ListContainersRequest(filter=wanted))
        return {item.id for item in answer.containers}

    assert await ids() == {first, second}
    assert await ids(id=first[:20]) == {first}
    assert await ids(pod_sandbox_id=two[:20]) == {second}
    assert await ids(id=first, pod_sandbox_id=two) == set()
    assert await ids(pod_sandbox_id="ff" * 40) == set()
    assert await ids(label_selector={"a": "b"}) == {first}
    assert await ids(state=pb.ContainerStateValue(state=pb.CONTAINER_CREATED)) == {second}


async def test_unknown_ids(served: Served) -> None:
    client = served.client
    await client.StopContainer(stop_request("nope", 1))
    await client.RemoveContainer(pb.RemoveContainerRequest(container_id="nope"))
    for call in (
        status(client, "nope"),
        client.StartContainer(start_request("nope")),
        client.ExecSync(pb.ExecSyncRequest(container_id="nope", cmd=["true"])),
        create(client, "nope"),
    ):
        code, text = await code_of(call)
        assert code == grpc.StatusCode.NOT_FOUND
        assert "nope" in text


@pytest.mark.parametrize(
    ("config", "code", "word"),
    [
        (pb.ContainerConfig(image=pb.ImageSpec(image="busybox")), grpc.StatusCode.INVALID_ARGUMENT, "metadata"),
        (container_config("c", image="nope"), grpc.StatusCode.NOT_FOUND, "nope"),
        (container_config("c", image=""), grpc.StatusCode.INVALID_ARGUMENT, "image"),
        (container_config("c", working_dir="relative"), grpc.StatusCode.INVALID_ARGUMENT, "relative"),
    ],
)
async def test_bad_requests(served: Served, config: pb.ContainerConfig, code: grpc.StatusCode, word: str) -> None:
    pod = await run_pod(served.client)
    before = set(served.world.cgroups)
    found, text = await code_of(served.client.CreateContainer(create_request(pod, config)))
    assert found == code
    assert word in text
    assert not served.world.rootfs
    assert set(served.world.cgroups) == before
    assert len(served.node.containers) == 0


@pytest.mark.parametrize(
    ("step", "error", "code"),
    [
        ("prepare", Exhausted("disk full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("cgroup_create", InvalidSpec("cpus 7-9 refused"), grpc.StatusCode.INVALID_ARGUMENT),
        ("prepare", OSError(28, "No space left on device"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("prepare", RuntimeError("a bug"), grpc.StatusCode.UNKNOWN),
    ],
)
async def test_a_failed_creation_leaves_nothing(
    served: Served, step: str, error: Exception, code: grpc.StatusCode
) -> None:
    pod = await run_pod(served.client)
    before = set(served.world.cgroups)
    served.world.fail(step, error)
    found, _ = await code_of(served.client.CreateContainer(create_request(pod, container_config())))
    assert found == code
    assert not served.world.rootfs
    assert set(served.world.cgroups) == before
    assert await create(served.client, pod)


async def test_a_creation_whose_clean_up_failed_goes_with_the_pod(served: Served) -> None:
    pod = await run_pod(served.client)
    served.world.fail("cgroup_create", Unavailable("no cgroup"))
    served.world.fail("discard", Unavailable("no disk"))
    _, text = await code_of(served.client.CreateContainer(create_request(pod, container_config())))
    assert "no cgroup" in text
    assert "no disk" in text
    assert not (await served.client.ListContainers(pb.ListContainersRequest())).containers
    assert await create(served.client, pod)
    await served.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert not served.world.remains()


async def test_the_same_request_again(served: Served) -> None:
    client = served.client
    pod = await run_pod(client)
    container = await create(client, pod)
    assert await create(client, pod) == container
    code, text = await code_of(create(client, pod, container_config("c", "other")))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert container in text
    assert "command" in text
    await client.StartContainer(start_request(container))
    code, text = await code_of(create(client, pod))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert await create(client, pod, container_config("c", attempt=1)) != container
    assert await create(client, await run_pod(client, pod_config("other"))) != container


async def test_a_caller_that_timed_out_finds_its_container(served: Served) -> None:
    client = served.client
    pod = await run_pod(client)
    gate = served.world.gates["prepare"] = threading.Event()
    code, _ = await code_of(client.CreateContainer(create_request(pod, container_config()), timeout=0.2))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert not (await client.ListContainers(pb.ListContainersRequest())).containers
    gate.set()
    container = await create(client, pod)
    assert served.world.calls.count("prepare") == 1
    await client.StartContainer(start_request(container))


async def test_ends(served: Served) -> None:
    client = served.client
    pod = await run_pod(client)
    for command, code, reason in (
        (("true",), 0, "Completed"),
        (("false",), 1, "Error"),
        (("exit", "42"), 42, "Error"),
        (("oom",), 137, "OOMKilled"),
    ):
        container = await run(client, pod, container_config(command[0], *command))
        await served.node.containers.get(container).ended.wait()
        found = await status(client, container)
        assert (found.exit_code, found.reason) == (code, reason)
        assert found.finished_at >= found.started_at > 0
        path = served.node.containers.get(container).record.cgroup_path
        await until(functools.partial(_gone, served, path))


async def test_a_start_that_fails(served: Served) -> None:
    client = served.client
    pod = await run_pod(client)
    container = await create(client, pod, container_config("c", "missing"))
    code, text = await code_of(client.StartContainer(start_request(container)))
    assert code == grpc.StatusCode.UNKNOWN
    assert "step 3/3: execve missing: no such file or directory" in text
    found = await status(client, container)
    assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert "no such file" in found.message


@pytest.mark.parametrize("grace_s", [0, 1])
async def test_a_start_that_hangs_can_be_stopped(served: Served, grace_s: int) -> None:
    client = served.client
    pod = await run_pod(client)
    container = await create(client, pod, container_config("c", "stuck"))
    starting = asyncio.ensure_future(client.StartContainer(start_request(container)))
    await until(lambda: served.world.living())
    await client.StopContainer(stop_request(container, grace_s))
    with pytest.raises(grpc.aio.AioRpcError):
        await starting
    assert (await status(client, container)).reason == "StartError"
    await client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert not served.world.remains()


async def test_stopping_sends_one_signal_and_the_shortest_time_wins(served: Served) -> None:
    client = served.client
    pod = await run_pod(client)
    container = await run(client, pod, container_config("c", "stubborn"))
    patient = asyncio.ensure_future(client.StopContainer(stop_request(container, 1000)))
    await until(lambda: process(served, container).signals)
    code, _ = await code_of(client.StopContainer(stop_request(container, 900), timeout=0.2))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await status(client, container)).state == pb.CONTAINER_RUNNING
    await client.StopContainer(stop_request(container, 1))
    await asyncio.wait_for(patient, scaled(5))
    assert process(served, container).signals == [SIGTERM]
    assert (await status(client, container)).exit_code == 137


async def test_timeout_zero_kills_at_once(served: Served) -> None:
    pod = await run_pod(served.client)
    container = await run(served.client, pod, container_config("c", "stubborn"))
    await served.client.StopContainer(stop_request(container, 0))
    assert process(served, container).signals == []
    assert (await status(served.client, container)).exit_code == 137


async def test_stopping_without_a_monitor_that_answers(served: Served) -> None:
    pod = await run_pod(served.client)
    container = await run(served.client, pod)
    served.world.monitors[pod].hangs = True
    await served.client.StopContainer(stop_request(container, 1))
    found = await status(served.client, container)
    assert (found.state, found.exit_code) == (pb.CONTAINER_EXITED, 137)
    assert "monitor" in found.message


async def test_what_outlives_sigkill_is_named(served: Served) -> None:
    pod = await run_pod(served.client)
    container = await run(served.client, pod, container_config("c", "undead"))
    code, text = await code_of(served.client.StopContainer(stop_request(container, 0)))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert str(process(served, container).pid) in text
    assert (await status(served.client, container)).state == pb.CONTAINER_RUNNING
    served.world.end(process(served, container), 137)
    await served.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))


async def test_removing_kills(served: Served) -> None:
    pod = await run_pod(served.client)
    container = await run(served.client, pod, container_config("c", "stubborn"))
    request = pb.RemoveContainerRequest(container_id=container)
    await asyncio.gather(*(served.client.RemoveContainer(request) for _ in range(3)))
    assert not served.world.rootfs
    assert served.world.calls.count("discard") == 1


async def test_exec(served: Served) -> None:
    client = served.client
    container = await run(client, await run_pod(client))

    def call(*command: str, timeout: int = 0) -> grpc.aio.UnaryUnaryCall[pb.ExecSyncRequest, pb.ExecSyncResponse]:
        found: grpc.aio.UnaryUnaryCall[pb.ExecSyncRequest, pb.ExecSyncResponse] = client.ExecSync(
            pb.ExecSyncRequest(container_id=container, cmd=command, timeout=timeout)
        )
        return found

    answer = await call("echo", "hello")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"hello", b"", 0)
    answer = await call("both")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out", b"err", 3)
    code, _ = await code_of(call("sleep", timeout=1))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    answer = await call("daemon")
    assert answer.stdout == b"started"
    answer = await call("flood", str(20 << 20))
    assert 15 << 20 < len(answer.stdout) < 16 << 20
    code, text = await code_of(call("missing"))
    assert code == grpc.StatusCode.UNKNOWN
    assert "missing" in text
    code, _ = await code_of(call())
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    code, _ = await code_of(call("echo", "x" * (1 << 20)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    await client.StopContainer(stop_request(container, 1))
    code, _ = await code_of(call("true"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION


async def test_verbose_says_no_secrets(served: Served) -> None:
    pod = await run_pod(served.client)
    config = container_config("c", envs=[pb.KeyValue(key="PASSWORD", value=b"hunter2")])
    container = await run(served.client, pod, config)
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    info = json.loads((await served.client.ContainerStatus(request)).info["info"])
    assert info["pid"] == process(served, container).pid
    assert any(entry.startswith("PASSWORD=") for entry in info["runtimeSpec"]["process"]["env"])
    assert "hunter2" not in json.dumps(info)
    assert "aHVudGVyMg" not in json.dumps(info)


async def test_a_created_container_survives_cribd(cribd: Start) -> None:
    async with cribd() as served:
        container = await create(served.client, await run_pod(served.client))
    async with cribd() as served:
        assert (await status(served.client, container)).state == pb.CONTAINER_CREATED
        await served.client.StartContainer(start_request(container))
        assert (await status(served.client, container)).state == pb.CONTAINER_RUNNING


async def test_a_stop_goes_on_after_a_restart(cribd: Start) -> None:
    async with cribd() as served:
        pod = await run_pod(served.client)
        container = await run(served.client, pod, container_config("c", "stubborn"))
        code, _ = await code_of(served.client.StopContainer(stop_request(container, 1000), timeout=0.2))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    async with cribd() as served:
        await served.client.StopContainer(stop_request(container, 1))
        assert process(served, container).signals == [SIGTERM]
        assert (await status(served.client, container)).exit_code == 137

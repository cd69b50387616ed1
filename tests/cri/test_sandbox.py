"""Pods over the socket, on fake rooms."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from runtime.errors import Unavailable
from tests.cri.client import container_config, pod_config, run, run_pod, status, until
from tests.cri.conftest import Served, Start

pytestmark = pytest.mark.asyncio


async def code_of(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


def run_request(config: pb.PodSandboxConfig, handler: str = "") -> pb.RunPodSandboxRequest:
    return pb.RunPodSandboxRequest(config=config, runtime_handler=handler)


async def test_a_pod_comes_and_goes(served: Served) -> None:
    client = served.client
    pod = await run_pod(client, pod_config(labels={"a": "b"}, annotations={"c": "d"}))
    assert len(pod) == 64
    answer = await client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    assert answer.status.id == pod
    assert answer.status.metadata.uid == "uid-pod"
    assert answer.status.state == pb.SANDBOX_READY
    assert answer.status.created_at > 1e18
    assert answer.status.network.ip == "10.88.0.2"
    assert dict(answer.status.labels) == {"a": "b"}
    assert "runtimeSpec" in answer.info["info"]
    directory = served.node.directory(pod)
    assert (directory / "hostname").read_text() == "pod\n"
    assert "10.88.0.2\tpod\n" in (directory / "hosts").read_text()

    await client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    answer = await client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod[:10]))
    assert answer.status.state == pb.SANDBOX_NOTREADY
    assert answer.status.network.ip == ""
    assert not served.world.remains()
    await client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert not directory.exists()
    assert not (await client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    assert served.node.store.load() == ([], [])


async def test_unknown_ids(served: Served) -> None:
    client = served.client
    await client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id="nope"))
    await client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id="nope"))
    request = pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(id="nope"))
    assert not (await client.ListPodSandbox(request)).items
    code, text = await code_of(client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id="nope")))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "nope" in text
    code, _ = await code_of(client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id="")))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_ambiguous_prefix(served: Served) -> None:
    first = {(await run_pod(served.client, pod_config(f"pod{n}")))[0] for n in range(17)}
    code, text = set(), ""
    for letter in sorted(first):
        try:
            await served.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=letter))
        except grpc.aio.AioRpcError as error:
            code.add(error.code())
            text = error.details() or ""
    assert code == {grpc.StatusCode.INVALID_ARGUMENT}
    assert "ambiguous" in text


async def test_filters(served: Served) -> None:
    client = served.client
    one = await run_pod(client, pod_config("one", labels={"app": "a", "tier": "x"}))
    two = await run_pod(client, pod_config("two", labels={"app": "a"}))
    await client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=two))

    async def ids(**fields: object) -> set[str]:
        wanted = pb.PodSandboxFilter(**fields)  # type: ignore[arg-type]
        return {item.id for item in (await client.ListPodSandbox(pb.ListPodSandboxRequest(filter=wanted))).items}

    assert await ids() == {one, two}
    assert await ids(id=one[:12]) == {one}
    assert await ids(label_selector={"app": "a"}) == {one, two}
    assert await ids(label_selector={"app": "a", "tier": "x"}) == {one}
    assert await ids(state=pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)) == {two}
    assert await ids(id=one, state=pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)) == set()


@pytest.mark.parametrize(
    ("config", "handler", "word"),
    [
        (pb.PodSandboxConfig(), "", "metadata"),
        (pod_config(), "kata", "runtime_handler"),
        (pod_config(linux=pb.LinuxPodSandboxConfig(sysctls={"kernel.core_pattern": "|/x"})), "", "kernel.core_pattern"),
    ],
)
async def test_bad_requests(served: Served, config: pb.PodSandboxConfig, handler: str, word: str) -> None:
    code, text = await code_of(served.client.RunPodSandbox(run_request(config, handler)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert word in text
    assert not served.world.remains()
    assert served.node.store.load() == ([], [])


async def test_the_same_request_again(served: Served) -> None:
    client = served.client
    pod = await run_pod(client)
    assert await run_pod(client) == pod
    code, text = await code_of(client.RunPodSandbox(run_request(pod_config(labels={"x": "y"}))))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert pod in text
    assert "labels" in text
    await client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    code, text = await code_of(client.RunPodSandbox(run_request(pod_config())))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert "not ready" in text
    assert await run_pod(client, pod_config(attempt=1)) != pod
    await client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert await run_pod(client) != pod


async def test_a_caller_that_timed_out_finds_its_pod(served: Served) -> None:
    client = served.client
    gate = served.world.gates["attach"] = threading.Event()
    code, _ = await code_of(client.RunPodSandbox(run_request(pod_config()), timeout=0.2))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert not (await client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    again = asyncio.ensure_future(client.RunPodSandbox(run_request(pod_config())))
    await asyncio.sleep(0)
    gate.set()
    pod = (await again).pod_sandbox_id
    assert [item.id for item in (await client.ListPodSandbox(pb.ListPodSandboxRequest())).items] == [pod]
    assert served.world.calls.count("start_pod") == 1


@pytest.mark.parametrize("step", ["start_pod", "pin", "attach", "cgroup_create"])
async def test_a_failed_start_leaves_nothing(served: Served, step: str) -> None:
    served.world.fail(step, Unavailable(f"{step} refused"))
    code, text = await code_of(served.client.RunPodSandbox(run_request(pod_config())))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert step in text
    assert not served.world.remains()
    assert served.node.store.load() == ([], [])
    assert await run_pod(served.client)


async def test_a_failed_clean_up_keeps_the_pod_for_another_try(served: Served) -> None:
    served.world.fail("attach", Unavailable("no address"))
    served.world.fail("detach", Unavailable("no plug-in"))
    code, text = await code_of(served.client.RunPodSandbox(run_request(pod_config())))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "no address" in text
    assert "no plug-in" in text
    items = (await served.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    assert [item.state for item in items] == [pb.SANDBOX_NOTREADY]
    await served.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=items[0].id))
    assert not served.world.remains()


async def test_stop_takes_the_containers_along_and_fails_until_all_is_given_back(served: Served) -> None:
    client = served.client
    pod = await run_pod(client)
    containers = [await run(client, pod, container_config(f"c{n}", "stubborn")) for n in range(3)]
    served.world.fail("detach", Unavailable("no plug-in"))
    code, text = await code_of(client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod)))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "no plug-in" in text
    assert not served.world.monitors
    assert served.world.addresses
    for container in containers:
        assert (await status(client, container)).state == pb.CONTAINER_EXITED
    await client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    assert not served.world.addresses
    request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=container_config("late"))
    code, _ = await code_of(client.CreateContainer(request))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    await client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert not (await client.ListContainers(pb.ListContainersRequest())).containers
    assert not served.world.remains()


async def test_host_modes_need_no_network(served: Served) -> None:
    options = pb.NamespaceOption(network=pb.NODE, pid=pb.NODE, ipc=pb.NODE)
    linux = pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=options))
    pod = await run_pod(served.client, pod_config(linux=linux))
    assert "attach" not in served.world.calls
    answer = await served.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert answer.status.network.ip == ""
    assert answer.status.linux.namespaces.options.network == pb.NODE
    await served.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert "detach" not in served.world.calls
    assert not served.world.remains()


async def test_a_shared_pid_namespace_has_an_init_with_a_cgroup(served: Served) -> None:
    pod = await run_pod(served.client)
    assert f"/{served.node.config.instance}/{pod}/init" in served.world.cgroups


async def test_pods_under_a_parent_that_had_to_be_made(served: Served) -> None:
    def config(name: str) -> pb.PodSandboxConfig:
        return pod_config(name, linux=pb.LinuxPodSandboxConfig(cgroup_parent="/made/here"))

    one, two = await run_pod(served.client, config("one")), await run_pod(served.client, config("two"))
    await served.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=one))
    assert "/made/here" in served.world.cgroups
    await served.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=two))
    assert not served.world.remains()


async def test_a_lost_monitor_is_noticed(served: Served) -> None:
    pod = await run_pod(served.client)
    container = await run(served.client, pod)
    served.world.lose_monitor(pod)
    found = await status(served.client, container)
    assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 255, "Unknown")
    answer = await served.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert answer.status.state == pb.SANDBOX_NOTREADY
    await served.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert not served.world.remains()


async def test_pods_survive_cribd(cribd: Start) -> None:
    async with cribd() as served:
        pod = await run_pod(served.client)
        running = await run(served.client, pod, container_config("running"))
        ending = await run(served.client, pod, container_config("ending"))
    served.world.end(next(one for one in served.world.processes() if one.id == ending), 7)
    async with cribd() as served:
        assert (await status(served.client, running)).state == pb.CONTAINER_RUNNING
        found = await status(served.client, ending)
        assert (found.state, found.exit_code, found.reason) == (pb.CONTAINER_EXITED, 7, "Error")
        assert await run_pod(served.client) == pod
        await served.client.StopContainer(pb.StopContainerRequest(container_id=running, timeout=5))
        assert (await status(served.client, running)).exit_code == 143
        await served.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
        assert not served.world.remains()


async def test_a_monitor_lost_while_cribd_was_down(cribd: Start) -> None:
    async with cribd() as served:
        pod = await run_pod(served.client)
        container = await run(served.client, pod)
    served.world.monitors.clear()
    async with cribd() as served:
        assert (await status(served.client, container)).reason == "Unknown"
        answer = await served.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
        assert answer.status.state == pb.SANDBOX_NOTREADY
        await served.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
        assert not served.world.remains()


async def test_after_a_reboot_no_pod_is_ready(cribd: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cribd() as served:
        pod = await run_pod(served.client)
        container = await run(served.client, pod)
        served.node.save(served.node.pods.get(pod), boot_id="another")
    served.world.monitors.clear()
    async with cribd() as served:
        assert (await status(served.client, container)).state == pb.CONTAINER_EXITED
        items = (await served.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
        assert [item.state for item in items] == [pb.SANDBOX_NOTREADY]
        assert not served.world.addresses


async def test_an_interrupted_run_is_taken_down(cribd: Start) -> None:
    async with cribd() as served:
        served.world.gates["attach"] = threading.Event()
        call = asyncio.ensure_future(served.client.RunPodSandbox(run_request(pod_config())))
        await until(lambda: "attach" in served.world.calls)
        call.cancel()
        for task in list(served.node.flights._tasks.values()):
            task.cancel()
        served.world.gates["attach"].set()
        await until(lambda: not served.node.flights._tasks)
        assert served.world.monitors
    async with cribd() as served:
        assert not (await served.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
        assert not served.world.remains()
        assert await run_pod(served.client)


async def test_a_node_s_resolver_file(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is there in its place, a pod doesn't wait for it."""
    resolver = tmp_path / "resolv.conf"
    monkeypatch.setattr("cri.sandbox.files._RESOLVER", str(resolver))
    pod = await run_pod(served.client, pod_config("none"))
    assert "has no" in (served.node.directory(pod) / "resolv.conf").read_text()
    for make, undo in ((os.mkfifo, os.unlink), (os.mkdir, os.rmdir)):
        make(resolver)
        code, text = await code_of(served.client.RunPodSandbox(run_request(pod_config("odd"))))
        assert (code, text) == (grpc.StatusCode.FAILED_PRECONDITION, f"{resolver} is not a regular file")
        undo(resolver)
    resolver.write_bytes(b"x" * (2 << 20))
    code, text = await code_of(served.client.RunPodSandbox(run_request(pod_config("odd"))))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and str(resolver) in text

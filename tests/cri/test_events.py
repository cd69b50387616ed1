"""GetContainerEvents and the streaming lists, on fake rooms."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from cri.api import cri_pb2 as pb
from cri.events import BACKLOG
from tests.cri.client import container_config, create, pod_config, run, run_pod, status
from tests.cri.conftest import Served
from tests.limits import scaled

pytestmark = pytest.mark.asyncio
CREATED, STARTED = pb.CONTAINER_CREATED_EVENT, pb.CONTAINER_STARTED_EVENT
STOPPED, DELETED = pb.CONTAINER_STOPPED_EVENT, pb.CONTAINER_DELETED_EVENT


async def subscribed(served: Served) -> Any:
    call = served.client.GetContainerEvents(pb.GetEventsRequest())
    await call.initial_metadata()
    return call


async def read(call: Any, count: int) -> list[pb.ContainerEventResponse]:
    async with asyncio.timeout(scaled(20)):
        return [await call.read() for _ in range(count)]


async def life(served: Served) -> tuple[str, str]:
    client = served.client
    pod = await run_pod(client)
    container = await run(client, pod)
    await client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=1))
    await client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    await client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    await client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    return pod, container


async def test_a_listener_that_goes_is_no_trouble(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[logging.LogRecord] = []
    with caplog.at_level(logging.DEBUG, "cri.rpc"):
        (await subscribed(served)).cancel()
        async with asyncio.timeout(scaled(20)):
            while not ended:
                await served.client.Version(pb.VersionRequest())
                ended = [record for record in caplog.records if vars(record)["fields"]["code"] == "CANCELLED"]
    assert [record.levelname for record in ended] == ["DEBUG"]


async def test_a_life_in_order_told_to_all(served: Served) -> None:
    calls = [await subscribed(served) for _ in range(3)]
    pod, container = await life(served)
    for call in calls:
        events = await read(call, 8)
        assert [(event.container_id, event.container_event_type) for event in events] == [
            (pod, CREATED), (pod, STARTED),
            (container, CREATED), (container, STARTED), (container, STOPPED), (container, DELETED),
            (pod, STOPPED), (pod, DELETED),
        ]  # fmt: skip
        assert all(event.pod_sandbox_status.id == pod for event in events)
        assert [event.created_at for event in events] == sorted(event.created_at for event in events)
        states = [[one.state for one in event.containers_statuses] for event in events]
        assert states == [[], [], [pb.CONTAINER_CREATED], [pb.CONTAINER_RUNNING], [pb.CONTAINER_EXITED], [], [], []]
        ready = [event.pod_sandbox_status.state == pb.SANDBOX_READY for event in events]
        assert ready == [True] * 6 + [False] * 2
        assert not call.done()
        call.cancel()


async def test_a_container_that_ends_by_itself(served: Served) -> None:
    container = await create(served.client, await run_pod(served.client), container_config("c", "exit", "3"))
    call = await subscribed(served)
    await served.client.StartContainer(pb.StartContainerRequest(container_id=container))
    started, event = await read(call, 2)
    assert started.container_event_type == STARTED
    assert (event.container_id, event.container_event_type) == (container, STOPPED)
    assert event.containers_statuses[0].exit_code == 3
    call.cancel()


async def test_what_fails_is_not_told(served: Served) -> None:
    call = await subscribed(served)
    served.world.fail("start_pod", RuntimeError("no"))
    with pytest.raises(grpc.aio.AioRpcError):
        await run_pod(served.client)
    pod = await run_pod(served.client)
    assert {event.container_id for event in await read(call, 2)} == {pod}
    call.cancel()


async def test_who_does_not_read_is_told_to_list_again(served: Served) -> None:
    call = await subscribed(served)
    pod = await run_pod(served.client)
    one = served.node.pods.get(pod)
    for number in range(3 * BACKLOG):  # in one turn of the loop: no reader could keep up
        served.node.events.removed(str(number), one, number)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call, 3 * BACKLOG)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "list again" in (caught.value.details() or "")


async def test_the_end_of_cribd_ends_the_streams(served: Served) -> None:
    call = await subscribed(served)
    served.node.events.close()
    assert await read(call, 1) == [grpc.aio.EOF]


async def test_streamed_lists_are_the_lists(served: Served) -> None:
    client = served.client
    pods = [await run_pod(client, pod_config(f"p{number}")) for number in range(3)]
    for pod in pods:
        await create(client, pod, container_config("c"))
    listed = (await client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    request = pb.StreamPodSandboxesRequest()
    assert [one async for part in client.StreamPodSandboxes(request) for one in part.pod_sandboxes] == list(listed)
    wanted = pb.ContainerFilter(pod_sandbox_id=pods[1])
    parts = client.StreamContainers(pb.StreamContainersRequest(filter=wanted))
    (found,) = [one async for part in parts for one in part.containers]
    assert found.pod_sandbox_id == pods[1]
    assert (await status(client, found.id)).state == pb.CONTAINER_CREATED
    none = client.StreamContainers(pb.StreamContainersRequest(filter=pb.ContainerFilter(id="none")))
    assert [part async for part in none] == []

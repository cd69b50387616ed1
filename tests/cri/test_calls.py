"""The wrapper around every call, the calls about the runtime and about images, and crib's own service."""

from __future__ import annotations

import asyncio
import json
import logging

import grpc
import pytest

from cri.api import cri_pb2 as pb
from cri.api import crib_pb2
from net import NetworkStatus
from tests.cri.client import create, run, run_pod
from tests.cri.conftest import Served
from tests.cri.fakes import image
from tests.cri.test_sandbox import code_of

pytestmark = pytest.mark.asyncio


async def test_what_nobody_implements(served: Served) -> None:
    code, text = await code_of(served.client.CheckpointContainer(pb.CheckpointContainerRequest()))
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert "CheckpointContainer" in text


async def test_bytes_that_are_no_request(served: Served) -> None:
    bad_text = pb.StopPodSandboxRequest(pod_sandbox_id="xx").SerializeToString().replace(b"xx", b"\xff\xfe")
    for body in (bad_text, b"\xff\xff\xff"):
        code, text = await code_of(served.client.StopPodSandbox(body))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "StopPodSandbox request" in text


async def test_a_request_beyond_the_limit(served: Served) -> None:
    request = pb.StopPodSandboxRequest(pod_sandbox_id="x" * (17 << 20))
    code, _ = await code_of(served.client.StopPodSandbox(request))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    code, text = await code_of(served.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id="x" * 1000)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "1000 characters" in text


async def test_a_bug_is_unknown_and_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.world.fail("start_pod", ZeroDivisionError("a bug"))
    request = pb.RunPodSandboxRequest(
        config=pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="p", uid="u", namespace="n"))
    )
    code, text = await code_of(served.client.RunPodSandbox(request))
    assert code == grpc.StatusCode.UNKNOWN
    assert "a bug" in text
    assert any(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)


async def test_one_line_per_change(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    pod = await run_pod(served.client)
    await served.client.ListPodSandbox(pb.ListPodSandboxRequest())
    lines = [record for record in caplog.records if record.getMessage() == "call"]
    assert [(one.levelno, one.fields["code"]) for one in lines] == [(logging.INFO, "OK"), (logging.DEBUG, "OK")]  # type: ignore[attr-defined]
    assert pod


async def test_version(served: Served) -> None:
    answer = await served.client.Version(pb.VersionRequest())
    assert (answer.version, answer.runtime_name, answer.runtime_api_version) == ("0.1.0", "crib", "v1")
    assert answer.runtime_version


async def test_status(served: Served) -> None:
    answer = await served.client.Status(pb.StatusRequest())
    assert {one.type: one.status for one in answer.status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    assert [one.name for one in answer.runtime_handlers] == [""]
    assert answer.features.supplemental_groups_policy
    assert not answer.info
    served.network.ready = NetworkStatus(ready=False, reason="NetworkPluginNotReady", message="no bridge")
    answer = await served.client.Status(pb.StatusRequest(verbose=True))
    found = {one.type: one for one in answer.status.conditions}["NetworkReady"]
    assert (found.status, found.reason, found.message) == (False, "NetworkPluginNotReady", "no bridge")
    assert json.loads(answer.info["config"])["root"].endswith("/root")


async def test_runtime_config(served: Served) -> None:
    answer = await served.client.RuntimeConfig(pb.RuntimeConfigRequest())
    assert answer.linux.cgroup_driver == pb.CGROUPFS
    await served.client.UpdateRuntimeConfig(pb.UpdateRuntimeConfigRequest())
    network = pb.NetworkConfig(pod_cidr="10.1.0.0/16")
    await served.client.UpdateRuntimeConfig(
        pb.UpdateRuntimeConfigRequest(runtime_config=pb.RuntimeConfig(network_config=network))
    )


async def test_images(served: Served) -> None:
    client = served.client
    spec = pb.ImageSpec(image="nginx")
    assert not (await client.ImageStatus(pb.ImageStatusRequest(image=spec))).HasField("image")
    code, _ = await code_of(client.PullImage(pb.PullImageRequest(image=spec)))
    assert code == grpc.StatusCode.NOT_FOUND
    served.images.remote["nginx"] = image("nginx", user="101:0")
    ref = (await client.PullImage(pb.PullImageRequest(image=spec))).image_ref
    found = await client.ImageStatus(pb.ImageStatusRequest(image=spec, verbose=True))
    assert found.image.id == ref
    assert found.image.uid.value == 101
    assert "imageSpec" in json.loads(found.info["info"])
    assert len((await client.ListImages(pb.ListImagesRequest())).images) == 2
    only = pb.ListImagesRequest(filter=pb.ImageFilter(image=spec))
    assert [one.id for one in (await client.ListImages(only)).images] == [ref]
    for _ in range(2):
        await client.RemoveImage(pb.RemoveImageRequest(image=spec))
    assert not (await client.ListImages(only)).images
    code, _ = await code_of(client.PullImage(pb.PullImageRequest()))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    usage = (await client.ImageFsInfo(pb.ImageFsInfoRequest())).image_filesystems[0]
    assert (usage.fs_id.mountpoint, usage.used_bytes.value, usage.inodes_used.value) == ("/var/lib/fake", 4096, 7)
    assert usage.timestamp > 1e18


async def test_a_pull_goes_with_its_caller(served: Served) -> None:
    request = pb.PullImageRequest(image=pb.ImageSpec(image="endless"))
    code, _ = await code_of(served.client.PullImage(request, timeout=0.2))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await asyncio.to_thread(served.images.cancelled.wait, 5)


async def test_a_slow_pull_is_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that waits for its first byte."""
    monkeypatch.setattr("cri.image.pull._SLOW_S", 0.02)
    with caplog.at_level(logging.INFO, "cri.image.pull"):
        request = pb.PullImageRequest(image=pb.ImageSpec(image="endless"))
        code, _ = await code_of(served.client.PullImage(request, timeout=0.5))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    lines = [record for record in caplog.records if record.name == "cri.image.pull"]
    assert lines[0].message == "pulling"
    assert vars(lines[0])["fields"]["image"] == "endless"
    assert vars(lines[0])["fields"]["layers"] == "0/0"


async def test_crib_pull(served: Served) -> None:
    served.images.remote["nginx"] = image("nginx")
    news = [one async for one in served.client.Pull(crib_pb2.PullRequest(image="nginx"))]
    assert [one.state for one in news[:-1]] == [crib_pb2.LAYER_DOWNLOADING, crib_pb2.LAYER_DONE]
    assert news[-1].image_ref.startswith("sha256:")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.client.Pull(crib_pb2.PullRequest(image="nope")):
            pass
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_crib_load(served: Served) -> None:
    answer = await served.client.Load(iter([crib_pb2.LoadRequest(chunk=b"my"), crib_pb2.LoadRequest(chunk=b"image")]))
    assert list(answer.images[0].repo_tags) == ["myimage:latest"]
    code, _ = await code_of(served.client.Load(iter([])))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_crib_plan(served: Served) -> None:
    pod = await run_pod(served.client)
    container = await run(served.client, pod)
    plan = await served.client.Plan(crib_pb2.PlanRequest(id=pod[:20]))
    assert plan.kind == "pod"
    assert {"monitor", "network", "files"} <= {step.phase for step in plan.steps}
    plan = await served.client.Plan(crib_pb2.PlanRequest(id=container))
    assert (plan.kind, plan.steps[-1].text) == ("container", "execve")
    from tests.cri.client import container_config

    late = await create(served.client, pod, container_config("late"))
    for id in (late, "nope"):
        code, _ = await code_of(served.client.Plan(crib_pb2.PlanRequest(id=id)))
        assert code == grpc.StatusCode.NOT_FOUND


async def test_crib_doctor(served: Served) -> None:
    probes = {one.name: one for one in (await served.client.Doctor(crib_pb2.DoctorRequest())).probes}
    assert probes["network"].ok
    assert "version 1" in probes["cgroup"].detail


async def test_errors_of_the_network_room_have_codes(served: Served) -> None:
    from net.errors import Exhausted as NoAddress
    from tests.cri.client import pod_config

    served.world.fail("attach", NoAddress("no address is left in 10.88.0.0/16"))
    code, text = await code_of(served.client.RunPodSandbox(pb.RunPodSandboxRequest(config=pod_config())))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "10.88.0.0/16" in text

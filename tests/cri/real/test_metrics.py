"""Metrics of a real container are what it does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN, Daemon
from tests.cri.test_metrics import figures
from tests.requires import requires
from tests.runtime.images.given import free_port

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]


async def listed(real: Real) -> tuple[dict[str, int], dict[str, int]]:
    """The values of a single pod's own metrics, and of its container's, by name."""
    (pod,) = (await real.client.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest())).pod_metrics
    own = {metric.name.removeprefix("container_"): metric.value.value for metric in pod.metrics}
    containers = {
        metric.name.removeprefix("container_"): metric.value.value
        for container in pod.container_metrics
        for metric in container.metrics
    }
    return own, containers


async def test_figures(real: Real) -> None:
    pod = await real.pod()
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20, cpu_quota=50000, cpu_period=100000)
    script = "exec 7</etc/hosts; head -c 3145728 /dev/zero > /written; sleep 1000 & touch /done; wait"
    container = await real.run(pod, "sh", "-c", script, linux=pb.LinuxContainerConfig(resources=limits))
    while (await real.sh(container, "test -e /done")).exit_code:
        pass
    _, found = await listed(real)
    assert found["processes"] == 2
    assert found["threads"] == 2
    assert found["file_descriptors"] >= 2 * 3 + 1
    assert found["fs_usage_bytes"] >= 3 << 20
    assert found["fs_limit_bytes"] > found["fs_usage_bytes"]
    assert found["spec_memory_limit_bytes"] == 64 << 20
    assert found["threads_max"] == 0
    assert (found["spec_cpu_quota"], found["spec_cpu_period"]) == (50000, 100000)
    assert 0 < found["memory_working_set_bytes"] <= found["memory_usage_bytes"] <= found["memory_max_usage_bytes"]
    assert found["ulimits_soft"] == 1024
    status = await real.status(container)
    assert found["start_time_seconds"] == status.started_at // 1_000_000_000 <= found["last_seen"]
    before = (await listed(real))[0]["network_transmit_packets_total"]
    await real.sh(container, "ping -c 2 -W 1 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')")
    assert (await listed(real))[0]["network_transmit_packets_total"] > before


async def test_one_that_has_ended_has_none(real: Real) -> None:
    pod = await real.pod()
    await real.ended(await real.run(pod, "true"))
    (found,) = (await real.client.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest())).pod_metrics
    assert not found.container_metrics


async def test_a_metric_has_the_labels_that_were_described(real: Real) -> None:
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000")
    answer = await real.client.ListMetricDescriptors(pb.ListMetricDescriptorsRequest())
    keys = {one.name: list(one.label_keys) for one in answer.descriptors}
    (found,) = (await real.client.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest())).pod_metrics
    assert found.pod_sandbox_id == pod
    (own,) = found.container_metrics
    assert own.container_id == container
    assert own.metrics and found.metrics
    for metric in (*found.metrics, *own.metrics):
        assert len(metric.label_values) == len(keys[metric.name])
        labels = dict(zip(keys[metric.name], metric.label_values, strict=True))
        assert (labels["namespace"], labels["pod"]) == ("tests", "pod")
        assert (labels["container"], labels["name"]) in (("POD", pod), ("c", container))
        assert metric.timestamp > 0
    assert "container_start_time_seconds" in {metric.name for metric in own.metrics}
    stream = real.client.StreamPodSandboxMetrics(pb.StreamPodSandboxMetricsRequest())
    assert [one.pod_sandbox_id async for part in stream for one in part.pod_sandbox_metrics] == [pod]


async def test_cribds_own_figures(run_dir: Path) -> None:
    port = free_port()
    daemon = Daemon(run_dir, f"{BUILTIN}[metrics]\nport = {port}\n")
    daemon.start()
    client = daemon.client()
    try:
        await client.Version(pb.VersionRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await client.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image="127.0.0.1:1/x")))
        found = await asyncio.to_thread(figures, port)
        assert found['crib_call_seconds_count{code="OK",method="Version"}'] == 1
        assert found['crib_pull_seconds_count{outcome="failed"}'] == 1
        assert found["crib_pulls_running"] == 0
    finally:
        await client.close()
        assert daemon.stop() == 0, daemon.log()

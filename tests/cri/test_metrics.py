"""The table of containers' metrics, and cribd's own figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from urllib.request import urlopen

from cri.metrics import Metrics
from cri.stats import metrics
from runtime.images import Progress
from tests.runtime.images.given import free_port

# What critest wants described: cAdvisor's names, without "container_".
WANTED = (
    "blkio_device_usage_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total cpu_cfs_throttled_seconds_total "
    "cpu_system_seconds_total cpu_usage_seconds_total cpu_user_seconds_total file_descriptors fs_inodes_free "
    "fs_inodes_total fs_limit_bytes fs_reads_bytes_total fs_reads_total fs_usage_bytes fs_writes_bytes_total "
    "fs_writes_total hugetlb_max_usage_bytes hugetlb_usage_bytes last_seen memory_cache memory_failcnt "
    "memory_failures_total memory_kernel_usage memory_mapped_file memory_max_usage_bytes memory_rss memory_swap "
    "memory_usage_bytes memory_working_set_bytes network_receive_bytes_total network_receive_errors_total "
    "network_receive_packets_dropped_total network_receive_packets_total network_transmit_bytes_total "
    "network_transmit_errors_total network_transmit_packets_dropped_total network_transmit_packets_total "
    "oom_events_total pressure_cpu_stalled_seconds_total pressure_cpu_waiting_seconds_total "
    "pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total pressure_memory_stalled_seconds_total "
    "pressure_memory_waiting_seconds_total processes sockets spec_cpu_period spec_cpu_quota spec_cpu_shares "
    "spec_memory_limit_bytes spec_memory_reservation_limit_bytes spec_memory_swap_limit_bytes start_time_seconds "
    "threads threads_max ulimits_soft"
).split()


def test_every_name_is_described_once() -> None:
    names = [one.name for one in metrics.descriptors()]
    assert sorted(names) == sorted(f"container_{name}" for name in WANTED)
    assert all(one.help and tuple(one.label_keys[: len(metrics.BASE)]) == metrics.BASE for one in metrics.descriptors())


def figures(port: int) -> dict[str, float]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_pulls_and_calls_are_counted() -> None:
    node = SimpleNamespace(pods=[SimpleNamespace(ready=True)], containers=[])
    made = Metrics(cast(Any, node))
    port = free_port()
    made.serve("127.0.0.1", port)
    try:
        pull = made.pull()
        pull.news(Progress("a", "exists", 100, 100))
        pull.news(Progress("b", "downloading", 30, 100))
        found = figures(port)
        assert (found["crib_pull_bytes_total"], found["crib_pulls_running"]) == (30, 1)
        assert found["crib_pulls_missing_bytes"] == 70
        pull.news(Progress("b", "downloading", 10, 100))  # begun again: what was received was received
        pull.news(Progress("b", "done", 100, 100))
        pull.news(Progress("c", "waiting", 0, 50))
        pull.end("failed")
        made.call("Version", "OK", 0.001)
        found = figures(port)
        assert (found["crib_pull_bytes_total"], found["crib_pulls_running"]) == (100, 0)
        assert found["crib_pulls_missing_bytes"] == 0
        assert found['crib_pull_seconds_count{outcome="failed"}'] == 1
        assert found['crib_call_seconds_count{code="OK",method="Version"}'] == 1
        assert (found['crib_pods{ready="true"}'], found['crib_containers{running="true"}']) == (1, 0)
    finally:
        made.close()

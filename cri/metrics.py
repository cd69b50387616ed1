"""What cribd does, for Prometheus: calls, pulls, pods and containers. Served only where the configuration names a port.

prometheus_client is loaded only then: it costs the daemon memory.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cri.node import Node
    from runtime.images import Progress


class Metrics:
    """The figures, and the server that gives them to whoever is on this machine: it has a loopback address."""

    def __init__(self, node: Node) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = registry = CollectorRegistry()
        self._calls = Histogram("crib_call_seconds", "time that calls take", ["method", "code"], registry=registry)
        self.pulls = Histogram(
            "crib_pull_seconds",
            "time that pulls take",
            ["outcome"],
            registry=registry,
            buckets=(1, 5, 15, 60, 300, 1800),
        )
        self.received = Counter("crib_pull_bytes", "compressed bytes of layers received", registry=registry)
        self.running = Gauge("crib_pulls_running", "pulls under way", registry=registry)
        self.missing = Gauge("crib_pulls_missing_bytes", "bytes that the pulls under way wait for", registry=registry)
        pods = Gauge("crib_pods", "pods, by whether they are ready", ["ready"], registry=registry)
        pods.labels("true").set_function(lambda: sum(pod.ready for pod in node.pods))
        pods.labels("false").set_function(lambda: sum(not pod.ready for pod in node.pods))
        containers = Gauge("crib_containers", "containers, by whether they run", ["running"], registry=registry)
        containers.labels("true").set_function(lambda: sum(one.alive for one in node.containers))
        containers.labels("false").set_function(lambda: sum(not one.alive for one in node.containers))
        self._server: Any = None

    def serve(self, address: str, port: int) -> None:
        """Answer on http://address:port/metrics, by a thread. Raises OSError."""
        from prometheus_client import start_http_server

        self._server, _ = start_http_server(port, address, self._registry)

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def call(self, method: str, code: str, seconds: float) -> None:
        """Count a call that is over (`cri.rpc.MetricHook`)."""
        self._calls.labels(method, code).observe(seconds)

    def pull(self) -> Pull:
        """A pull begins."""
        self.running.inc()
        return Pull(self)


class Pull:
    """One pull's share of the figures. `news` is for the threads that fetch its layers."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._had: dict[str, int] = {}
        self._missing: dict[str, int] = {}
        self._began_s = time.monotonic()

    def news(self, layer: Progress) -> None:
        """How far a layer is. One that was there already is not received."""
        if layer.state == "exists":
            return
        with self._lock:
            received = max(layer.current_bytes - self._had.get(layer.digest, 0), 0)
            missing = max(layer.total_bytes - layer.current_bytes, 0)
            self._metrics.received.inc(received)
            self._metrics.missing.inc(missing - self._missing.get(layer.digest, 0))
            self._had[layer.digest] = max(layer.current_bytes, self._had.get(layer.digest, 0))
            self._missing[layer.digest] = missing

    def end(self, outcome: str) -> None:
        """It is over: `outcome` is done, failed or cancelled."""
        with self._lock:
            self._metrics.missing.dec(sum(self._missing.values()))
            self._missing.clear()
        self._metrics.running.dec()
        self._metrics.pulls.labels(outcome).observe(time.monotonic() - self._began_s)

"""How fast a container's output comes into its log: from the first byte until the file is complete."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from hack.benchmark.account import Account
from hack.benchmark.client import Endpoint
from hack.benchmark.measure import Deadline, Summary, alternating

_FILE_BYTES = 48 << 20  # in the pod's /dev/shm, so that making the output costs no more than reading a file
_COPIES = 4
_LINES = {"short": 49, "long": 8000}
_SCRIPT = """
line=$(printf %0{width}d 7)
yes "$line" | head -c {size} > /dev/shm/f
echo; echo ready
while [ ! -e /dev/shm/go ]; do sleep 0.05; done
cat {files}
echo; echo over
exec sleep 2147483
"""
_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Stream:
    """Of lines of one length: MB of output a second, and CPU milliseconds per 100 MB in all."""

    line_bytes: int
    rate: Summary
    cpu_ms: Summary


def streams(
    endpoints: list[Endpoint], accounts: dict[str, Account], rounds: int, limit: Deadline
) -> dict[str, dict[str, Stream]]:
    """One container at a time, `rounds` of each shape for each endpoint, by its name."""
    found: dict[str, dict[str, Stream]] = {endpoint.name: {} for endpoint in endpoints}
    for shape, width in _LINES.items():
        rates: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
        costs: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
        for index in limit.rounds(rounds, f"{shape} lines"):
            with alternating(endpoints, index) as turn:
                for endpoint in turn:
                    rate, cost = _stream(endpoint, accounts[endpoint.name], width)
                    rates[endpoint.name].append(rate)
                    costs[endpoint.name].append(cost)
        for name in found:
            rate_of, cost_of = Summary.of(rates[name]), Summary.of(costs[name])
            if rate_of and cost_of:
                found[name][shape] = Stream(width + 1, rate_of, cost_of)
    return found


def _stream(endpoint: Endpoint, account: Account, width: int) -> tuple[float, float]:
    """MB a second and CPU milliseconds per 100 MB of one container."""
    files = " ".join(["/dev/shm/f"] * _COPIES)
    pod = endpoint.start(command=("sh", "-c", _SCRIPT.format(width=width, size=_FILE_BYTES, files=files)))
    try:
        path = Path(endpoint.call("ContainerStatus", container_id=pod.container_id).status.log_path)
        _until(path, b" ready\n", endpoint.timeout_s)
        size, before = path.stat().st_size, account.cpu_s()
        endpoint.call("ExecSync", container_id=pod.container_id, cmd=["touch", "/dev/shm/go"], timeout=30)
        begin_s = time.time()
        while path.stat().st_size == size:
            begin_s = time.time()
        _until(path, b" over\n", endpoint.timeout_s)
        took_s = path.stat().st_mtime_ns / 1e9 - begin_s
        cpu_s = account.cpu_s() - before
    finally:
        endpoint.stop(pod)
        path.unlink(missing_ok=True)
    output = _FILE_BYTES * _COPIES
    return output / 1e6 / took_s, cpu_s * 1e3 / (output / 1e8)


def _until(path: Path, end: bytes, timeout_s: float) -> None:
    """Wait until the file ends like that."""
    deadline = time.monotonic() + timeout_s
    with open(path, "rb") as file:
        while True:
            file.seek(-min(len(end), os.fstat(file.fileno()).st_size), os.SEEK_END)
            if file.read() == end:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{path} does not end with {end!r} after {timeout_s:g} s")
            threading.Event().wait(_POLL_S)

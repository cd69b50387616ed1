"""Streaming under measurement: an exec's first byte, port-forward's throughput, and what idle sessions keep.

The client is SPDY without windows, as kubelets and kubectl speak it, on a plain blocking socket.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from cri.streaming.peer import Peer
from hack.benchmark.account import Account, memory_bytes
from hack.benchmark.client import SLEEP, Endpoint, Pod
from hack.benchmark.measure import Deadline, Result, Summary, alternating, pass_time

_TIMEOUT_S = 30
_U32 = struct.Struct(">I")
_PING = 0x80030006
_PORT = 8047
_PARSED_BYTES = 1 << 20
_MEASURED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Forwarded:
    """Port-forward of one connection, from the pod: MiB a second, and the runtime's and pod's CPU seconds per GiB."""

    mib_per_s: float
    cpu_s_per_gib: float


@dataclass(frozen=True, slots=True)
class Sessions:
    """What one idle exec session keeps in the daemon and its helpers, beyond its own process."""

    count: int
    each_bytes: float


class Connection:
    """A connection to an address that a runtime gave out."""

    def __init__(self, url: str, protocol: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self.sock = socket.create_connection((parts.hostname, parts.port), _TIMEOUT_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = Peer()
        self.peer.take()  # SETTINGS and WINDOW_UPDATE, by which it would say that it keeps windows
        head = f"POST {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 0\r\n"
        head += f"Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n\r\n"
        self.sock.sendall(head.encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._recv()
        answer, _, rest = answer.partition(b"\r\n\r\n")
        if b" 101 " not in answer.partition(b"\r\n")[0]:
            raise RuntimeError(f"{url}: {answer.decode(errors='replace')}")
        self._left = rest

    def _recv(self) -> bytes:
        data = self.sock.recv(1 << 18)
        if not data:
            raise RuntimeError("a streaming connection ended early")
        return data

    def open(self, streams: list[dict[str, str]]) -> list[int]:
        numbers = [self.peer.open(headers) for headers in streams]
        self.sock.sendall(self.peer.take())
        return numbers

    def received(self, stream: int) -> int:
        """Wait for bytes on the stream; how many came."""
        size = 0
        while not size:
            while len(self._left) < 8 or len(self._left) < 8 + _length(self._left):
                self._left += self._recv()
            (head,), length = _U32.unpack_from(self._left), _length(self._left)
            if head == stream:
                size = length
            elif head == _PING:
                self.sock.sendall(self._left[: 8 + length])
            self._left = self._left[8 + length :]
        return size


def _length(frame: bytes) -> int:
    return int.from_bytes(frame[5:8], "big")


def _exec(endpoint: Endpoint, pod: Pod, command: list[str]) -> Connection:
    """A running command, once its first output is here."""
    url = endpoint.call("Exec", container_id=pod.container_id, cmd=command, stdout=True, stderr=True).url
    connection = Connection(url, "v4.channel.k8s.io")
    _, stdout, _ = connection.open([{"streamtype": name} for name in ("error", "stdout", "stderr")])
    connection.received(stdout)
    return connection


@contextlib.contextmanager
def _pods(endpoints: list[Endpoint]) -> Iterator[dict[str, Pod]]:
    pods = {endpoint.name: endpoint.start() for endpoint in endpoints}
    yield pods
    for endpoint in endpoints:
        endpoint.stop(pods[endpoint.name])


def first_bytes(endpoints: list[Endpoint], results: dict[str, Result], rounds: int, limit: Deadline) -> None:
    """From the Exec call to the first byte of `echo`."""
    times: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    with _pods(endpoints) as pods:
        for index in limit.rounds(rounds, "streaming execs"):
            with alternating(endpoints, index) as turn:
                for endpoint in turn:
                    pass_time(0.05)
                    begin = time.perf_counter()
                    connection = _exec(endpoint, pods[endpoint.name], ["echo", "x"])
                    times[endpoint.name].append((time.perf_counter() - begin) * 1e3)
                    connection.sock.close()
    for endpoint in endpoints:
        results[endpoint.name].exec_first_byte = Summary.of(times[endpoint.name])


def forward(
    endpoints: list[Endpoint], meters: dict[str, Account], results: dict[str, Result], rounds: int, limit: Deadline
) -> None:
    """What one connection brings out of a pod, the best of some rounds."""
    best: dict[str, Forwarded] = {}
    with _pods(endpoints) as pods:
        for endpoint in endpoints:
            # Who goes on listening is called by one of these letters, as busybox was built.
            tries = " || ".join(f"nc -l{letter} -p {_PORT} -e cat /dev/zero" for letter in "kl")
            server = f"({tries}) >/dev/null 2>&1 &"
            pod = pods[endpoint.name]
            endpoint.call("ExecSync", container_id=pod.container_id, cmd=["sh", "-c", server], timeout=30)
        for index in limit.rounds(rounds, "port-forward"):
            with alternating(endpoints, index) as turn:
                for endpoint in turn:
                    found = _forwarded(endpoint, meters[endpoint.name], pods[endpoint.name])
                    before = best.get(endpoint.name)
                    if before is None or found.mib_per_s > before.mib_per_s:
                        best[endpoint.name] = found
    for name, found in best.items():
        results[name].forward = found


def _forwarded(endpoint: Endpoint, meter: Account, pod: Pod) -> Forwarded:
    url = endpoint.call("PortForward", pod_sandbox_id=pod.sandbox_id, port=[_PORT]).url
    connection = Connection(url, "portforward.k8s.io")
    fields = {"port": str(_PORT), "requestid": "0"}
    _, data = connection.open([{"streamtype": kind} | fields for kind in ("error", "data")])
    got = 0
    while got < _PARSED_BYTES:  # by then the runtime knows that this client keeps no windows
        got += connection.received(data)
    buffer = bytearray(1 << 20)
    before, begin, left = meter.cpu_s(), time.perf_counter(), _MEASURED_BYTES
    while left > 0:
        size = connection.sock.recv_into(buffer)
        if not size:
            raise RuntimeError(f"{endpoint.name}: port-forward ended early")
        left -= size
    seconds = time.perf_counter() - begin
    used = meter.cpu_s() - before
    connection.sock.close()
    return Forwarded(_MEASURED_BYTES / 2**20 / seconds, used / (_MEASURED_BYTES / 2**30))


def sessions(endpoint: Endpoint, meter: Account, result: Result, count: int, limit: Deadline) -> None:
    """Memory of idle execs that a client holds open, all in one container."""

    def kept() -> int:
        return memory_bytes(meter.daemon) + sum(map(memory_bytes, meter.helpers()))

    with _pods([endpoint]) as pods, contextlib.ExitStack() as stack:
        pod = pods[endpoint.name]
        command = ["sh", "-c", f"echo x; exec {' '.join(SLEEP)}"]
        for _ in range(3):  # what the first ones take once
            _exec(endpoint, pod, command).sock.close()
        pass_time(1)
        before, made = kept(), 0
        for _ in limit.rounds(count, f"idle exec sessions of {endpoint.name}"):
            stack.callback(_exec(endpoint, pod, command).sock.close)
            made += 1
        if made == count:
            pass_time(1)
            result.sessions = Sessions(count, (kept() - before) / count)

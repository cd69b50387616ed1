"""The measurements. Phases take their endpoints in turns, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hack.benchmark.account import Account, is_workload, memory_bytes, system_cpu_s
from hack.benchmark.client import FEATURES, CallFailed, Endpoint, Pod
from hack.benchmark.floor import Cycle, Floor

if TYPE_CHECKING:
    from hack.benchmark.streams import Forwarded, Sessions

# What a removal leaves to the kernel (namespaces, cgroups) and to the runtime is over before the next start is timed.
_QUIET_S = 0.1
_SETTLE_S = 0.5
_CPU_BLOCK = 5


@dataclass(frozen=True, slots=True)
class Summary:
    """Milliseconds over `count` samples; p99 by nearest rank, so the worst of fewer than 100."""

    median: float
    p99: float
    best: float
    count: int

    @staticmethod
    def of(samples: list[float]) -> Summary | None:
        if not samples:
            return None
        ordered = sorted(samples)
        return Summary(
            statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1], ordered[0], len(ordered)
        )


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU milliseconds per cycle: `own` by the runtime's and the pods' cgroups, `system` of the whole machine."""

    own_ms: float
    system_ms: float
    count: int


@dataclass(frozen=True, slots=True)
class Idle:
    """With `pods` idle pods: memory (Pss and page tables) and the daemon's CPU."""

    pods: int
    helpers_per_pod_bytes: float
    pod_init_per_pod_bytes: float
    daemon_bytes: int
    core_percent: float
    start: Summary | None
    floor: Summary | None


@dataclass(frozen=True, slots=True)
class Concurrent:
    """`pods` starts at once, over `rounds`: wall time divided by pods, and one start as its caller saw it."""

    pods: int
    rounds: int
    wall_per_pod_ms: float
    start: Summary


@dataclass(slots=True)
class Result:
    start: Summary | None = None
    exec_true: Summary | None = None
    stop: Summary | None = None
    cpu: Cpu | None = None
    idle: Idle | None = None
    concurrent: Concurrent | None = None
    calls: dict[str, Summary | None] = field(default_factory=dict)
    features: dict[str, Summary | None] = field(default_factory=dict)
    exec_first_byte: Summary | None = None
    forward: Forwarded | None = None
    sessions: Sessions | None = None


class Deadline:
    """The time limit of a run: phases stop early when it has passed, and `cut` names them."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s
        self.cut: list[str] = []

    def rounds(self, count: int, phase: str) -> Iterator[int]:
        for index in range(count):
            if time.monotonic() > self._end:
                self.cut.append(f"{phase}: {index} of {count}")
                return
            yield index


def pass_time(seconds: float) -> None:
    threading.Event().wait(seconds)


@contextlib.contextmanager
def alternating(endpoints: list[Endpoint], index: int) -> Iterator[list[Endpoint]]:
    """Each round begins with another one: nobody always follows the same neighbour."""
    turn = index % len(endpoints)
    yield endpoints[turn:] + endpoints[:turn]


def starts(
    endpoints: list[Endpoint], floor: Floor | None, results: dict[str, Result], rounds: int, execs: int, limit: Deadline
) -> list[Cycle]:
    """One pod at a time: start, `execs` times ExecSync of `true`, stop and remove. Returns the floor's cycles."""
    started: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    stopped: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    cycles = []
    for endpoint in endpoints:
        endpoint.times.clear()
    for index in limit.rounds(rounds, "starts"):
        with alternating(endpoints, index) as turn:
            for endpoint in turn:
                pass_time(_QUIET_S)
                pod = endpoint.start()
                for _ in range(execs):
                    endpoint.exec_true(pod)
                started[endpoint.name].append(pod.started_ms)
                stopped[endpoint.name].append(endpoint.stop(pod))
        if floor is not None:
            pass_time(_QUIET_S)
            cycles.append(floor.cycle())
    for endpoint in endpoints:
        result = results[endpoint.name]
        result.start, result.stop = Summary.of(started[endpoint.name]), Summary.of(stopped[endpoint.name])
        result.exec_true = Summary.of(endpoint.times["ExecSync"])
        result.calls = {name: Summary.of(samples) for name, samples in endpoint.times.items()}
    return cycles


def cpu(
    endpoints: list[Endpoint], accounts: dict[str, Account], results: dict[str, Result], cycles: int, limit: Deadline
) -> None:
    """Start, stop and remove in blocks, with a pause before each reading for what goes on after a call has returned."""
    own = dict.fromkeys(accounts, 0.0)
    system = dict.fromkeys(accounts, 0.0)
    count = dict.fromkeys(accounts, 0)
    for index in limit.rounds(math.ceil(cycles / _CPU_BLOCK), "cpu"):
        with alternating(endpoints, index) as turn:
            for endpoint in turn:
                account = accounts[endpoint.name]
                pass_time(_SETTLE_S)
                before, before_all = account.cpu_s(), system_cpu_s()
                for _ in range(_CPU_BLOCK):
                    endpoint.stop(endpoint.start())
                pass_time(_SETTLE_S)
                own[endpoint.name] += account.cpu_s() - before
                system[endpoint.name] += system_cpu_s() - before_all
                count[endpoint.name] += _CPU_BLOCK
    for name, done in count.items():
        if done:
            results[name].cpu = Cpu(own[name] / done * 1e3, system[name] / done * 1e3, done)


def features(endpoints: list[Endpoint], results: dict[str, Result], rounds: int, limit: Deadline) -> None:
    """Starts with each feature in turn, one pod at a time; a runtime that refuses one hasn't got it."""
    started: dict[tuple[str, str], list[float]] = {}
    refused: set[tuple[str, str]] = set()
    for index in limit.rounds(rounds, "starts by feature"):
        with alternating(endpoints, index) as turn:
            for endpoint, feature in ((endpoint, feature) for feature in FEATURES for endpoint in turn):
                key = endpoint.name, feature
                if key in refused:
                    continue
                pass_time(_QUIET_S)
                try:
                    pod = endpoint.start(feature)
                except CallFailed:
                    refused.add(key)
                    endpoint.sweep()
                    continue
                started.setdefault(key, []).append(pod.started_ms)
                endpoint.stop(pod)
    for endpoint in endpoints:
        results[endpoint.name].features = {
            feature: Summary.of(started.get((endpoint.name, feature), [])) for feature in FEATURES
        }


def concurrent(endpoints: list[Endpoint], results: dict[str, Result], pods: int, rounds: int, limit: Deadline) -> None:
    """`pods` starts at once, one thread each; stopping them is not timed."""
    walls: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    single: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    with ThreadPoolExecutor(pods) as threads:
        for index in limit.rounds(rounds, "concurrent starts"):
            with alternating(endpoints, index) as turn:
                for endpoint in turn:
                    begin = time.perf_counter()
                    started = [future.result() for future in [threads.submit(endpoint.start) for _ in range(pods)]]
                    walls[endpoint.name].append((time.perf_counter() - begin) * 1e3 / pods)
                    single[endpoint.name].extend(pod.started_ms for pod in started)
                    list(threads.map(endpoint.stop, started))
    for endpoint in endpoints:
        start = Summary.of(single[endpoint.name])
        if start is not None:
            wall = statistics.median(walls[endpoint.name])
            results[endpoint.name].concurrent = Concurrent(pods, len(walls[endpoint.name]), wall, start)


def idle(
    endpoint: Endpoint, account: Account, floor: Floor | None, result: Result, pods: int, starts: int, limit: Deadline
) -> None:
    """Memory and idle CPU with `pods` pods of one sleeping container each, and `starts` more starts among them."""
    with ThreadPoolExecutor(4) as threads:
        held: list[Pod] = []
        for _ in limit.rounds(math.ceil(pods / 4), f"idle pods of {endpoint.name}"):
            held += threads.map(lambda _: endpoint.start(), range(min(4, pods - len(held))))
        try:
            if len(held) == pods:
                result.idle = _measure_idle(endpoint, account, floor, len(held), starts, limit)
        finally:
            list(threads.map(endpoint.stop, held))


def _measure_idle(
    endpoint: Endpoint, account: Account, floor: Floor | None, pods: int, starts: int, limit: Deadline
) -> Idle:
    pass_time(2)
    inside, helping = account.pods(), account.helpers()
    daemon = memory_bytes(account.daemon)
    helper_bytes = sum(map(memory_bytes, helping))
    init_bytes = sum(memory_bytes(pid) for pid in inside if not is_workload(pid))
    before, begin = account.cpu_s(), time.monotonic()
    pass_time(5)
    busy = (account.cpu_s() - before) / (time.monotonic() - begin) * 100
    started, cycles = [], []
    for _ in limit.rounds(starts, f"starts among the idle pods of {endpoint.name}"):
        pass_time(_QUIET_S)
        pod = endpoint.start()
        started.append(pod.started_ms)
        endpoint.stop(pod)
        if floor is not None:
            pass_time(_QUIET_S)
            cycles.append(floor.cycle().start_ms)
    return Idle(pods, helper_bytes / pods, init_bytes / pods, daemon, busy, Summary.of(started), Summary.of(cycles))

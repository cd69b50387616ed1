"""Measure CRI runtimes side by side, and the kernel's own cost beside them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console

from hack.benchmark import account, logs, measure, report, streams
from hack.benchmark.client import CallFailed, Endpoint
from hack.benchmark.floor import Floor

_EPILOG = """
Every phase takes the endpoints in turns. Run to started is RunPodSandbox, CreateContainer and StartContainer of a pod
with one container; CPU per cycle is that with its stop and removal, read from cgroups (see benchmark/account.py).
The floor is the same work by a bare C program (benchmark/floor.c; needs gcc). Memory counts Pss and page tables of
shims, or of monitors and their zygote. --features compares starts of a pod without seccomp (plain), with a user
namespace, with seccomp, and with 50 volumes. Pods of this run are removed at its end, whatever happens.
hack/bench images measures pulls (see its own --help).
"""


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hack/bench", description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add("--endpoint", action="append", required=True, metavar="NAME=unix:///SOCKET", help="a CRI socket; repeatable")
    add("--image", required=True, metavar="REFERENCE", help="has sleep and true; pulled where it is missing")
    add("--iterations", type=int, default=50, help="sequential pod cycles (%(default)s)")
    add("--warm-up", type=int, default=3, help="cycles before, not counted (%(default)s)")
    add("--execs", type=int, default=2, help="ExecSync calls per cycle (%(default)s)")
    add("--cpu-cycles", type=int, default=20, help="cycles for the CPU figure (%(default)s; 0: none)")
    add("--features", type=int, default=0, help="starts with each of some features (%(default)s: none)")
    add("--streams", type=int, default=0, help="streaming execs and port-forwards (%(default)s: none)")
    add("--sessions", type=int, default=0, help="idle exec sessions for memory (%(default)s: none)")
    add("--concurrent", type=int, default=8, help="starts at once (%(default)s; 0: none)")
    add("--rounds", type=int, default=5, help="rounds of concurrent starts (%(default)s)")
    add("--idle", type=int, default=100, help="idle pods for memory (%(default)s; 0: none)")
    add("--idle-starts", type=int, default=20, help="starts measured among them (%(default)s)")
    add("--logs", type=int, default=0, metavar="ROUNDS", help="containers' output into logs, this often (none)")
    add("--time-limit", type=float, default=600, metavar="SECONDS", help="phases end early after it (%(default)s)")
    add("--host-network", action="store_true", help="pods without a network namespace of their own")
    add("--no-floor", action="store_true", help="leave the C program out")
    add("--work", type=Path, default=Path("/var/tmp"), help="where the floor's overlay lies (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(argv)
    pairs = [endpoint.partition("=") for endpoint in options.endpoint]
    for name, _, target in pairs:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name) or not target.startswith("unix:///"):
            parser.error(f"--endpoint {name}={target}: wanted NAME=unix:///SOCKET, the name in lower case")
    options.endpoint = {name: target for name, _, target in pairs}
    if len(options.endpoint) < len(pairs):
        parser.error("--endpoint: two of the same name")
    return options


def _oci_runtime(endpoint: Endpoint) -> str:
    """The version of the program that containerd runs containers with; empty for a runtime that shows none."""
    try:
        runtimes = json.loads(endpoint.call("Status", verbose=True).info["config"])["containerd"]
        binary = runtimes["runtimes"][runtimes["defaultRuntimeName"]]["options"]["BinaryName"]
        return subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (KeyError, TypeError, ValueError, IndexError, OSError, subprocess.CalledProcessError):
        return ""


def _versions(endpoints: list[Endpoint]) -> dict[str, str]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    facts = {
        "kernel": f"{os.uname().release} {os.uname().machine}",
        "cgroup": "v2" if account.unified() else "v1",
        "processors": f"{os.cpu_count()} x {model.group(1) if model else platform.machine()}",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "Python (client)": f"{platform.python_version()}, grpcio {grpc.__version__}",
    }
    for endpoint in endpoints:
        answer = endpoint.call("Version")
        words = (answer.runtime_name, answer.runtime_version, f"CRI {answer.runtime_api_version}")
        facts[endpoint.name] = ", ".join(filter(None, (" ".join(words), _oci_runtime(endpoint))))
    return facts


def _prepare(endpoint: Endpoint, warm_up: int, stack: contextlib.ExitStack) -> account.Account:
    """Pull the image and run a pod, by which the accounting finds the runtime's processes. `stack` undoes it."""
    systemd = endpoint.call("RuntimeConfig").linux.cgroup_driver == 0
    meter = account.Account(endpoint.name, endpoint.daemon_pid(), systemd)
    stack.callback(meter.release)
    stack.callback(endpoint.sweep)
    endpoint.prepare(meter.pod_parent)
    pod = endpoint.start()
    meter.attach()
    endpoint.stop(pod)
    for _ in range(warm_up):
        endpoint.stop(endpoint.start())
    return meter


def _run(options: argparse.Namespace, console: Console, stack: contextlib.ExitStack) -> dict[str, Any]:
    limit = measure.Deadline(options.time_limit)
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="crib-bench-logs-"))
    run = f"{os.getpid()}-{int(time.time())}"
    endpoints = []
    for name, target in options.endpoint.items():
        endpoint = Endpoint(name, target, options.image, run, directory, options.host_network)
        stack.callback(endpoint.close)
        endpoints.append(endpoint)
    facts = _versions(endpoints)
    report.versions(console, facts)
    floor = None if options.no_floor else stack.enter_context(Floor(options.work))
    meters = {endpoint.name: _prepare(endpoint, options.warm_up, stack) for endpoint in endpoints}
    for name, meter in meters.items():
        console.print(f"CPU of {name} is read from {' '.join(meter.describe())}", style="dim")
    for _ in range(options.warm_up if floor else 0):
        assert floor is not None
        floor.cycle()

    results = {endpoint.name: measure.Result() for endpoint in endpoints}
    with console.status("starts"):
        cycles = measure.starts(endpoints, floor, results, options.iterations, options.execs, limit)
    if options.cpu_cycles:
        with console.status("CPU"):
            measure.cpu(endpoints, meters, results, options.cpu_cycles, limit)
    if options.features:
        with console.status("starts by feature"):
            measure.features(endpoints, results, options.features, limit)
    if options.streams:
        with console.status("streaming"):
            streams.first_bytes(endpoints, results, options.streams, limit)
            streams.forward(endpoints, meters, results, max(options.streams // 5, 1), limit)
    for endpoint in endpoints if options.sessions else ():
        with console.status(f"idle exec sessions of {endpoint.name}"):
            streams.sessions(endpoint, meters[endpoint.name], results[endpoint.name], options.sessions, limit)
    if options.concurrent:
        with console.status("concurrent starts"):
            measure.concurrent(endpoints, results, options.concurrent, options.rounds, limit)
    for endpoint in endpoints if options.idle else ():
        with console.status(f"idle pods of {endpoint.name}"):
            meter, result = meters[endpoint.name], results[endpoint.name]
            measure.idle(endpoint, meter, floor, result, options.idle, options.idle_starts, limit)
    written: dict[str, dict[str, logs.Stream]] = {}
    if options.logs:
        with console.status("logs"):
            written = logs.streams(endpoints, meters, options.logs, limit)
    if options.iterations or options.streams:
        report.tables(console, results, cycles)
    if written:
        report.logs(console, written)
    for cut in limit.cut:
        console.print(f"cut short by the time limit: {cut}", style="yellow")
    plain: dict[str, Any] = {name: dataclasses.asdict(result) for name, result in results.items()}
    for name, shapes in written.items():
        plain[name]["logs"] = {shape: dataclasses.asdict(stream) for shape, stream in shapes.items()}
    if cycles:
        bare = report.floor_result(cycles)
        plain[report.FLOOR] = {
            name: dataclasses.asdict(value) if isinstance(value, measure.Summary) else value
            for name, value in bare.items()
        }
    return {"versions": facts, "results": plain, "cut": limit.cut}


def main() -> int:
    options = _arguments(sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 140)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was made is undone
    if os.geteuid() != 0:
        console.print("hack/bench: needs root: it reads other processes' memory and makes cgroups", style="red")
        return 1
    try:
        with contextlib.ExitStack() as stack:
            outcome = _run(options, console, stack)
    except (CallFailed, OSError, RuntimeError) as error:
        console.print(f"hack/bench: {error}", style="red", markup=False)
        return 1
    if options.json:
        options.json.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The tables on a terminal, and the same as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from hack.benchmark.client import FEATURES, PLAIN
from hack.benchmark.floor import Cycle
from hack.benchmark.logs import Stream
from hack.benchmark.measure import Result, Summary

FLOOR = "floor (C)"


def floor_result(cycles: list[Cycle]) -> dict[str, Any]:
    """What the floor has of a result."""
    return {
        "start": Summary.of([cycle.start_ms for cycle in cycles]),
        "exec_true": Summary.of([cycle.exec_ms for cycle in cycles]),
        "stop": Summary.of([cycle.stop_ms for cycle in cycles]),
        "cpu_ms": statistics.mean(cycle.cpu_ms for cycle in cycles) if cycles else None,
    }


def _ms(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    return f"{summary.median:.1f} / {summary.p99:.1f} / {summary.best:.1f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f}"


def _ratio(mine: Summary | None, floor: Summary | None) -> str:
    return f"{mine.median / floor.median:.2f}" if mine and floor else "-"


def versions(console: Console, facts: dict[str, str]) -> None:
    table = Table("what", "version", title="versions", title_justify="left")
    for name, version in facts.items():
        table.add_row(name, version)
    console.print(table)


def tables(console: Console, results: dict[str, Result], cycles: list[Cycle]) -> None:
    floor = floor_result(cycles)
    names = list(results)
    table = Table("", *names, *([FLOOR] if cycles else []), title_justify="left")
    table.title = "milliseconds: median / p99 / best"

    def row(label: str, cell: Callable[[Result], str], floor_cell: str = "") -> None:
        table.add_row(label, *(cell(results[name]) for name in names), *([floor_cell] if cycles else []))

    row("run to started", lambda r: _ms(r.start), _ms(floor["start"]))
    row("  median over the floor's", lambda r: _ratio(r.start, floor["start"]), "1")
    if any(r.features for r in results.values()):
        for feature in FEATURES:
            row(f"run to started, {feature}", lambda r, feature=feature: _ms(r.features.get(feature)))  # type: ignore[misc]
            row(
                "  median over plain's",
                lambda r, feature=feature: _ratio(r.features.get(feature), r.features.get(PLAIN)),  # type: ignore[misc]
            )
    row("ExecSync of true", lambda r: _ms(r.exec_true), _ms(floor["exec_true"]))
    row("stop and remove", lambda r: _ms(r.stop), _ms(floor["stop"]))
    for call in dict.fromkeys(call for name in names for call in results[name].calls):
        row(f"  {call}", lambda r, call=call: _ms(r.calls.get(call)))  # type: ignore[misc]
    if any(r.exec_first_byte for r in results.values()):
        row("streaming exec, first byte", lambda r: _ms(r.exec_first_byte))
    if any(r.forward for r in results.values()):
        row("port-forward, MiB/s", lambda r: f"{r.forward.mib_per_s:.0f}" if r.forward else "-")
        row("  CPU seconds per GiB", lambda r: f"{r.forward.cpu_s_per_gib:.2f}" if r.forward else "-")
    if any(r.sessions for r in results.values()):
        count = max(r.sessions.count for r in results.values() if r.sessions)
        row(
            f"KiB per idle exec session, {count}",
            lambda r: f"{r.sessions.each_bytes / 1024:.0f}" if r.sessions else "-",
        )
    if any(r.concurrent for r in results.values()):
        count = max(r.concurrent.pods for r in results.values() if r.concurrent)
        row(f"{count} starts at once, each", lambda r: _ms(r.concurrent.start) if r.concurrent else "-")
        row("  wall time per pod", lambda r: f"{r.concurrent.wall_per_pod_ms:.1f}" if r.concurrent else "-")
    if any(r.cpu for r in results.values()):
        own = f"{floor['cpu_ms']:.1f}" if cycles else ""
        row("CPU per cycle, own cgroups", lambda r: f"{r.cpu.own_ms:.1f}" if r.cpu else "-", own)
        row("CPU per cycle, whole machine", lambda r: f"{r.cpu.system_ms:.0f}" if r.cpu else "-")
    if any(r.idle for r in results.values()):
        count = max(r.idle.pods for r in results.values() if r.idle)
        row(f"run to started among {count}", lambda r: _ms(r.idle.start) if r.idle else "-")
        row("  the floor there", lambda r: _ms(r.idle.floor) if r.idle else "-")
        row("  median over the floor's", lambda r: _ratio(r.idle.start, r.idle.floor) if r.idle else "-")
        row(f"helpers' MiB per pod, {count} idle", lambda r: _mib(r.idle.helpers_per_pod_bytes) if r.idle else "-")
        row("pod inits' MiB per pod", lambda r: _mib(r.idle.pod_init_per_pod_bytes) if r.idle else "-")
        row("daemon MiB", lambda r: _mib(r.idle.daemon_bytes) if r.idle else "-")
        row("idle, % of one core", lambda r: f"{r.idle.core_percent:.2f}" if r.idle else "-")
    console.print(table)


def logs(console: Console, found: dict[str, dict[str, Stream]]) -> None:
    table = Table("output into a log", *found, title="median / best", title_justify="left")
    for shape in dict.fromkeys(shape for shapes in found.values() for shape in shapes):
        of = [shapes.get(shape) for shapes in found.values()]
        line_bytes = next(stream.line_bytes for stream in of if stream)
        rates = [f"{s.rate.median:.0f} / {s.rate.p99:.0f}" if s else "-" for s in of]
        table.add_row(f"MB/s, lines of {line_bytes} bytes", *rates)
        costs = [f"{s.cpu_ms.median:.0f} / {s.cpu_ms.best:.0f}" if s else "-" for s in of]
        table.add_row("  CPU ms per 100 MB", *costs)
    console.print(table)

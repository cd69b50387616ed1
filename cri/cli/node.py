"""`crib plan`, `doctor` and `version`: how cribd did it, what it can, and which one it is."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from importlib.metadata import version as installed_version
from typing import Final

import msgspec

from cri.api import cri_pb2 as pb
from cri.cli import failure
from cri.cli.client import Client
from cri.cli.failure import Failure, printable
from cri.cli.inventory import Inventory
from cri.cli.output import milliseconds, short, show, show_json

_ID: Final = re.compile(r"\b[0-9a-f]{32,64}\b")
_CONDITIONS: Final = ("RuntimeReady", "NetworkReady")


class StepRow(msgspec.Struct, frozen=True, kw_only=True):
    """`at_ns` is when it began, after the first step did."""

    index: int
    phase: str
    text: str
    at_ns: int
    duration_ns: int
    error: str


class PlanTable(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    kind: str
    name: str
    total_ns: int
    steps: list[StepRow]


class ProbeRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    ok: bool
    detail: str
    fallback: str


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """`conditions` are those of the CRI's Status; `ok` is whether all of them hold."""

    ok: bool
    conditions: list[ProbeRow]
    probes: list[ProbeRow]


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    client: str
    server: str | None
    runtime: str | None
    api: str | None


def plan(client: Client, options: Namespace) -> int:
    """The steps that pods and containers were built with, and what each cost."""
    inventory = Inventory(client)
    tables = [_table(client, inventory.any(given)) for given in options.things]
    if options.output == "json":
        show_json(tables)
        return 0
    for number, table in enumerate(tables):
        if number:
            print()
        took = "" if not table.total_ns else f": {milliseconds(table.total_ns)}, {len(table.steps)} steps"
        print(f"{table.kind} {printable(table.name)} ({short(table.id)}){took}", flush=True)
        total = StepRow(index=0, phase="", text="from call to answer", at_ns=0, duration_ns=table.total_ns, error="")
        columns = {
            "#": lambda row: str(row.index or ""),
            "PHASE": lambda row: row.phase,
            "AT": lambda row: milliseconds(row.at_ns) if row.index else "total",
            "TOOK": lambda row: milliseconds(row.duration_ns),
            "STEP": lambda row: _shorter(f"{row.text}: failed: {row.error}" if row.error else row.text),
        }
        show([*table.steps, total], columns, as_json=False)
    return 0


def _table(client: Client, thing: pb.Container | pb.PodSandbox) -> PlanTable:
    answer = client.call("Plan", id=thing.id)
    began_ns = min((step.started_ns for step in answer.steps), default=0)
    steps = [
        StepRow(
            index=step.index,
            phase=step.phase,
            text=step.text,
            at_ns=step.started_ns - began_ns,
            duration_ns=step.duration_ns,
            error=step.error,
        )
        for step in answer.steps
    ]
    return PlanTable(id=answer.id, kind=answer.kind, name=thing.metadata.name, total_ns=answer.total_ns, steps=steps)


def _shorter(text: str) -> str:
    """A step's text for a table: ids as far as one needs them."""
    return _ID.sub(lambda match: f"{short(match[0])}…", text)


def doctor(client: Client, options: Namespace) -> int:
    """Whether cribd is ready, and what this kernel offers it; exit code 1 when it isn't ready."""
    status = client.call("Status").status
    told = {condition.type: condition for condition in status.conditions}
    conditions = [_condition(name, told.get(name)) for name in _CONDITIONS]
    probes = [
        ProbeRow(name=probe.name, ok=probe.ok, detail=probe.detail, fallback=probe.fallback)
        for probe in client.call("Doctor").probes
    ]
    ok = all(condition.ok for condition in conditions)
    if options.output == "json":
        show_json(Diagnosis(ok=ok, conditions=conditions, probes=probes))
    else:
        columns = {
            "PROBE": lambda row: row.name,
            "OK": lambda row: "yes" if row.ok else "no",
            "DETAIL": lambda row: row.detail,
            "INSTEAD": lambda row: "" if row.ok else row.fallback or "(done without)",
        }
        show([*conditions, *probes], columns, as_json=False)
    return 0 if ok else failure.ERROR


def _condition(name: str, condition: pb.RuntimeCondition | None) -> ProbeRow:
    if condition is None:
        return ProbeRow(name=name, ok=False, detail="cribd doesn't tell", fallback="")
    words = [word for word in (condition.reason, condition.message) if word]
    return ProbeRow(name=name, ok=condition.status, detail=": ".join(words), fallback="")


def version(client: Client, options: Namespace) -> int:
    """The versions of this command and of cribd; without a cribd its own, and exit code 4."""
    mine = installed_version("crib")
    try:
        theirs = client.call("Version")
    except Failure:
        if options.output == "json":
            show_json(Versions(client=mine, server=None, runtime=None, api=None))
        else:
            print(f"crib {mine}")
            sys.stdout.flush()
        raise
    if options.output == "json":
        found = Versions(
            client=mine, server=theirs.runtime_version, runtime=theirs.runtime_name, api=theirs.runtime_api_version
        )
        show_json(found)
    else:
        print(f"crib {mine}")
        print(
            f"{printable(theirs.runtime_name)}d {printable(theirs.runtime_version)}, CRI {theirs.runtime_api_version}"
        )
    return 0

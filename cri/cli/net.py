"""`crib net` and `crib net check`: who has which address, and what this host lacks."""

from __future__ import annotations

from argparse import Namespace

import msgspec

from cri.api import crib_pb2 as pb
from cri.cli import failure
from cri.cli.client import Client
from cri.cli.output import age, short, show, show_json


class NetworkRow(msgspec.Struct, frozen=True, kw_only=True):
    """`current`: new pods get it."""

    name: str
    kind: str
    current: bool
    ranges: list[str]
    detail: str


class HoldRow(msgspec.Struct, frozen=True, kw_only=True):
    """`released`: given up, while the link isn't gone yet."""

    network: str
    pod: str
    pod_name: str
    pod_namespace: str
    addresses: list[str]
    host_interface: str
    since_ns: int
    released: bool


class HostPortRow(msgspec.Struct, frozen=True, kw_only=True):
    protocol: str
    host_ip: str
    host_port: int
    container_port: int
    pod: str
    pod_name: str
    pod_namespace: str
    addresses: list[str]


class RuleRow(msgspec.Struct, frozen=True, kw_only=True):
    table: str
    chain: str
    text: str


class Networks(msgspec.Struct, frozen=True, kw_only=True):
    networks: list[NetworkRow]
    leases: list[HoldRow]
    host_ports: list[HostPortRow]
    rules: list[RuleRow]


class FindingRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    ok: bool
    detail: str
    fix: str


def show_networks(client: Client, options: Namespace) -> int:
    """Networks, leases, host ports and rules; of the last three those that there are."""
    found = _read(client.call("Network"))
    if options.output == "json":
        show_json(found)
        return 0
    networks = {
        "NETWORK": lambda row: row.name,
        "KIND": lambda row: row.kind,
        "NEW PODS": lambda row: "yes" if row.current else "-",
        "RANGE": lambda row: ", ".join(row.ranges) or "-",
        "DETAIL": lambda row: row.detail,
    }
    leases = {
        "ADDRESS": lambda row: ", ".join(row.addresses) or "(none yet)",
        "POD": lambda row: f"{row.pod_namespace}/{row.pod_name}",
        "ID": lambda row: short(row.pod),
        "NETWORK": lambda row: row.network,
        "INTERFACE": lambda row: row.host_interface or "-",
        "SINCE": lambda row: "until its link is gone" if row.released else age(row.since_ns),
    }
    ports = {
        "HOST PORT": _at,
        "POD": lambda row: f"{row.pod_namespace}/{row.pod_name}",
        "LEADS TO": lambda row: ", ".join(_targets(row)),
    }
    rules = {
        "TABLE": lambda row: row.table,
        "CHAIN": lambda row: row.chain,
        "RULE": lambda row: row.text or "(not crib's)",
    }
    show(found.networks, networks, as_json=False)
    for rows, columns in ((found.leases, leases), (found.host_ports, ports), (found.rules, rules)):
        if rows:
            print(flush=True)
            show(rows, columns, as_json=False)
    return 0


def _read(answer: pb.NetworkResponse) -> Networks:
    return Networks(
        networks=[
            NetworkRow(name=one.name, kind=one.kind, current=one.current, ranges=list(one.ranges), detail=one.detail)
            for one in answer.networks
        ],
        leases=[
            HoldRow(
                network=hold.network,
                pod=hold.pod,
                pod_name=hold.pod_name,
                pod_namespace=hold.pod_namespace,
                addresses=list(hold.addresses),
                host_interface=hold.host_interface,
                since_ns=hold.since_ns,
                released=hold.released,
            )
            for hold in answer.holds
        ],
        host_ports=[
            HostPortRow(
                protocol=port.protocol,
                host_ip=port.host_ip,
                host_port=port.host_port,
                container_port=port.container_port,
                pod=hold.pod,
                pod_name=hold.pod_name,
                pod_namespace=hold.pod_namespace,
                addresses=list(hold.addresses),
            )
            for hold in answer.holds
            for port in hold.host_ports
        ],
        rules=[RuleRow(table=rule.table, chain=rule.chain, text=rule.text) for rule in answer.rules],
    )


def _at(row: HostPortRow) -> str:
    return f"{_target(row.host_ip, row.host_port) if row.host_ip else row.host_port}/{row.protocol}"


def _targets(row: HostPortRow) -> list[str]:
    """A port of one address of the node leads to the pod's address of the same IP version."""
    return [
        _target(address, row.container_port)
        for address in row.addresses
        if not row.host_ip or (":" in row.host_ip) == (":" in address)
    ]


def _target(address: str, port: int) -> str:
    ip = address.partition("/")[0]
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def check(client: Client, options: Namespace) -> int:
    """What this host has and lacks for pods' traffic; exit code 1 when something is missing."""
    findings = [
        FindingRow(name=one.name, ok=one.ok, detail=one.detail, fix="" if one.ok else one.fix)
        for one in client.call("CheckNetwork").findings
    ]
    columns = {
        "CHECK": lambda row: row.name,
        "OK": lambda row: "yes" if row.ok else "no",
        "DETAIL": lambda row: row.detail,
        "FIX": lambda row: row.fix,
    }
    show(findings, columns, as_json=options.output == "json")
    return 0 if all(row.ok for row in findings) else failure.ERROR

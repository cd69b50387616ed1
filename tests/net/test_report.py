"""What people are told about a network: who holds what, and what the host lacks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from net import HostPort, Wants
from net.network import Finding
from tests.net.conftest import NewNetwork
from tests.net.given import NewNamespace, nft, pod
from tests.net.test_cni import HOME, make_host
from tests.requires import requires

pytestmark = requires("root", "bridge", "ip")


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert all(one.ok or one.fix for one in findings), "each fault has its fix"
    return {one.name: one for one in findings}


@requires("nft")
def test_what_pods_hold(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network(subnet="10.99.0.0/24", subnet6="fd00:99::/64")
    assert network.inventory().networks == (), "nothing is made, nothing is shown"
    network.setup()
    network.attach(pod(1), new_namespace().netns(), Wants(host_ports=(HostPort("tcp", 8080, 80),)))
    second = new_namespace()
    network.attach(pod(2), second.netns())
    network.detach(pod(2).sandbox_id, None)
    found = network.inventory()
    (subject,) = found.networks
    assert (subject.ranges, subject.current) == (("10.99.0.0/24", "fd00:99::/64"), True)
    one, two = found.holds
    assert (one.pod, one.addresses) == (pod(1), ("10.99.0.2/24", "fd00:99::2/64"))
    assert (one.host_ports, one.released) == ((HostPort("tcp", 8080, 80),), False)
    assert two.released
    told = {(rule.chain, rule.text) for rule in found.rules}
    assert ("postrouting", "from 10.99.0.0/24 to elsewhere: with this node's address") in told
    assert ("guard", "to 127.0.0.0/8 from a link: dropped") in told
    assert {rule.table for rule in found.rules} == {"inet crib-t"}
    nft("add", "rule", "inet", "crib-t", "postrouting", "accept")
    assert [rule.text for rule in network.inventory().rules].count("") == 1, "somebody else's"
    nft("flush", "ruleset")
    subprocess.run(["ip", "link", "delete", network.bridge], check=True)
    assert network.inventory().rules == ()
    assert "not there" in network.inventory().networks[0].detail


@requires("nft")
def test_a_host_that_has_it_all(new_network: NewNetwork) -> None:
    network = new_network(subnet6="fd00:99::/64")
    network.setup()
    found = by_name(network.check_host())
    assert list(found) == [
        "bridge",
        *(f"IPv{version} forwarding" for version in (4, 6)),
        *(f"IPv{version} br_netfilter" for version in (4, 6)),
        *("nftables", "firewall", "uplink"),
    ]
    assert [name for name, one in found.items() if not one.ok and "br_netfilter" not in name] == []
    assert "crib-t-check" not in nft("list", "tables")


@pytest.fixture
def bridged_packets() -> Iterator[Path]:
    path = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not path.exists():
        pytest.skip("no br_netfilter")
    before = path.read_text()
    yield path
    path.write_text(before)


@requires("nft")
def test_what_a_host_lacks(new_network: NewNetwork, bridged_packets: Path) -> None:
    network = new_network()
    network.setup()
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
    bridged_packets.write_text("0")
    nft("table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }")
    found = by_name(network.check_host())
    assert found["IPv4 forwarding"].fix.startswith("sysctl -w net.ipv4.ip_forward=1")
    assert "bridge-nf-call-iptables=1" in found["IPv4 br_netfilter"].fix
    for command in found["firewall"].fix.split("; "):
        subprocess.run(command.split(), check=True)
    assert network.bridge in nft("list", "table", "ip", "filter"), "the fix is one that nft takes"
    nft("delete table ip filter")
    bridged_packets.write_text("1")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    assert all(one.ok for one in network.check_host())


def test_a_bridge_that_cannot_be_made(new_network: NewNetwork) -> None:
    subprocess.run(["ip", "link", "add", "theirs", "type", "bridge"], check=True)
    try:
        found = by_name(new_network(bridge="theirs").check_host())
        assert not found["bridge"].ok
        assert "not crib's" in found["bridge"].detail
    finally:
        subprocess.run(["ip", "link", "delete", "theirs"], check=True)


def test_cni(tmp_path: Path, new_namespace: NewNamespace) -> None:
    host = make_host(tmp_path, "one", "two")
    found = by_name(host.network.check_host())
    assert "no usable CNI configuration" in found["configuration"].detail
    host.plugins({"capabilities": {"portMappings": True}}, {"type": "two", "ipam": {"type": "pool"}})
    found = by_name(host.network.check_host())
    assert found["plugin one"].detail == f"{tmp_path}/bin/one"
    assert found["plugin pool"].detail == f"plugin pool: not found in {tmp_path}/bin, {HOME}"
    host.plugins({"capabilities": {"portMappings": True}}, {"type": "two"})
    assert all(one.ok for one in host.network.check_host())

    host.network.attach(pod(1), new_namespace().netns(), Wants(host_ports=(HostPort("udp", 53, 53, "127.0.0.1"),)))
    inventory = host.network.inventory()
    (subject,) = inventory.networks
    assert (subject.name, subject.detail) == (
        "testnet",
        f"{tmp_path}/net.d/10-test.conflist, version 1.1.0: one, two",
    )
    (hold,) = inventory.holds
    assert (hold.pod, hold.addresses) == (pod(1), ("192.0.2.7/24",))
    assert by_name(host.network.check_host())["attachments"].detail == "1 as plugins made them"
    assert hold.host_ports == (HostPort("udp", 53, 53, "127.0.0.1"),)
    host.network.detach(pod(1).sandbox_id, None)

    host.plugins({"fail": {"CHECK": {"code": 9, "msg": "link is missing"}}})
    host.network.attach(pod(2), new_namespace().netns())
    found = by_name(host.network.check_host())
    assert not found["attachments"].ok
    assert found["attachments"].detail.startswith("sandbox 000000000020: plugin one: CHECK: link is missing")
    host.network.detach(pod(2).sandbox_id, None)


@requires("cni")
def test_what_the_usual_plugins_need(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    ipam = {"type": "host-local", "subnet": "10.77.0.0/24"}
    plugins = [{"type": "bridge", "ipam": ipam}, {"type": "portmap"}]
    host.conf({"cniVersion": "1.0.0", "name": "bridged", "plugins": plugins})
    assert list(by_name(host.network.check_host())) == [
        *("configuration", "plugin bridge", "plugin host-local", "plugin portmap"),
        *("IPv4 forwarding", "IPv4 br_netfilter", "iptables", "attachments"),
    ]

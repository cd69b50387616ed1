"""The bridge network against the kernel: pods' traffic, and what becomes of records and links when things go wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_interface
from pathlib import Path

import pytest

from net import Attachment, HostPort, NetNs, PodIdentity, Wants, rtnetlink
from net.bridge.ipam import Lease, Leases
from net.errors import AlreadyExists, Exhausted, InvalidSpec, Unavailable, Unsupported, WrongState
from net.netlink import Channel
from net.netns import Pins
from tests.net.conftest import NewNetwork
from tests.net.namespaces import LinkWatch, Namespace, talk
from tests.requires import missing, requires

pytestmark = requires("root", "bridge", "ip")

NewNamespace = Callable[[], Namespace]


def pod(number: int) -> PodIdentity:
    return PodIdentity(
        sandbox_id=f"{number:011x}".ljust(64, "0"), name=f"p{number}", namespace="tests", uid=f"u{number}"
    )


def leases(root: Path) -> list[Lease]:
    records = Leases(root / "leases.db")
    try:
        return records.all()
    finally:
        records.close()


def ip(*arguments: str) -> list[dict[str, object]]:
    done = subprocess.run(["ip", "-j", "-d", *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout or "[]")  # type: ignore[no-any-return]


def test_pods_and_host_talk(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network()
    network.setup()
    first, second = new_namespace(), new_namespace()
    one = network.attach(pod(1), first.netns())
    two = network.attach(pod(2), second.netns())

    assert one.interface == "eth0"
    assert one.ips != two.ips
    assert talk(first, second, one.ips[0]) == two.ips[0]
    assert talk(first, None, one.ips[0]) == one.gateway
    assert talk(None, first, one.gateway) == one.ips[0]
    assert talk(first, first, "127.0.0.1") == "127.0.0.1"
    assert talk(first, first, one.ips[0]) == one.ips[0]


def test_what_a_pod_gets(new_network: NewNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    network = new_network(subnet="10.99.0.0/24")
    namespace = new_namespace()
    attachment = network.attach(pod(1), namespace.netns())

    assert attachment == Attachment(
        interface="eth0",
        addresses=("10.99.0.2/24",),
        gateway="10.99.0.1",
        mac="0a:58:0a:63:00:02",
        host_interface="veth00000000001",
    )
    assert network.attachment(pod(1).sandbox_id) == attachment
    links = namespace.links()
    assert links["lo"].up
    assert links["eth0"].up
    assert (links["eth0"].mac, links["eth0"].mtu) == (attachment.mac, 1400), "the MTU is the uplink's"
    inside = namespace.channel()
    assert list(rtnetlink.addresses(inside.dump(rtnetlink.all_addresses(6)))) == [
        (links["lo"].index, ip_interface("::1/128"))
    ], "no link-local address where IPv6 isn't used"
    (port,) = ip("link", "show", attachment.host_interface)
    assert port["master"] == network.bridge
    assert port["mtu"] == 1400
    assert port["inet6_addr_gen_mode"] == "none"
    assert port["linkinfo"]["info_slave_data"]["hairpin"] is True  # type: ignore[index]


@requires("nft")
def test_pods_reach_the_outside_masqueraded(
    new_network: NewNetwork, new_namespace: NewNamespace, outside: Namespace
) -> None:
    network = new_network()
    network.setup()
    namespace = new_namespace()
    network.attach(pod(1), namespace.netns())
    assert talk(outside, namespace, "198.51.100.2") == "198.51.100.1"
    assert network.status().ready


@requires("nft")
def test_without_masquerade_the_table_is_not_made(new_network: NewNetwork) -> None:
    network = new_network(masquerade=False)
    network.setup()
    assert network.status().ready
    assert "crib-t" not in subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout


@requires("nft")
def test_dual_stack(new_network: NewNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    network = new_network(subnet="10.99.0.0/24", subnet6="fd00:99::/64")
    first, second = new_namespace(), new_namespace()
    one = network.attach(pod(1), first.netns())
    two = network.attach(pod(2), second.netns())

    assert one.addresses == ("10.99.0.2/24", "fd00:99::2/64")
    assert one.gateway == "10.99.0.1"
    for family, position in ((socket.AF_INET, 0), (socket.AF_INET6, 1)):
        assert talk(first, second, one.ips[position], family) == two.ips[position]
    assert talk(first, None, one.ips[1], socket.AF_INET6) == "fd00:99::1"
    assert talk(outside, first, "2001:db8::2", socket.AF_INET6) == "2001:db8::1"
    assert talk(outside, first, "198.51.100.2") == "198.51.100.1"


@requires("nft")
def test_the_rules_as_nft_reads_them(new_network: NewNetwork) -> None:
    new_network(subnet="10.99.0.0/24", subnet6="fd00:99::/64").setup()
    listed = subprocess.run(["nft", "list", "table", "inet", "crib-t"], check=True, capture_output=True, text=True)
    masquerade = """masquerade fully-random comment "from {} to elsewhere: with this node's address\""""
    assert [line.strip() for line in listed.stdout.splitlines()] == [
        "table inet crib-t {",
        "chain postrouting {",
        "type nat hook postrouting priority srcnat; policy accept;",
        f"ip saddr 10.99.0.0/24 ip daddr != 10.99.0.0/24 {masquerade.format('10.99.0.0/24')}",
        f"ip6 saddr fd00:99::/64 ip6 daddr != fd00:99::/64 {masquerade.format('fd00:99::/64')}",
        "}",
        "}",
    ]


def test_instances_side_by_side(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    networks = [new_network(instance=name) for name in ("crib", "crib-one", "crib-two")]
    namespaces = [new_namespace() for _ in networks]
    got = [net.attach(pod(n), space.netns()) for n, (net, space) in enumerate(zip(networks, namespaces, strict=True))]
    assert len({attachment.gateway for attachment in got}) == 3
    assert talk(namespaces[0], namespaces[1], got[0].ips[0]) in (got[0].gateway, got[1].ips[0])
    networks[0].detach(pod(0).sandbox_id, None)
    networks[0].teardown()
    assert talk(namespaces[1], namespaces[2], got[1].ips[0]), "the others are untouched"


def test_hundred_pods_leave_nothing(new_network: NewNetwork, new_namespace: NewNamespace, tmp_path: Path) -> None:
    network = new_network()
    network.setup()
    namespaces = {number: new_namespace() for number in range(100)}
    with ThreadPoolExecutor(8) as executor:
        got = list(executor.map(lambda n: network.attach(pod(n), namespaces[n].netns()), namespaces))
    assert len({attachment.ips[0] for attachment in got}) == 100
    assert len(leases(tmp_path / "crib-t")) == 100
    with pytest.raises(WrongState, match="100 pods are attached"):
        network.teardown()
    with LinkWatch() as watch:
        for number, namespace in namespaces.items():
            network.detach(pod(number).sandbox_id, None)
            namespace.end()
        watch.gone(*(attachment.host_interface for attachment in got))
    network.status()
    assert leases(tmp_path / "crib-t") == []
    network.teardown()
    assert network.bridge not in {name for _, name in socket.if_nameindex()}


def test_detach_of_what_never_was(new_network: NewNetwork) -> None:
    network = new_network()
    network.detach("f" * 64, "/run/netns/none")
    assert network.attachment("f" * 64) is None


def test_an_address_is_free_only_when_the_link_is_gone(
    new_network: NewNetwork, new_namespace: NewNamespace, tmp_path: Path
) -> None:
    network = new_network(subnet="10.99.0.0/29")
    namespaces = [new_namespace() for _ in range(6)]
    got = [network.attach(pod(n), namespaces[n].netns()) for n in range(5)]
    with pytest.raises(Exhausted, match=r"10\.99\.0\.0/29: all 5 addresses are taken$"):
        network.attach(pod(5), namespaces[5].netns())

    network.detach(pod(3).sandbox_id, None)
    assert network.attachment(pod(3).sandbox_id) is None
    with pytest.raises(Exhausted, match="1 of them by pods whose namespaces still exist"):
        network.attach(pod(5), namespaces[5].netns())
    assert "eth0" not in namespaces[5].links(), "a failed attach leaves nothing"
    assert len(leases(tmp_path / "crib-t")) == 5

    with LinkWatch() as watch:
        namespaces[3].end()
        watch.gone(got[3].host_interface)
    assert network.attach(pod(5), namespaces[5].netns()).addresses == got[3].addresses


def test_a_namespace_deleted_behind_our_back(
    new_network: NewNetwork, new_namespace: NewNamespace, tmp_path: Path
) -> None:
    network = new_network()
    namespace = new_namespace()
    attachment = network.attach(pod(1), namespace.netns())
    with LinkWatch() as watch:
        namespace.end()
        watch.gone(attachment.host_interface)
    assert network.attachment(pod(1).sandbox_id) == attachment, "still the sandbox's until it is detached"
    network.detach(pod(1).sandbox_id, "/run/netns/gone")
    network.detach(pod(1).sandbox_id, "/run/netns/gone")
    assert leases(tmp_path / "crib-t") == []


def test_restart(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    before = new_network()
    first, second = new_namespace(), new_namespace()
    one = before.attach(pod(1), first.netns())
    before.close()

    after = new_network()
    assert after.attachment(pod(1).sandbox_id) == one
    after.setup()
    after.reconcile({pod(1).sandbox_id})
    two = after.attach(pod(2), second.netns())
    assert two.gateway == one.gateway
    assert two.ips != one.ips
    assert talk(first, second, one.ips[0]) == two.ips[0]


def test_attach_again_is_the_same(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network()
    namespace = new_namespace()
    one = network.attach(pod(1), namespace.netns())
    assert network.attach(pod(1), namespace.netns()) == one
    assert talk(namespace, None, one.ips[0]) == one.gateway


def test_crash_between_lease_and_link(new_network: NewNetwork, new_namespace: NewNamespace, tmp_path: Path) -> None:
    network = new_network()
    network.setup()
    records = Leases(tmp_path / "crib-t/leases.db")
    lease = records.take(pod(1), 100)
    records.take(pod(2), 100)
    records.close()

    restarted = new_network()
    restarted.reconcile({pod(1).sandbox_id})
    assert [lease.sandbox_id for lease in leases(tmp_path / "crib-t")] == [pod(1).sandbox_id]
    namespace = new_namespace()
    attachment = restarted.attach(pod(1), namespace.netns())
    assert attachment.ips[0].endswith(f".{lease.offset}"), "the lease is taken up"
    assert talk(namespace, None, attachment.ips[0]) == attachment.gateway


def test_crash_between_link_and_address(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network()
    namespace = new_namespace()
    attachment = network.attach(pod(1), namespace.netns())
    with namespace.channel() as inside:
        (index,) = (link.index for link in namespace.links().values() if link.name == "eth0")
        inside.do(rtnetlink.remove_address(index, ip_interface(attachment.addresses[0])))
    restarted = new_network()
    assert restarted.attach(pod(1), namespace.netns()) == attachment
    assert talk(namespace, None, attachment.ips[0]) == attachment.gateway


def test_a_new_namespace_for_the_same_sandbox(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network()
    old, new = new_namespace(), new_namespace()
    one = network.attach(pod(1), old.netns())
    assert network.attach(pod(1), new.netns()) == one
    assert "eth0" not in old.links()
    assert talk(new, None, one.ips[0]) == one.gateway


def test_reconcile_removes_what_nobody_knows(
    new_network: NewNetwork, new_namespace: NewNamespace, tmp_path: Path
) -> None:
    network = new_network()
    namespaces = [new_namespace() for _ in range(3)]
    for number, namespace in enumerate(namespaces):
        network.attach(pod(number), namespace.netns())
    records = Leases(tmp_path / "crib-t/leases.db")
    records.release(pod(2).sandbox_id)
    records.free(pod(2).sandbox_id)  # a link without a record
    records.close()

    new_network().reconcile({pod(0).sandbox_id})
    assert [len(space.links()) for space in namespaces] == [2, 1, 1]
    assert [lease.sandbox_id for lease in leases(tmp_path / "crib-t")] == [pod(0).sandbox_id]


def test_an_interface_that_is_already_there(
    new_network: NewNetwork, new_namespace: NewNamespace, pins: Pins, tmp_path: Path
) -> None:
    network = new_network()
    namespace = new_namespace()
    path = pins.pin(namespace.fd, "crowded")
    try:
        subprocess.run(["ip", "-n", "crowded", "link", "add", "eth0", "type", "bridge"], check=True)
        with pytest.raises(AlreadyExists, match="already has an interface eth0"):
            network.attach(pod(1), dataclasses.replace(namespace.netns(), path=path))
        assert leases(tmp_path / "crib-t") == []
        subprocess.run(["ip", "-n", "crowded", "link", "delete", "eth0"], check=True)
    finally:
        pins.unpin(path)
    subprocess.run("ip link add veth00000000001 type bridge".split(), check=True)
    try:
        with pytest.raises(Unavailable, match="veth00000000001"):
            network.attach(pod(1), namespace.netns())
        assert ip("link", "show", "veth00000000001"), "someone else's stays"
    finally:
        subprocess.run("ip link delete veth00000000001".split(), check=True)


def test_other_devices_in_the_namespace(new_network: NewNetwork, new_namespace: NewNamespace, pins: Pins) -> None:
    """As where modules of tunnels are loaded: eth0 is not number 2."""
    network = new_network()
    namespace = new_namespace()
    path = pins.pin(namespace.fd, "tunnels")
    try:
        subprocess.run(["ip", "-n", "tunnels", "link", "add", "tunl0", "type", "bridge"], check=True)
        attachment = network.attach(pod(1), namespace.netns())
        assert talk(namespace, None, attachment.ips[0]) == attachment.gateway
    finally:
        pins.unpin(path)


def test_a_pod_cannot_be_anothers_ipv6_router(new_network: NewNetwork, new_namespace: NewNamespace, pins: Pins) -> None:
    network = new_network(subnet6="fd00:99::/64")
    namespace = new_namespace()
    path = pins.pin(namespace.fd, "guarded")
    try:
        for name, value in network.pod_sysctls.items():
            inside(path, f"echo {value} > /proc/sys/{name.replace('.', '/')}")
        network.attach(pod(1), namespace.netns())
        assert inside(path, "cat /proc/sys/net/ipv6/conf/eth0/accept_ra") == "0\n"
        accepts = Path("/proc/sys/net/ipv6/conf", network.bridge, "accept_ra")
        assert accepts.read_text() == "0\n", "nor the host's"
    finally:
        pins.unpin(path)


def inside(path: str, command: str) -> str:
    arguments = ["nsenter", f"--net={path}", "sh", "-euc", command]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def test_a_bridges_name_with_a_dot(new_network: NewNetwork) -> None:
    network = new_network(bridge="cr.ib")
    network.setup()
    assert network.status().ready
    assert ip("link", "show", "cr.ib")


@pytest.mark.parametrize("kind", ["bridge", "veth"])
def test_a_bridge_that_is_someone_elses(new_network: NewNetwork, kind: str) -> None:
    subprocess.run(["ip", "link", "add", "theirs", "type", kind], check=True)
    try:
        network = new_network(bridge="theirs")
        with pytest.raises(Unavailable, match=f"interface theirs \\({kind}, .* is not crib's"):
            network.setup()
        status = network.status()
        assert not status.ready
        assert "theirs" in status.message
        network.teardown()
        assert ip("link", "show", "theirs")
    finally:
        subprocess.run(["ip", "link", "delete", "theirs"], check=True)


def test_a_configured_subnet_that_is_in_use(new_network: NewNetwork, outside: Namespace) -> None:
    with pytest.raises(Unavailable, match=r"subnet 198\.51\.0\.0/16: overlaps 198\.51\.100\.0/24 of up0"):
        new_network(subnet="198.51.0.0/16").setup()


def test_a_free_subnet_is_chosen_and_kept(new_network: NewNetwork) -> None:
    subprocess.run("ip link add taken type bridge".split(), check=True)
    try:
        subprocess.run("ip address add 10.88.7.1/24 dev taken".split(), check=True)
        subprocess.run("ip link set taken up".split(), check=True)
        subprocess.run("ip route add 10.89.0.0/20 dev taken".split(), check=True)
        network = new_network(instance="crib")
        network.setup()
        assert ip("address", "show", "crib0")[0]["addr_info"][0]["local"] == "10.90.0.1"  # type: ignore[index]
        network.teardown()
    finally:
        subprocess.run("ip link delete taken".split(), check=True)
    again = new_network(instance="crib")
    again.setup()
    assert ip("address", "show", "crib0")[0]["addr_info"][0]["local"] == "10.90.0.1"  # type: ignore[index]


def test_the_subnet_changes_only_without_pods(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network(subnet="10.99.0.0/24")
    namespace = new_namespace()
    attachment = network.attach(pod(1), namespace.netns())
    changed = new_network(subnet="10.98.0.0/24")
    with pytest.raises(Unavailable, match=r"pods still have addresses of 10\.99\.0\.0/24"):
        changed.setup()
    changed.detach(pod(1).sandbox_id, None)
    with LinkWatch() as watch:
        namespace.end()
        watch.gone(attachment.host_interface)
    changed.detach(pod(1).sandbox_id, None)
    changed.setup()
    assert ip("address", "show", changed.bridge)[0]["addr_info"][0]["local"] == "10.98.0.1"  # type: ignore[index]


@requires("nft")
def test_what_others_remove_is_put_back(
    new_network: NewNetwork, new_namespace: NewNamespace, outside: Namespace
) -> None:
    network = new_network()
    first, second = new_namespace(), new_namespace()
    one = network.attach(pod(1), first.netns())
    subprocess.run(["ip", "link", "delete", network.bridge], check=True)
    two = network.attach(pod(2), second.netns())
    assert talk(first, second, one.ips[0]) == two.ips[0]
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    subprocess.run(["ip", "link", "delete", network.bridge], check=True)
    assert network.status().ready
    assert talk(outside, first, "198.51.100.2") == "198.51.100.1"
    assert talk(second, None, two.ips[0]) == two.gateway


def test_the_link_of_another_pod_with_a_like_id_stays(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network()
    first, second = new_namespace(), new_namespace()
    one = network.attach(pod(1), first.netns())
    twin = dataclasses.replace(pod(1), sandbox_id=pod(1).sandbox_id[:-1] + "f")
    with pytest.raises(Unavailable, match=one.host_interface):
        network.attach(twin, second.netns())
    assert talk(first, None, one.ips[0]) == one.gateway


@requires("nft")
def test_a_firewall_that_drops_is_told(new_network: NewNetwork) -> None:
    network = new_network()
    rules = "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }"
    subprocess.run(["nft", rules], check=True)
    try:
        status = network.status()
        assert status.ready
        assert status.reason == "FirewallDropsForwarded"
        assert "ip filter FORWARD" in status.message
    finally:
        subprocess.run(["nft", "delete table ip filter"], check=True)
    assert network.status().message == ""


def test_a_kernel_without_nftables(new_network: NewNetwork, new_namespace: NewNamespace, tmp_path: Path) -> None:
    if "not supported" not in (missing("nft") or ""):
        pytest.skip("this kernel has nftables")
    network = new_network(masquerade=True)
    network.setup()
    status = network.status()
    assert not status.ready
    assert status.reason == "NoMasquerade"
    assert re.match(r"the kernel (has no|lacks a part of) nftables", status.message)
    namespace = new_namespace()
    attachment = network.attach(pod(1), namespace.netns())
    assert talk(namespace, None, attachment.ips[0]) == attachment.gateway
    with pytest.raises(Unsupported, match=r"the kernel (has no|lacks a part of) nftables"):
        network.attach(pod(2), new_namespace().netns(), Wants(host_ports=(HostPort("tcp", 8080, 80),)))
    assert [lease.sandbox_id for lease in leases(tmp_path / "crib-t")] == [pod(1).sandbox_id]
    (found,) = (one for one in network.check_host() if one.name == "nftables")
    assert not found.ok
    with pytest.raises(Unsupported, match="nftables"):
        network.attach(pod(2), new_namespace().netns(), Wants(host_ports=(HostPort("tcp", 18099, 80),)))
    assert network.attachment(pod(2).sandbox_id) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bridge": "a-name-that-is-too-long"}, "network.bridge"),
        ({"bridge": "a/b"}, "network.bridge"),
        ({"subnet": "10.1.2.3/16"}, "host bits"),
        ({"subnet": "fd00::/64"}, "not IPv4"),
        ({"subnet": "10.0.0.0/31"}, "no room"),
        ({"subnet6": "10.0.0.0/16"}, "not IPv6"),
        ({"mtu": 10}, "network.mtu 10"),
    ],
)
def test_configuration_that_cannot_work(new_network: NewNetwork, config: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        new_network(**config)


def test_attach_needs_the_namespaces_socket(new_network: NewNetwork) -> None:
    with pytest.raises(InvalidSpec, match="tests/p1"):
        new_network().attach(pod(1), NetNs(path="/run/netns/x", fd=0, rtnl=None))


def test_a_closed_namespace_descriptor(new_network: NewNetwork, new_namespace: NewNamespace, tmp_path: Path) -> None:
    network = new_network()
    namespace = new_namespace()
    with pytest.raises(Unavailable, match="pod tests/p1"):
        network.attach(pod(1), dataclasses.replace(namespace.netns(), fd=1 << 20))
    assert leases(tmp_path / "crib-t") == []
    with Channel() as channel:
        assert channel.get(rtnetlink.one_link("veth00000000001")) == []

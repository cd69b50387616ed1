"""Host ports of the built-in network: from everywhere, by every protocol, and not where they must not lead."""

from __future__ import annotations

import contextlib
import errno
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from net import HostPort, Wants
from net.bridge import BridgeNetwork
from net.bridge.ipam import Leases
from net.errors import AlreadyExists, InvalidSpec
from tests.limits import scaled
from tests.net.conftest import NewNetwork
from tests.net.given import NewNamespace, inside, nft, pod
from tests.net.namespaces import Namespace, pinned
from tests.requires import requires

pytestmark = requires("root", "bridge", "ip", "nft")

SUBNETS = {"subnet": "10.99.0.0/24", "subnet6": "fd00:99::/64"}


def ports(*given: tuple[str, int, int] | tuple[str, int, int, str]) -> Wants:
    return Wants(host_ports=tuple(HostPort(*one) for one in given))


def made(where: Namespace | None, family: int, kind: int, protocol: int = 0) -> socket.socket:
    if where:
        return where.socket(family, kind, protocol)
    found = socket.socket(family, kind, protocol)
    found.settimeout(scaled(10))
    return found


def reach(
    client: Namespace | None,
    address: str,
    port: int,
    server: Namespace,
    at: int = 80,
    kind: int = socket.SOCK_STREAM,
    protocol: int = 0,
) -> str:
    """Ask from `client` for address and port, answer in `server` on port `at`; the client's address as seen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with made(server, family, kind, protocol) as answering, made(client, family, kind, protocol) as asking:
        answering.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        answering.bind(("", at))
        if kind == socket.SOCK_DGRAM:
            asking.connect((address, port))
            asking.send(b"ping")
            message, peer = answering.recvfrom(16)
            answering.sendto(message, peer)
            assert asking.recv(16) == b"ping"
            return str(peer[0])
        answering.listen(1)
        asking.connect((address, port))
        accepted, peer = answering.accept()
        with accepted:
            accepted.settimeout(scaled(10))
            asking.sendall(b"ping")
            assert accepted.recv(16) == b"ping"
            accepted.sendall(b"pong")
            assert asking.recv(16) == b"pong"
        return str(peer[0])


def refused(client: Namespace | None, address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with made(client, family, socket.SOCK_STREAM) as asking:
        return asking.connect_ex((address, port)) == errno.ECONNREFUSED


@pytest.fixture
def network(new_network: NewNetwork) -> BridgeNetwork:
    return new_network(**SUBNETS)


def test_from_everywhere(network: BridgeNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    server, other = new_namespace(), new_namespace()
    one = network.attach(pod(1), server.netns(), ports(("tcp", 8080, 80)))
    two = network.attach(pod(2), other.netns())

    assert reach(outside, "198.51.100.1", 8080, server) == "198.51.100.2", "the client's own address"
    assert reach(None, "198.51.100.1", 8080, server) == "198.51.100.1"
    assert reach(None, "127.0.0.1", 8080, server) == one.gateway
    assert reach(None, "127.1.2.3", 8080, server) == one.gateway
    assert reach(other, "198.51.100.1", 8080, server) == one.gateway, "so that the answer takes the same way"
    assert reach(other, one.gateway, 8080, server) == one.gateway
    assert reach(server, "198.51.100.1", 8080, server) == one.gateway, "the pod itself"
    assert reach(other, one.ips[0], 80, server) == two.ips[0], "what asks for no host port is not masqueraded"

    assert reach(outside, "2001:db8::1", 8080, server) == "2001:db8::2"
    assert reach(None, "2001:db8::1", 8080, server) == "2001:db8::1"
    assert reach(other, "2001:db8::1", 8080, server) == "fd00:99::1"
    assert reach(server, "2001:db8::1", 8080, server) == "fd00:99::1"
    assert refused(None, "::1", 8080), "the kernel can't send it on: refused at once, not lost"
    assert refused(outside, "198.51.100.1", 8081)

    network.detach(pod(1).sandbox_id, None)
    assert refused(outside, "198.51.100.1", 8080)
    assert refused(None, "127.0.0.1", 8080)


def test_udp(network: BridgeNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    server, other = new_namespace(), new_namespace()
    one = network.attach(pod(1), server.netns(), ports(("udp", 5353, 53)))
    network.attach(pod(2), other.netns())
    for address, seen in (("198.51.100.1", "198.51.100.2"), ("2001:db8::1", "2001:db8::2")):
        assert reach(outside, address, 5353, server, 53, socket.SOCK_DGRAM) == seen
    assert reach(None, "127.0.0.1", 5353, server, 53, socket.SOCK_DGRAM) == one.gateway
    assert reach(other, "198.51.100.1", 5353, server, 53, socket.SOCK_DGRAM) == one.gateway
    assert reach(server, "198.51.100.1", 5353, server, 53, socket.SOCK_DGRAM) == one.gateway


@requires("sctp")
def test_sctp(network: BridgeNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    server = new_namespace()
    network.attach(pod(1), server.netns(), ports(("sctp", 9090, 90)))
    for address, seen in (("198.51.100.1", "198.51.100.2"), ("2001:db8::1", "2001:db8::2")):
        assert reach(outside, address, 9090, server, 90, protocol=socket.IPPROTO_SCTP) == seen


def test_udp_of_a_client_that_goes_on_sending(
    network: BridgeNetwork, new_namespace: NewNamespace, outside: Namespace
) -> None:
    """What the kernel remembers of a connection must not outlive the port's change of hands."""
    first, second = new_namespace(), new_namespace()
    with outside.socket(kind=socket.SOCK_DGRAM) as asking:
        asking.connect(("198.51.100.1", 5353))
        asking.send(b"nobody there")
        with pytest.raises(ConnectionRefusedError):
            asking.recv(16)
        for number, server in ((1, first), (2, second)):
            network.attach(pod(number), server.netns(), ports(("udp", 5353, 53)))
            with server.socket(kind=socket.SOCK_DGRAM) as answering:
                answering.bind(("", 53))
                asking.send(b"ping")
                assert answering.recv(16) == b"ping"
            network.detach(pod(number).sandbox_id, None)


def test_a_host_address(network: BridgeNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    first, second = new_namespace(), new_namespace()
    network.setup()
    subprocess.run("ip address add 198.51.100.9/24 dev up0".split(), check=True)
    network.attach(pod(1), first.netns(), ports(("tcp", 8080, 80, "198.51.100.9"), ("tcp", 8080, 80, "127.0.0.1")))
    network.attach(pod(2), second.netns(), ports(("tcp", 8080, 80, "198.51.100.1"), ("tcp", 8080, 80, "2001:db8::1")))
    assert reach(outside, "198.51.100.9", 8080, first)
    assert reach(None, "127.0.0.1", 8080, first)
    assert reach(outside, "198.51.100.1", 8080, second)
    assert reach(outside, "2001:db8::1", 8080, second)
    assert refused(None, "127.0.0.2", 8080)
    assert refused(outside, f"{outside_gateway(network)}", 8080)


def outside_gateway(network: BridgeNetwork) -> str:
    """The bridge's own address; the host beyond has its default route by way of us."""
    attachment = network.attachment(pod(1).sandbox_id)
    assert attachment
    subprocess.run("ip -n outside route replace default via 198.51.100.1".split(), check=True)
    return attachment.gateway


def test_conflicts(network: BridgeNetwork, new_namespace: NewNamespace, tmp_path: Path) -> None:
    first, second = new_namespace(), new_namespace()
    network.attach(pod(1), first.netns(), ports(("tcp", 8080, 80), ("tcp", 8081, 80, "127.0.0.1")))
    network.attach(pod(1), first.netns(), ports(("tcp", 8080, 80), ("tcp", 8081, 80, "127.0.0.1")))
    for wanted, text in (
        (("tcp", 8080, 90), "host port 8080/tcp: pod tests/p1 has it"),
        (("tcp", 8080, 90, "127.0.0.1"), "host port 127.0.0.1:8080/tcp: pod tests/p1 has it"),
        (("tcp", 8080, 90, "::"), "8080/tcp: pod tests/p1 has it"),
        (("tcp", 8081, 90), "host port 8081/tcp: pod tests/p1 has it"),
    ):
        with pytest.raises(AlreadyExists, match=text.replace("[", r"\[")):
            network.attach(pod(2), second.netns(), ports(wanted))
    with contextlib.closing(Leases(tmp_path / "crib-t/leases.db")) as records:
        assert [lease.sandbox_id for lease in records.all()] == [pod(1).sandbox_id], "a refusal takes no address"
    network.attach(pod(2), second.netns(), ports(("udp", 8080, 80), ("tcp", 8081, 80, "198.51.100.1")))
    assert reach(None, "127.0.0.1", 8080, first)

    network.detach(pod(1).sandbox_id, None)
    network.attach(pod(3), new_namespace().netns(), ports(("tcp", 8080, 80)))


@pytest.mark.parametrize(("kind", "protocol"), [(socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")])
def test_a_port_that_a_process_has(
    network: BridgeNetwork, new_namespace: NewNamespace, kind: int, protocol: str
) -> None:
    namespace = new_namespace()
    with socket.socket(type=kind) as theirs:
        theirs.bind(("127.0.0.1", 8080))
        if kind == socket.SOCK_STREAM:
            theirs.listen(1)
        with pytest.raises(AlreadyExists, match=f"host port 8080/{protocol}: a process of this node has it"):
            network.attach(pod(1), namespace.netns(), ports((protocol, 8080, 80)))
    network.attach(pod(1), namespace.netns(), ports((protocol, 8080, 80)))


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (("tcp", 80, 80, "::1"), r"host port \[::1\]:80/tcp: the kernel can't lead \[::1\] to a pod; use 127\.0\.0\.1"),
        (("tcp", 80, 80, "2001:db8::1"), "pods have no IPv6 address here"),
        (("icmp", 80, 80), "not tcp, udp or sctp"),
    ],
)
def test_ports_that_cannot_be(
    new_network: NewNetwork, new_namespace: NewNamespace, wanted: tuple[str, int, int], text: str
) -> None:
    with pytest.raises(InvalidSpec, match=text):
        new_network().attach(pod(1), new_namespace().netns(), ports(wanted))


@pytest.fixture
def neighbour(outside: Namespace) -> Iterator[Namespace]:
    """The host beyond, with a route for 127.0.0.0/8 by way of this one."""
    with pinned(outside, "neighbour") as path:
        inside(path, "ip route add 127.0.0.0/8 via 198.51.100.1")  # its lo is down
        yield outside


def test_nobody_else_reaches_127_0_0_1(
    network: BridgeNetwork, new_namespace: NewNamespace, neighbour: Namespace
) -> None:
    """CVE-2020-8558: route_localnet lets a neighbour, or a pod, talk to what listens on 127.0.0.1 alone."""
    server, bad = new_namespace(), new_namespace()
    network.attach(pod(1), server.netns(), ports(("tcp", 8080, 80), ("udp", 8080, 80)))
    network.attach(pod(2), bad.netns())
    localnet = Path("/proc/sys/net/ipv4/conf")
    assert Path(localnet, network.bridge, "route_localnet").read_text() == "1\n"
    for link in ("all", "default", "lo", "up0"):
        assert Path(localnet, link, "route_localnet").read_text() == "0\n", link

    with pinned(bad, "bad") as path:
        inside(path, "ip address delete 127.0.0.1/8 dev lo; ip route add 127.0.0.0/8 via 10.99.0.1")
        with socket.socket(type=socket.SOCK_DGRAM) as listening, socket.socket(type=socket.SOCK_DGRAM) as fair:
            listening.bind(("127.0.0.1", 0))
            listening.settimeout(scaled(10))
            for attacker in (bad, neighbour):
                for port in (listening.getsockname()[1], 8080):
                    with attacker.socket(kind=socket.SOCK_DGRAM) as asking:
                        asking.sendto(b"attack", ("127.0.0.1", port))
            fair.sendto(b"fair", listening.getsockname())
            assert listening.recv(16) == b"fair", "the attacks came before, if they came at all"
            nft("flush", "chain", "inet", "crib-t", "guard")
            with bad.socket(kind=socket.SOCK_DGRAM) as asking:
                asking.sendto(b"attack", listening.getsockname())
            assert listening.recv(16) == b"attack", "a check of the check: it does arrive where nothing guards"


def test_the_rules_as_nft_reads_them(network: BridgeNetwork, new_namespace: NewNamespace) -> None:
    network.attach(pod(1), new_namespace().netns(), ports(("tcp", 8080, 80), ("udp", 53, 53, "127.0.0.1")))
    listed = nft("list", "table", "inet", "crib-t")
    for line in (
        "elements = { tcp . 8080 : 10.99.0.2 . 80 }",
        "elements = { tcp . 8080 : fd00:99::2 . 80 }",
        "elements = { 127.0.0.1 . udp . 53 : 10.99.0.2 . 53 }",
        'iif != "lo" ip daddr 127.0.0.0/8 drop',
        'iif != "lo" ip saddr 127.0.0.0/8 drop',
        "dnat ip to ip daddr . meta l4proto . th dport map @ports4_at",
        "dnat ip to meta l4proto . th dport map @ports4",
        "ip6 daddr != ::1 dnat ip6 to meta l4proto . th dport map @ports6",
        "fib daddr type local jump hostports",
        'ip saddr 127.0.0.0/8 oifname "crib-t" masquerade fully-random',
    ):
        assert line in listed, listed
    network.detach(pod(1).sandbox_id, None)
    assert "elements" not in nft("list", "table", "inet", "crib-t")


def test_rules_come_back(network: BridgeNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    first, second = new_namespace(), new_namespace()
    network.attach(pod(1), first.netns(), ports(("tcp", 8080, 80)))
    nft("flush", "ruleset")
    assert network.status().ready
    assert reach(outside, "198.51.100.1", 8080, first)
    nft("flush", "ruleset")
    network.attach(pod(2), second.netns(), ports(("tcp", 8081, 80)))
    assert reach(outside, "198.51.100.1", 8080, first)
    assert reach(outside, "198.51.100.1", 8081, second)
    nft("flush", "ruleset")
    network.detach(pod(2).sandbox_id, None)
    subprocess.run(["ip", "link", "delete", network.bridge], check=True)
    assert network.status().ready
    assert reach(None, "127.0.0.1", 8080, first)
    assert refused(outside, "198.51.100.1", 8081)


def test_restart(new_network: NewNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    namespace = new_namespace()
    before = new_network(**SUBNETS)
    before.attach(pod(1), namespace.netns(), ports(("tcp", 8080, 80)))
    before.attach(pod(2), new_namespace().netns(), ports(("tcp", 8081, 80)))
    before.close()
    nft("flush", "ruleset")
    after = new_network(**SUBNETS)
    after.setup()
    after.reconcile({pod(1).sandbox_id})
    assert reach(outside, "198.51.100.1", 8080, namespace)
    assert refused(outside, "198.51.100.1", 8081)
    with pytest.raises(AlreadyExists, match="8080/tcp"):
        after.attach(pod(3), new_namespace().netns(), ports(("tcp", 8080, 80)))


def test_without_masquerade(new_network: NewNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    network = new_network(masquerade=False)
    namespace = new_namespace()
    network.attach(pod(1), namespace.netns(), ports(("tcp", 8080, 80)))
    assert reach(outside, "198.51.100.1", 8080, namespace) == "198.51.100.2"
    nft("flush", "ruleset")
    assert network.status().ready
    assert reach(outside, "198.51.100.1", 8080, namespace) == "198.51.100.2"
    localnet = Path("/proc/sys/net/ipv4/conf", network.bridge, "route_localnet")
    assert localnet.read_text() == "1\n"
    network.detach(pod(1).sandbox_id, None)
    assert nft("list", "tables") == "", "nothing is in it any more"
    assert localnet.read_text() == "0\n"
    assert network.status().ready
    network.attach(pod(2), new_namespace().netns(), ports(("tcp", 8080, 80)))
    assert "8080" in nft("list", "table", "inet", "crib-t")


def test_a_thousand_ports(network: BridgeNetwork, new_namespace: NewNamespace, outside: Namespace) -> None:
    namespace = new_namespace()
    network.attach(pod(1), namespace.netns(), ports(*(("tcp", 10000 + n, 80) for n in range(1000))))
    assert reach(outside, "198.51.100.1", 10999, namespace)
    network.detach(pod(1).sandbox_id, None)
    assert "elements" not in nft("list", "table", "inet", "crib-t")


def test_leases_of_the_first_format(tmp_path: Path) -> None:
    path = tmp_path / "leases.db"
    Leases(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("DROP TABLE host_port; PRAGMA user_version = 1")
    with contextlib.closing(Leases(path)) as records:
        assert records.record_subnets([IPv4Network("10.99.0.0/24")])
        records.take(pod(1), 10, [HostPort("tcp", 80, 80)])
        assert [str(port) for _, port in records.ports()] == ["80/tcp"]

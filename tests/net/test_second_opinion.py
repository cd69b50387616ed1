"""Every netlink message that net/ packs by hand, read by pyroute2; and the kernel's state as pyroute2 reads it back."""

from __future__ import annotations

import struct
from collections import Counter
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.nfnetlink import nfctsocket, nftsocket
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.nsidmsg import nsidmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from net import HostPort, NetNs, Wants, nftables, rtnetlink, shaping, statistics
from net.bridge import conntrack, nat
from net.bridge.nat import OpenPort
from net.netlink import Channel, Reply, Request
from tests.net.conftest import NewNetwork
from tests.net.given import NewNamespace, pod
from tests.net.namespaces import pinned, talk
from tests.requires import requires

CREATE, EXCL, REPLACE, APPEND = 0x400, 0x200, 0x100, 0x800
RTNL = {16: ifinfmsg, 17: ifinfmsg, 18: ifinfmsg, 20: ifaddrmsg, 21: ifaddrmsg, 22: ifaddrmsg, 24: rtmsg, 26: rtmsg}
RTNL |= {36: tcmsg, 88: nsidmsg, 90: nsidmsg}
NFT = {0: nftsocket.nft_table_msg, 1: nftsocket.nft_table_msg, 2: nftsocket.nft_table_msg}
NFT |= {3: nftsocket.nft_chain_msg, 6: nftsocket.nft_rule_msg, 9: nftsocket.nft_set_msg}
NFT |= {12: nftsocket.nft_set_elem_list_msg, 14: nftsocket.nft_set_elem_list_msg}


def told(request: Request) -> dict[str, Any]:
    """The message as pyroute2 understands it: header fields and attributes, nested ones as well, by name."""
    subsystem, kind = request.kind >> 8, request.kind & 0xFF
    reader = {0: RTNL, 1: {1: nfctsocket.nfct_msg, 2: nfctsocket.nfct_msg}, 10: NFT}[subsystem][kind]
    length = 16 + len(request.body)
    message = reader(struct.pack("=IHHII", length, request.kind, request.flags, 1, 0) + request.body)
    message.decode()
    assert message["header"]["length"] == length
    found: dict[str, Any] = plain(message)
    return found | {"flags_of_message": request.flags}


def plain(value: Any) -> Any:
    if isinstance(value, dict) and "attrs" in value:
        found = {key: plain(one) for key, one in value.items() if key not in ("attrs", "header")}
        for name, *one in value["attrs"]:
            assert name not in found, f"{name} twice"
            found[name] = plain(one[0])
        return found
    return [plain(one) for one in value] if isinstance(value, list) else value


def has(found: dict[str, Any], **wanted: object) -> None:
    assert {key: found.get(key) for key in wanted} == wanted


def test_links() -> None:
    found = told(rtnetlink.make_bridge("br0", "02:58:00:00:00:01", 1400))
    has(found, flags=0, IFLA_IFNAME="br0", IFLA_ADDRESS="02:58:00:00:00:01", IFLA_MTU=1400)
    has(found, flags_of_message=CREATE | EXCL)
    has(found["IFLA_LINKINFO"], IFLA_INFO_KIND="bridge")

    macs = {"mac": "06:58:0a:58:00:05", "peer_mac": "0a:58:0a:58:00:05"}
    found = told(rtnetlink.make_veth(name="v0", master=7, mtu=1400, peer_netns=9, peer_name="eth0", **macs))
    has(found, flags=0, index=0, IFLA_IFNAME="v0", IFLA_ADDRESS=macs["mac"], IFLA_MTU=1400, IFLA_MASTER=7)
    has(found, IFLA_NUM_TX_QUEUES=1, IFLA_NUM_RX_QUEUES=1, flags_of_message=CREATE | EXCL)
    has(found["IFLA_LINKINFO"], IFLA_INFO_KIND="veth")
    peer = found["IFLA_LINKINFO"]["IFLA_INFO_DATA"]["VETH_INFO_PEER"]
    has(peer, flags=0, index=0, IFLA_IFNAME="eth0", IFLA_ADDRESS=macs["peer_mac"], IFLA_MTU=1400, IFLA_NET_NS_FD=9)

    found = told(rtnetlink.bridge_port("v0"))
    has(found["IFLA_LINKINFO"], IFLA_INFO_SLAVE_KIND="bridge", IFLA_INFO_SLAVE_DATA={"IFLA_BRPORT_MODE": 1})
    has(found["IFLA_AF_SPEC"]["AF_INET6"], IFLA_INET6_ADDR_GEN_MODE=1)
    has(told(rtnetlink.no_link_local("v0"))["IFLA_AF_SPEC"]["AF_INET6"], IFLA_INET6_ADDR_GEN_MODE=1)
    has(told(rtnetlink.up("v0")), flags=1, change=1, IFLA_IFNAME="v0", flags_of_message=0)
    has(told(rtnetlink.set_mtu("v0", 9000)), flags=0, change=0, IFLA_IFNAME="v0", IFLA_MTU=9000)
    has(told(rtnetlink.set_master("v0", 3)), IFLA_IFNAME="v0", IFLA_MASTER=3)
    has(told(rtnetlink.remove_link("v0")), IFLA_IFNAME="v0", flags_of_message=0)
    for asked in (rtnetlink.one_link("v0"), rtnetlink.all_links()):
        has(told(asked), IFLA_EXT_MASK=8, index=0)


def test_addresses_and_routes() -> None:
    four, six = ip_interface("10.88.0.5/16"), ip_interface("fd00::5/64")
    found = told(rtnetlink.add_address(2, four))
    has(found, family=2, prefixlen=16, flags=0, index=2, scope=0, flags_of_message=CREATE | REPLACE)
    has(found, IFA_LOCAL="10.88.0.5", IFA_ADDRESS="10.88.0.5", IFA_BROADCAST="10.88.255.255")
    has(told(rtnetlink.add_address(2, six)), family=10, prefixlen=64, flags=2, IFA_ADDRESS="fd00::5")
    has(told(rtnetlink.remove_address(2, four)), IFA_LOCAL="10.88.0.5", index=2, flags_of_message=0)
    has(told(rtnetlink.all_addresses(6)), family=10)
    found = told(rtnetlink.default_route(2, ip_address("10.88.0.1")))
    has(found, family=2, dst_len=0, table=254, proto=3, scope=0, type=1, RTA_GATEWAY="10.88.0.1", RTA_OIF=2)
    has(told(rtnetlink.default_route(2, ip_address("fd00::1"))), family=10, RTA_GATEWAY="fd00::1")
    has(told(rtnetlink.all_routes(4)), family=2, table=0)


def test_rates() -> None:
    found = told(shaping.limit_rate(2, 80_000_000, 1500))
    has(found, index=2, handle=0x10000, parent=0xFFFFFFFF, TCA_KIND="tbf", flags_of_message=CREATE | REPLACE)
    parameters = found["TCA_OPTIONS"]["TCA_TBF_PARMS"]
    has(parameters, rate=10_000_000, peak=0, limit=1_100_000, rate___reserved=1)  # the link layer: Ethernet


def test_identities_of_namespaces() -> None:
    class Recording(Channel):
        sent: list[Request]

        def __init__(self) -> None:
            self.sent = []

        def do(self, *requests: Request) -> None:
            self.sent += requests

        def get(self, request: Request) -> list[Reply]:
            self.sent.append(request)
            return [Reply(0, bytes(4) + struct.pack("=HHi", 8, 1, 5))]

    channel = Recording()
    assert statistics._id(channel, 7) == struct.pack("=i", 5)
    given, asked = map(told, channel.sent)
    has(given, NETNSA_NSID=0xFFFFFFFF, NETNSA_FD=7)
    has(asked, NETNSA_FD=7)


SUBNETS = [ip_network("10.99.0.0/24"), ip_network("fd00:99::/64")]
PORTS = [
    OpenPort(HostPort("tcp", 8080, 80), (SUBNETS[0][2], SUBNETS[1][2])),
    OpenPort(HostPort("udp", 53, 5353, "192.0.2.1"), (SUBNETS[0][2], SUBNETS[1][2])),
]


def test_a_table() -> None:
    requests = nat.table("crib", "crib0", SUBNETS, masquerade=True, ports=PORTS)
    assert all(request.body[:1] == b"\1" for request in requests), "family inet"
    kinds = [request.kind & 0xFF for request in requests]
    assert kinds[:3] == [0, 2, 0], "made, removed, made: empty whatever there was"
    assert Counter(kinds) == {0: 2, 2: 1, 9: 6, 3: 5, 6: 13, 12: 5}
    found = [told(request) for request in requests]
    chains = {one["NFTA_CHAIN_NAME"]: one for one in found if "NFTA_CHAIN_NAME" in one}
    hooks = {
        name: (one["NFTA_CHAIN_TYPE"], *(one["NFTA_CHAIN_HOOK"][f"NFTA_HOOK_{key}"] for key in ("HOOKNUM", "PRIORITY")))
        for name, one in chains.items()
        if "NFTA_CHAIN_HOOK" in one
    }
    assert hooks == {
        "guard": ("filter", 0, -300),
        "prerouting": ("nat", 0, -100),
        "output": ("nat", 3, -100),
        "postrouting": ("nat", 4, 100),
    }
    sets = {one["NFTA_SET_NAME"]: one for one in found if "NFTA_SET_NAME" in one}
    has(sets["ports4"], NFTA_SET_KEY_LEN=8, NFTA_SET_DATA_LEN=8, NFTA_SET_FLAGS=frozenset({"NFT_SET_MAP"}))
    has(sets["ports6_at"], NFTA_SET_KEY_LEN=24, NFTA_SET_DATA_LEN=20)
    has(sets["targets6"], NFTA_SET_KEY_LEN=24, NFTA_SET_FLAGS=frozenset())
    assert len({one["NFTA_SET_ID"] for one in sets.values()}) == 6
    rules = [one for one in found if "NFTA_RULE_CHAIN" in one]
    assert all(one["flags_of_message"] == CREATE | APPEND and one["NFTA_RULE_USERDATA"] for one in rules)
    last = {one["NFTA_RULE_USERDATA"]: one["NFTA_RULE_EXPRESSIONS"][-1] for one in rules}
    drop = last["to 127.0.0.0/8 from a link: dropped"]["NFTA_EXPR_DATA"]
    has(drop["NFTA_IMMEDIATE_DATA"]["NFTA_DATA_VERDICT"], NFTA_VERDICT_CODE="NF_DROP")
    jump = last["to this node: maybe to a host port"]["NFTA_EXPR_DATA"]["NFTA_IMMEDIATE_DATA"]["NFTA_DATA_VERDICT"]
    has(jump, NFTA_VERDICT_CODE="NFT_JUMP", NFTA_VERDICT_CHAIN="hostports")
    to = last["to a host port of one address, IPv6"]
    has(to, NFTA_EXPR_NAME="nat")
    has(to["NFTA_EXPR_DATA"], NFTA_NAT_TYPE="NFT_NAT_DNAT", NFTA_NAT_FAMILY=10)
    has(to["NFTA_EXPR_DATA"], NFTA_NAT_REG_ADDR_MIN="NFT_REG_1", NFTA_NAT_REG_PROTO_MIN="NFT_REG32_04")
    masquerade = last["from 10.99.0.0/24 to elsewhere: with this node's address"]
    has(masquerade["NFTA_EXPR_DATA"], NFTA_MASQ_FLAGS=frozenset({"NF_NAT_RANGE_PROTO_RANDOM_FULLY"}))


def test_elements() -> None:
    opened = [told(request) for request in nat.open_ports("crib", PORTS)]
    data = {
        one["NFTA_SET_ELEM_LIST_SET"]: [
            tuple(element[name]["NFTA_DATA_VALUE"] for name in element if name != "nla_type")
            for element in one["NFTA_SET_ELEM_LIST_ELEMENTS"]
        ]
        for one in opened
    }
    tcp, udp = b"\6\0\0\0", b"\x11\0\0\0"
    assert data["ports4"] == [(tcp + b"\x1f\x90\0\0", SUBNETS[0][2].packed + b"\0\x50\0\0")]
    assert data["ports4_at"] == [(bytes([192, 0, 2, 1]) + udp + b"\0\x35\0\0", SUBNETS[0][2].packed + b"\x14\xe9\0\0")]
    assert data["targets6"] == [(SUBNETS[1][2].packed + tcp + b"\0\x50\0\0",)]
    closed = [request.kind & 0xFF for request in nat.close_ports("crib", PORTS)]
    assert closed == [12] * len(opened) + [14] * len(opened)
    assert nftables.delete_table("crib").kind == 10 << 8 | 2


def test_forgotten_connections() -> None:
    asked: list[Request] = []

    class Recording(Channel):
        def __init__(self) -> None:
            pass

        def dump(self, request: Request) -> list[Reply]:
            asked.append(request)
            return []

    assert list(conntrack._entries(Recording(), 4, 53)) == []
    found = told(asked[0])
    has(found, nfgen_family=2)
    has(found["CTA_TUPLE_ORIG"]["CTA_TUPLE_PROTO"], CTA_PROTO_NUM=17, CTA_PROTO_DST_PORT=53)


@requires("root", "bridge", "ip", "tbf", "nft")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_kernels_state(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    """What pyroute2 reads from the kernel is what was asked for; its own socket, its own parser."""
    network = new_network(subnet="10.99.0.0/24", subnet6="fd00:99::/64")
    namespace = new_namespace()
    wants = Wants(ingress_bits=8_000_000)
    with pinned(namespace, "crib-t1") as path, IPRoute() as kernel:
        netns = NetNs(path=path, fd=namespace.fd, rtnl=namespace.rtnl)
        one = network.attach(pod(1), netns, wants)
        (bridge,) = kernel.link("get", ifname=network.bridge)
        (port,) = kernel.link("get", ifname=one.host_interface)
        assert bridge.get_attr("IFLA_OPERSTATE") == port.get_attr("IFLA_OPERSTATE") == "UP"
        assert port.get_attr("IFLA_MASTER") == bridge["index"]
        assert port.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_MODE") == 1
        held = {
            (address.get_attr("IFA_ADDRESS"), address["prefixlen"])
            for address in kernel.get_addr(index=bridge["index"])
            if address["scope"] == 0
        }
        assert held == {("10.99.0.1", 24), ("fd00:99::1", 64)}
        (queue,) = (one for one in kernel.get_qdiscs(port["index"]) if one["parent"] == 0xFFFFFFFF)
        assert queue.get_attr("TCA_KIND") == "tbf"
        assert queue.get_nested("TCA_OPTIONS", "TCA_TBF_PARMS")["rate"] == 1_000_000
        talk(None, namespace, one.gateway)
        (seen,) = statistics.counters(path)
        other = kernel.link("get", ifname=one.host_interface)[0].get_attr("IFLA_STATS64")
        assert (seen.rx_packets, seen.tx_packets) == (other["tx_packets"], other["rx_packets"]), "from the other end"

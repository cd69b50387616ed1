"""Packing and parsing of netlink messages, byte by byte, and the channel against a kernel that says no."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net import rtnetlink
from net.netlink import Channel, NetlinkError, Reply, attr, attributes, be32, nest, text, u32
from tests.requires import requires


def test_attributes_are_padded_but_say_their_length() -> None:
    assert attr(3, b"abcde") == struct.pack("=HH", 9, 3) + b"abcde\0\0\0"
    assert text(3, "lo") == struct.pack("=HH", 7, 3) + b"lo\0\0"
    assert u32(4, 1500) == struct.pack("=HHI", 8, 4, 1500)
    assert be32(4, 1) == struct.pack("=HH", 8, 4) + b"\0\0\0\1"
    assert nest(18, text(1, "veth")) == struct.pack("=HH", 16, 18 | 0x8000) + text(1, "veth")


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=40)))
def test_attributes_come_back(values: dict[int, bytes]) -> None:
    assert attributes(b"".join(attr(kind, value) for kind, value in values.items())) == values


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    attributes(data)


def test_a_pair_is_one_message() -> None:
    request = rtnetlink.make_veth(
        name="veth0",
        mac="06:58:0a:58:00:05",
        master=7,
        mtu=1400,
        peer_netns=9,
        peer_name="eth0",
        peer_mac="0a:58:0a:58:00:05",
    )
    assert (request.kind, request.flags) == (rtnetlink.RTM_NEWLINK, 0x600)
    assert request.body[:16] == bytes(16), "down, and no index of its own"
    link = attributes(request.body[16:])
    info = attributes(link[18])
    peer = attributes(info[2])[1]
    assert (link[3], link[1], link[4], link[10]) == (b"veth0\0", bytes.fromhex("06580a580005"), number(1400), number(7))
    assert info[1] == b"veth\0"
    assert peer[:16] == bytes(16)
    end = attributes(peer[16:])
    assert (end[3], end[1], end[4], end[28]) == (b"eth0\0", bytes.fromhex("0a580a580005"), number(1400), number(9))


@pytest.mark.parametrize(
    ("address", "family", "broadcast", "flags"),
    [
        ("10.88.0.5/16", socket.AF_INET, ipaddress.ip_address("10.88.255.255").packed, 0),
        ("10.88.0.5/31", socket.AF_INET, None, 0),
        ("fd00::5/64", socket.AF_INET6, None, 2),
    ],
)
def test_addresses(address: str, family: int, broadcast: bytes | None, flags: int) -> None:
    interface = ipaddress.ip_interface(address)
    request = rtnetlink.add_address(2, interface)
    assert struct.unpack_from("=BBBBI", request.body) == (family, interface.network.prefixlen, flags, 0, 2)
    values = attributes(request.body[8:])
    assert (values[1], values[2], values.get(4)) == (interface.ip.packed, interface.ip.packed, broadcast)
    assert list(rtnetlink.addresses([Reply(request.kind, request.body)])) == [(2, interface)], "it reads what it writes"


def test_a_default_route() -> None:
    request = rtnetlink.default_route(2, ipaddress.ip_address("10.88.0.1"))
    (route,) = rtnetlink.routes([Reply(request.kind, request.body)])
    assert route == rtnetlink.Route(ipaddress.ip_network("0.0.0.0/0"), link=2, metric=0, table=254)
    assert attributes(request.body[12:])[5] == bytes([10, 88, 0, 1])


def number(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


@requires("root")
def test_errors_name_their_request_and_the_kernels_words() -> None:
    with Channel() as channel:
        unusable = rtnetlink.make_bridge("br0", "02:58:00:00:00:01", mtu=1)
        errors = channel.send([rtnetlink.up("lo"), rtnetlink.up("no-such-link"), unusable])
        assert [(error.index, error.errno) for error in errors] == [(1, errno.ENODEV), (2, errno.EINVAL)]
        assert channel.get(rtnetlink.one_link("no-such-link")) == []
        with pytest.raises(NetlinkError, match=r"invalid argument \(mtu less than device minimum\)"):
            channel.do(unusable)
        (lo,) = (link for link in rtnetlink.links(channel.dump(rtnetlink.all_links())) if link.name == "lo")
        assert (lo.index, lo.up) == (1, True)


@requires("root")
def test_only_the_kernel_is_believed() -> None:
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as liar,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as ours,
        Channel(opened=ours) as channel,
    ):
        ours.bind((0, 0))
        channel.do(rtnetlink.up("lo"))
        request = channel._frame(rtnetlink.up("lo"), 0)
        sequence = struct.unpack_from("=IHHI", request)[3] + 1
        forged = struct.pack("=IHHIIi", 20, 2, 0, sequence, 0, -errno.EPERM)
        liar.sendto(forged, (ours.getsockname()[0], 0))
        channel.do(rtnetlink.up("lo"))

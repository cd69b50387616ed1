"""Links, addresses and routes as netlink requests: pure packing and parsing, no sockets.

Sources: rtnetlink(7), linux/if_link.h, linux/if_addr.h, linux/rtnetlink.h.
"""

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from net.netlink import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Reply, Request, attr, attributes, nest, text, u32

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
RTM_GETLINK: Final = 18
RTM_NEWADDR: Final = 20
RTM_DELADDR: Final = 21
RTM_GETADDR: Final = 22
RTM_NEWROUTE: Final = 24
RTM_GETROUTE: Final = 26

RTNLGRP_LINK: Final = 1

_IFF_UP: Final = 1
_IF_OPER_UP: Final = b"\6"
_IFLA_ADDRESS: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_MASTER: Final = 10
_IFLA_OPERSTATE: Final = 16
_IFLA_LINKINFO: Final = 18
_IFLA_AF_SPEC: Final = 26
_IFLA_NET_NS_FD: Final = 28
_IFLA_EXT_MASK: Final = 29
_IFLA_NUM_TX_QUEUES: Final = 31
_IFLA_NUM_RX_QUEUES: Final = 32
_IFLA_INFO_KIND: Final = 1
_IFLA_INFO_DATA: Final = 2
_IFLA_INFO_SLAVE_KIND: Final = 4
_IFLA_INFO_SLAVE_DATA: Final = 5
_IFLA_BRPORT_MODE: Final = 4
_IFLA_INET6_ADDR_GEN_MODE: Final = 8
_IN6_ADDR_GEN_MODE_NONE: Final = 1
_VETH_INFO_PEER: Final = 1
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_BROADCAST: Final = 4
_IFA_F_NODAD: Final = 0x02
_RTA_DST: Final = 1
_RTA_OIF: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_PRIORITY: Final = 6
_RT_TABLE_MAIN: Final = 254
_RTPROT_BOOT: Final = 3
_RTN_UNICAST: Final = 1

_IFINFO: Final = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFADDR: Final = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG: Final = struct.Struct("=BBBBBBBBI")  # family, lengths of dst and src, tos, table, protocol, scope, type, flags

_ONE_QUEUE: Final = u32(_IFLA_NUM_TX_QUEUES, 1) + u32(_IFLA_NUM_RX_QUEUES, 1)  # the default is one per CPU
_NO_STATISTICS: Final = u32(_IFLA_EXT_MASK, 1 << 3)
_NO_LINK_LOCAL: Final = nest(
    _IFLA_AF_SPEC, nest(socket.AF_INET6, attr(_IFLA_INET6_ADDR_GEN_MODE, bytes([_IN6_ADDR_GEN_MODE_NONE])))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An interface as the kernel lists it; `master` is 0 without one, `kind` empty for hardware.

    `running` means that packets get through: up, with a carrier, and the kernel has acted on both.
    """

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    master: int
    up: bool
    running: bool


def make_bridge(name: str, mac: str, mtu: int) -> Request:
    """A new bridge, down. A fixed MAC stays when ports come and go, so neighbours' caches stay right."""
    return Request(
        RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        _named(name)
        + attr(_IFLA_ADDRESS, mac_bytes(mac))
        + u32(_IFLA_MTU, mtu)
        + nest(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "bridge")),
    )


def make_veth(*, name: str, mac: str, master: int, mtu: int, peer_netns: int, peer_name: str, peer_mac: str) -> Request:
    """A new pair in one message, both ends down: `name` here on the bridge `master`, the peer in the namespace.

    Up at creation is no choice for either end: the peer's gives ENOTCONN, and this end's comes before its IPv6
    link-local address can be switched off. Nor is the peer's index: the kernel heeds it only beside one for this end.
    """
    peer = (
        _named(peer_name)
        + attr(_IFLA_ADDRESS, mac_bytes(peer_mac))
        + u32(_IFLA_MTU, mtu)
        + u32(_IFLA_NET_NS_FD, peer_netns)
        + _ONE_QUEUE
    )
    data = nest(_IFLA_INFO_DATA, attr(_VETH_INFO_PEER, peer))
    return Request(
        RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        _named(name)
        + attr(_IFLA_ADDRESS, mac_bytes(mac))
        + u32(_IFLA_MTU, mtu)
        + u32(_IFLA_MASTER, master)
        + _ONE_QUEUE
        + nest(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "veth"), data),
    )


def bridge_port(name: str) -> Request:
    """Let the bridge send a frame back out of the port it came from (a pod that meets itself behind a service)."""
    return Request(
        RTM_NEWLINK,
        0,
        _named(name)
        + nest(
            _IFLA_LINKINFO,
            text(_IFLA_INFO_SLAVE_KIND, "bridge"),
            nest(_IFLA_INFO_SLAVE_DATA, attr(_IFLA_BRPORT_MODE, b"\1")),
        )
        + _NO_LINK_LOCAL,
    )


def no_link_local(name: str) -> Request:
    """Keep the kernel from giving a link that is still down an IPv6 address of its own."""
    return Request(RTM_NEWLINK, 0, _named(name) + _NO_LINK_LOCAL)


def up(name: str) -> Request:
    return Request(RTM_NEWLINK, 0, _named(name, _IFF_UP))


def set_mtu(name: str, mtu: int) -> Request:
    return Request(RTM_NEWLINK, 0, _named(name) + u32(_IFLA_MTU, mtu))


def set_master(name: str, master: int) -> Request:
    """Make the link a port of the bridge with that index."""
    return Request(RTM_NEWLINK, 0, _named(name) + u32(_IFLA_MASTER, master))


def remove_link(name: str) -> Request:
    """Delete a link. Takes 16 to 20 ms in the kernel for a veth, one at a time."""
    return Request(RTM_DELLINK, 0, _named(name))


def _named(name: str, flags: int = 0) -> bytes:
    """The start of a message about the link `name` that sets `flags`."""
    return _IFINFO.pack(0, 0, 0, flags, flags) + text(_IFLA_IFNAME, name)


def add_address(index: int, address: Interface) -> Request:
    """Give a link an address (with its prefix length); IPv6 ones skip duplicate detection and work at once."""
    return Request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, _address(index, address))


def remove_address(index: int, address: Interface) -> Request:
    return Request(RTM_DELADDR, 0, _address(index, address))


def _address(index: int, address: Interface) -> bytes:
    packed = address.ip.packed
    body = attr(_IFA_LOCAL, packed) + attr(_IFA_ADDRESS, packed)
    if isinstance(address, ipaddress.IPv4Interface):
        family, flags = socket.AF_INET, 0
        if address.network.prefixlen < 31:
            body += attr(_IFA_BROADCAST, address.network.broadcast_address.packed)
    else:
        family, flags = socket.AF_INET6, _IFA_F_NODAD
    return _IFADDR.pack(family, address.network.prefixlen, flags, 0, index) + body


def default_route(index: int, gateway: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Request:
    """Everything that has no better route goes to `gateway` through link `index`."""
    return Request(
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_REPLACE,
        _RTMSG.pack(_family(gateway.version), 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, 0, _RTN_UNICAST, 0)
        + attr(_RTA_GATEWAY, gateway.packed)
        + u32(_RTA_OIF, index),
    )


def one_link(name: str) -> Request:
    return Request(RTM_GETLINK, 0, _named(name) + _NO_STATISTICS)


def all_links() -> Request:
    return Request(RTM_GETLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0) + _NO_STATISTICS)


def all_addresses(version: int) -> Request:
    """Addresses of IP version 4 or 6."""
    return Request(RTM_GETADDR, 0, _IFADDR.pack(_family(version), 0, 0, 0, 0))


def all_routes(version: int) -> Request:
    """Routes of IP version 4 or 6, of every table."""
    return Request(RTM_GETROUTE, 0, _RTMSG.pack(_family(version), 0, 0, 0, 0, 0, 0, 0, 0))


def links(replies: Iterable[Reply]) -> Iterator[Link]:
    for reply in replies:
        _, _, index, flags, _ = _IFINFO.unpack_from(reply.body)
        found = attributes(reply.body[_IFINFO.size :])
        kind = attributes(found.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND, b"")
        yield Link(
            index=index,
            name=found[_IFLA_IFNAME].rstrip(b"\0").decode(),
            kind=kind.rstrip(b"\0").decode(),
            mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
            mtu=_number(found.get(_IFLA_MTU)),
            master=_number(found.get(_IFLA_MASTER)),
            up=bool(flags & _IFF_UP),
            running=found.get(_IFLA_OPERSTATE) == _IF_OPER_UP,
        )


def addresses(replies: Iterable[Reply]) -> Iterator[tuple[int, Interface]]:
    """Link index and address."""
    for reply in replies:
        _, prefix, _, _, index = _IFADDR.unpack_from(reply.body)
        found = attributes(reply.body[_IFADDR.size :])
        packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if packed:
            yield index, ipaddress.ip_interface((packed, prefix))


@dataclass(frozen=True, slots=True)
class Route:
    """A route: `link` is 0 where the route names none; a default route's destination has prefix length 0."""

    destination: IpNetwork
    link: int
    metric: int
    table: int


def routes(replies: Iterable[Reply]) -> Iterator[Route]:
    """Unicast routes that have one destination, from `all_routes`."""
    for reply in replies:
        family, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(reply.body)
        found = attributes(reply.body[_RTMSG.size :])
        if kind != _RTN_UNICAST:
            continue
        packed = found.get(_RTA_DST, bytes(4 if family == socket.AF_INET else 16))
        yield Route(
            destination=ipaddress.ip_network((packed, length)),
            link=_number(found.get(_RTA_OIF)),
            metric=_number(found.get(_RTA_PRIORITY)),
            table=table,
        )


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _number(value: bytes | None) -> int:
    return int.from_bytes(value, sys.byteorder) if value else 0

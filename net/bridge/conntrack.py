"""Connections that the kernel remembers: those over UDP outlive what led them where they go.

A client that goes on sending keeps its entry alive, and with it the way that the port led before, or nowhere at all.
Sources: linux/netfilter/nfnetlink_conntrack.h, conntrack(8).
"""

import logging
import struct
from collections.abc import Callable, Collection, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, NamedTuple

from net import rtnetlink
from net.netlink import NETLINK_NETFILTER, Channel, Request, attr, attributes, nest, u32

Address = IPv4Address | IPv6Address
logger = logging.getLogger(__name__)

_SUBSYSTEM: Final = 1
_GET: Final = 1
_DELETE: Final = 2
_UDP: Final = 17
_TUPLE_ORIGINAL: Final = 1
_TUPLE_REPLY: Final = 2
_ID: Final = 12
_ZONE: Final = 18
_FILTER: Final = 25
_TUPLE_IP: Final = 1
_TUPLE_PROTOCOL: Final = 2
_FILTER_ORIGINAL: Final = 1
_BY_PROTOCOL_AND_PORT: Final = 1 << 3 | 1 << 5
_FAMILIES: Final = {4: 2, 6: 10}
_HEADER: Final = struct.Struct("!BBH")  # nfgenmsg: family, version, resource


class _Entry(NamedTuple):
    destination: Address
    port: int
    replier: Address
    removal: Request


def forget_unled(ports: Collection[int]) -> None:
    """Drop the entries of UDP packets to one of this node's addresses and these ports."""
    with Channel() as channel:
        local = {
            address.ip
            for version in _FAMILIES
            for _, address in rtnetlink.addresses(channel.dump(rtnetlink.all_addresses(version)))
        }
    _forget(ports, lambda entry: entry.destination in local or entry.destination.is_loopback)


def forget_led(ports: Collection[int], targets: Collection[Address]) -> None:
    """Drop the entries of UDP packets to these ports that went on to one of the targets."""
    _forget(ports, lambda entry: entry.replier in targets)


def _forget(ports: Collection[int], chosen: Callable[[_Entry], bool]) -> None:
    """A kernel without this interface keeps them for as long as packets come: told, and no reason to fail."""
    try:
        with Channel(NETLINK_NETFILTER) as channel:
            requests = [
                entry.removal
                for port in ports
                for version in _FAMILIES
                for entry in _entries(channel, version, port)
                if entry.port == port and chosen(entry)
            ]
            channel.send(requests)  # an entry that went meanwhile is no error
    except OSError as error:
        logger.warning("connections of udp ports %s are not forgotten: %s", sorted(ports), error)


def _entries(channel: Channel, version: int, port: int) -> Iterator[_Entry]:
    """Entries of UDP packets to the port, from any address; kernels before 5.8 give all of them."""
    family = _HEADER.pack(_FAMILIES[version], 0, 0)
    protocol = nest(_TUPLE_PROTOCOL, attr(1, bytes([_UDP])), attr(3, port.to_bytes(2, "big")))
    wanted = nest(_TUPLE_ORIGINAL, protocol) + nest(_FILTER, u32(_FILTER_ORIGINAL, _BY_PROTOCOL_AND_PORT))
    for reply in channel.dump(Request(_SUBSYSTEM << 8 | _GET, 0, family + wanted)):
        found = attributes(reply.body[_HEADER.size :])
        original, back = (attributes(found.get(key, b"")) for key in (_TUPLE_ORIGINAL, _TUPLE_REPLY))
        way, service, answer = (
            attributes(tuple_.get(part, b""))
            for tuple_, part in ((original, _TUPLE_IP), (original, _TUPLE_PROTOCOL), (back, _TUPLE_IP))
        )
        source, destination = (1, 2) if version == 4 else (3, 4)
        if service.get(1) != bytes([_UDP]) or destination not in way or source not in answer:
            continue
        named = nest(_TUPLE_ORIGINAL, found[_TUPLE_ORIGINAL])
        named += b"".join(attr(key, found[key]) for key in (_ID, _ZONE) if key in found)
        yield _Entry(
            destination=ip_address(way[destination]),
            port=int.from_bytes(service.get(3, b""), "big"),
            replier=ip_address(answer[source]),
            removal=Request(_SUBSYSTEM << 8 | _DELETE, 0, family + named),
        )

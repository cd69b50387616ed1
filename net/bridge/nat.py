"""What crib's own nftables table consists of: masquerading and host ports. Pure, but for `nftables.commit`.

Nobody else's table is touched, and no verdict here can overrule another table's drop (nftables has no such verdict);
chains that would drop pods' traffic are reported instead.

Host ports are elements of maps, so that one more costs the same whatever their number: where a packet for this node
goes is looked up by protocol and port, before that by address as well. A pod that comes back to the bridge by a host
port is masqueraded, since the other pod's answer would else take the direct way; so are connections from 127.0.0.1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import Final

from net import nftables as nft
from net.netlink import Request
from net.network import HostPort
from net.rtnetlink import IpNetwork

PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
_LOOPBACK: Final = IPv4Network("127.0.0.0/8")
_LOCALHOST6: Final = ip_address("::1").packed
_LOOPBACK_INDEX: Final = 1
_ANY: Final = ("", "::")
_ADDRESS: Final = {4: nft.IPV4, 6: nft.IPV6}


@dataclass(frozen=True, slots=True)
class OpenPort:
    """A host port and the pod's addresses that it leads to."""

    port: HostPort
    targets: tuple[IPv4Address | IPv6Address, ...]


def table(
    name: str, bridge: str, subnets: Sequence[IpNetwork], *, masquerade: bool, ports: list[OpenPort]
) -> list[Request]:
    """The whole table, replacing what there is; its host port part is there only with `ports`."""
    requests = nft.replace_table(name)
    if ports:
        requests += _sets(name, subnets)
        requests += [
            # Packets to or from 127.0.0.0/8 that a link brought: CVE-2020-8558.
            nft.base_chain(name, "guard", "filter", nft.PRE_ROUTING, nft.PRIORITY_RAW),
            nft.rule(name, "guard", "to 127.0.0.0/8 from a link: dropped", *_foreign(nft.DESTINATION)),
            nft.rule(name, "guard", "from 127.0.0.0/8 by a link: dropped", *_foreign(nft.SOURCE)),
            nft.chain(name, "hostports"),
        ]
        for subnet in subnets:
            requests += _translations(name, subnet.version)
        for hook, chain in ((nft.PRE_ROUTING, "prerouting"), (nft.LOCAL_OUT, "output")):
            requests.append(nft.base_chain(name, chain, "nat", hook, nft.PRIORITY_DESTINATION_NAT))
            local = [*nft.destination_is_local(), nft.jump("hostports")]
            requests.append(nft.rule(name, chain, "to this node: maybe to a host port", *local))
    requests.append(nft.base_chain(name, "postrouting", "nat", nft.POST_ROUTING, nft.PRIORITY_SOURCE_NAT))
    for subnet in subnets:
        inside = [*nft.version_is(subnet.version), *nft.address_in(subnet, nft.SOURCE)]
        if masquerade:
            away = nft.address_in(subnet, nft.DESTINATION, nft.NOT_EQUAL)
            comment = f"from {subnet} to elsewhere: with this node's address"
            requests.append(nft.rule(name, "postrouting", comment, *inside, *away, nft.masquerade()))
        if ports:
            back = [*inside, *nft.destination_was_translated(), *_key(subnet.version, address=True)]
            found = nft.look_up(f"targets{subnet.version}")
            comment = f"from {subnet} by a host port back to it: with the bridge's address"
            requests.append(nft.rule(name, "postrouting", comment, *back, found, nft.masquerade()))
    if ports:
        local = [*nft.version_is(4), *nft.address_in(_LOOPBACK, nft.SOURCE)]
        out = [nft.meta(nft.META_OIFNAME), nft.compare(nft.EQUAL, bridge.encode().ljust(16, b"\0"))]
        comment = "from 127.0.0.0/8 by a host port: with the bridge's address"
        requests.append(nft.rule(name, "postrouting", comment, *local, *out, nft.masquerade()))
    return requests + open_ports(name, ports)


def _foreign(field: dict[int, tuple[int, int]]) -> list[bytes]:
    other = [nft.meta(nft.META_IIF), nft.compare(nft.NOT_EQUAL, nft.native(_LOOPBACK_INDEX))]
    return [*other, *nft.version_is(4), *nft.address_in(_LOOPBACK, field), nft.verdict(nft.DROP)]


def _sets(name: str, subnets: Sequence[IpNetwork]) -> list[Request]:
    requests = []
    for number, subnet in enumerate(subnets):
        version = subnet.version
        address, service = _ADDRESS[version], (nft.PROTOCOL, nft.PORT)
        target = (address, nft.PORT)
        requests += [
            nft.make_set(name, f"ports{version}", 3 * number + 1, service, target),
            nft.make_set(name, f"ports{version}_at", 3 * number + 2, (address, *service), target),
            nft.make_set(name, f"targets{version}", 3 * number + 3, (address, *service)),
        ]
    return requests


def _translations(name: str, version: int) -> list[Request]:
    """Look the packet up, with its destination address and without. The kernel can't send away what is for [::1]."""
    checked = nft.version_is(version)
    if version == 6:
        checked += [nft.payload(nft.NETWORK_HEADER, *nft.DESTINATION[6]), nft.compare(nft.NOT_EQUAL, _LOCALHOST6)]
    to = nft.translate_destination(version)
    return [
        nft.rule(
            name,
            "hostports",
            f"to a host port{' of one address' if at else ''}, IPv{version}",
            *checked,
            *_key(version, address=at),
            nft.look_up(f"ports{version}{suffix}", data=True),
            to,
        )
        for at, suffix in ((True, "_at"), (False, ""))
    ]


def _key(version: int, *, address: bool) -> list[bytes]:
    """Load protocol and port, with `address` behind the packet's destination."""
    offset = 0
    loads = []
    if address:
        loads.append(nft.payload(nft.NETWORK_HEADER, *nft.DESTINATION[version]))
        offset = nft.DESTINATION[version][1]
    loads.append(nft.meta(nft.META_L4PROTO, nft.word(offset)))
    loads.append(nft.payload(nft.TRANSPORT_HEADER, 2, 2, nft.word(offset + 4)))
    return loads


def open_ports(name: str, ports: Iterable[OpenPort]) -> list[Request]:
    """Add what leads to the ports; what is there already stays."""
    return [one for where, elements in _elements(ports).items() for one in nft.add_elements(name, where, elements)]


def close_ports(name: str, ports: Sequence[OpenPort]) -> list[Request]:
    """Remove what leads to the ports, also where a part of it has gone: what isn't there is added first."""
    requests = open_ports(name, ports)
    for where, elements in _elements(ports).items():
        requests += nft.delete_elements(name, where, elements)
    return requests


def _elements(ports: Iterable[OpenPort]) -> dict[str, list[tuple[bytes, bytes]]]:
    """By set: keys and data."""
    found: dict[str, dict[bytes, bytes]] = {}
    for one in ports:
        protocol = PROTOCOLS[one.port.protocol].to_bytes(1, "big").ljust(4, b"\0")
        host_port = one.port.host_port.to_bytes(2, "big").ljust(4, b"\0")
        port = one.port.container_port.to_bytes(2, "big").ljust(4, b"\0")
        for target in targets(one):
            version, at = target.version, b""
            if one.port.host_ip not in _ANY:
                at = ip_address(one.port.host_ip).packed
            where = f"ports{version}_at" if at else f"ports{version}"
            found.setdefault(where, {})[at + protocol + host_port] = target.packed + port
            found.setdefault(f"targets{version}", {})[target.packed + protocol + port] = b""
    return {where: list(elements.items()) for where, elements in found.items()}


def targets(one: OpenPort) -> list[IPv4Address | IPv6Address]:
    """Those of the pod's addresses that the port leads to: of its host address's IP version, or all."""
    if not one.port.host_ip:
        return list(one.targets)
    version = ip_address(one.port.host_ip).version
    return [target for target in one.targets if target.version == version]

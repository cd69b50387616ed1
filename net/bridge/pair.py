"""One pod's veth pair: how its ends are named, made, configured and, where nobody waits for it, deleted."""

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_interface
from typing import Final

from net import rtnetlink, shaping
from net.bridge.ipam import Lease
from net.errors import AlreadyExists, Exhausted, Unavailable, Unsupported
from net.netlink import Channel, NetlinkError
from net.network import Attachment, NetNs, Wants
from net.rtnetlink import IpNetwork, Link

# Locally administered addresses: what an interface is can be read from it.
MAC_BRIDGE: Final = "02:58"
MAC_HOST: Final = "06:58"
MAC_POD: Final = "0a:58"

_POD_INTERFACE: Final = "eth0"
_CARRIER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Bridge:
    """The bridge that pods are connected to, as it was found or made. IPv4 is the first of `subnets`."""

    name: str
    index: int
    mtu: int
    subnets: tuple[IpNetwork, ...]


def attachment(lease: Lease, subnets: Sequence[IpNetwork]) -> Attachment:
    """What a pod with this lease has, or will have once it is connected."""
    return Attachment(
        interface=_POD_INTERFACE,
        addresses=tuple(f"{_address(subnet, lease.offset)}/{subnet.prefixlen}" for subnet in subnets),
        gateway=str(gateway(subnets[0])),
        mac=_mac(MAC_POD, subnets, lease),
        host_interface=host_interface(lease.sandbox_id),
    )


def host_interface(sandbox_id: str) -> str:
    return f"veth{sandbox_id[:11]}"


def gateway(subnet: IpNetwork) -> IPv4Address | IPv6Address:
    return _address(subnet, 1)


def connect(lease: Lease, netns: NetNs, wants: Wants, bridge: Bridge, host: Channel, inside: Channel) -> None:
    """The pair and what the pod's end needs; what an interrupted attempt has done is done again.

    `host` talks to this network namespace, `inside` to the pod's; of `wants` only the rates count here. Raises
    NetlinkError beside the domain's errors.
    """
    name = host_interface(lease.sandbox_id)
    pod_mac = _mac(MAC_POD, bridge.subnets, lease)
    pair = rtnetlink.make_veth(
        name=name,
        mac=_mac(MAC_HOST, bridge.subnets, lease),
        master=bridge.index,
        mtu=bridge.mtu,
        peer_netns=netns.fd,
        peer_name=_POD_INTERFACE,
        peer_mac=pod_mac,
    )
    try:
        host.do(pair)
    except NetlinkError as error:
        if error.errno == errno.EXFULL:
            raise Exhausted(f"bridge {bridge.name}: no free port ({error})") from error
        if error.errno != errno.EEXIST:
            raise
        end = find(inside, _POD_INTERFACE)
        if end and (end.mac != pod_mac or not find(host, name)):
            raise AlreadyExists(f"namespace {netns.path} already has an interface {_POD_INTERFACE}") from error
        if not end:  # the pair leads into an earlier namespace of this sandbox
            remove(host, lease, bridge.subnets)
            host.do(pair)
    quiet = () if len(bridge.subnets) > 1 else (rtnetlink.no_link_local(_POD_INTERFACE),)
    inside.do(rtnetlink.up("lo"), *quiet, rtnetlink.up(_POD_INTERFACE))
    host.do(rtnetlink.bridge_port(name), rtnetlink.up(name))  # the last end to come up forwards at once
    _running(host, bridge.name)
    end = _running(inside, _POD_INTERFACE)
    if not end:
        raise Unavailable(f"namespace {netns.path}: interface {_POD_INTERFACE} vanished")
    if wants.ingress_bits and (outer := find(host, name)):
        _limit(host, outer, wants.ingress_bits)
    if wants.egress_bits:
        _limit(inside, end, wants.egress_bits)
    configuration = []
    for subnet in bridge.subnets:
        address = ip_interface((_address(subnet, lease.offset).packed, subnet.prefixlen))
        configuration.append(rtnetlink.add_address(end.index, address))
        configuration.append(rtnetlink.default_route(end.index, gateway(subnet)))
    inside.do(*configuration)


def _limit(channel: Channel, link: Link, bits_per_second: int) -> None:
    """Limit what the link sends, before the pod can send or be sent anything."""
    try:
        channel.do(shaping.limit_rate(link.index, bits_per_second, link.mtu))
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        raise Unsupported(f"the kernel can't limit a link's rate (no sch_tbf): {error}") from error


def remove(channel: Channel, lease: Lease, subnets: Sequence[IpNetwork]) -> None:
    """Delete the lease's pair from this end; succeeds when it is gone. Leaves an interface that isn't the lease's."""
    link = find(channel, host_interface(lease.sandbox_id))
    if link and link.kind == "veth" and link.mac == _mac(MAC_HOST, subnets, lease):
        remove_link(channel, link.name)


def remove_link(channel: Channel, name: str) -> None:
    """Delete a link; succeeds when it is gone."""
    try:
        channel.do(rtnetlink.remove_link(name))
    except NetlinkError as error:
        if error.errno != errno.ENODEV:  # it may have gone by itself
            raise


def find(channel: Channel, name: str) -> Link | None:
    return next(rtnetlink.links(channel.get(rtnetlink.one_link(name))), None)


def gone(lease: Lease) -> bool:
    """Whether the lease's pair is no more, told without the kernel's lock on links, which a dying namespace holds long.

    Looks for the link's parameters. if_nametoindex(3) won't do: for a missing name it has the kernel run modprobe.
    """
    return not os.path.exists(f"/proc/sys/net/ipv4/conf/{host_interface(lease.sandbox_id)}")


def _running(channel: Channel, name: str) -> Link | None:
    """The link, once packets get through: one that is lost in between costs its sender a second.

    Kernels from 6.8 on see to it when asked; before, it is waited for, but not for ever.
    """
    link = find(channel, name)
    if not link or link.running:
        return link
    deadline = time.monotonic() + _CARRIER_S
    with channel.watch(rtnetlink.RTNLGRP_LINK):
        while (link := find(channel, name)) and not link.running:
            if not channel.notified(deadline - time.monotonic()):
                break
    return link


def _address(subnet: IpNetwork, offset: int) -> IPv4Address | IPv6Address:
    return subnet[offset]


def _mac(prefix: str, subnets: Sequence[IpNetwork], lease: Lease) -> str:
    """Unique on the bridge, and the same whenever the address is: neighbours' caches stay right."""
    return f"{prefix}:{_address(subnets[0], lease.offset).packed.hex(':')}"

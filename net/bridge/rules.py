"""The instance's nftables table as the kernel has it: made, added to and put back, from the records."""

import errno
import socket
import threading
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

from net import nftables, sysctl
from net.bridge import conntrack, nat
from net.bridge.ipam import Lease, Leases
from net.bridge.nat import OpenPort
from net.errors import AlreadyExists, InvalidSpec, Unavailable, Unsupported
from net.network import HostPort
from net.rtnetlink import IpNetwork

_KINDS: Final = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM, "sctp": socket.SOCK_STREAM}
_IPPROTO_SCTP: Final = 132


class Rules:
    """Masquerading and host ports. Safe to use from several threads."""

    def __init__(self, table: str, bridge: str, leases: Leases, *, masquerade: bool) -> None:
        self.table = table
        self._bridge = bridge
        self._leases = leases
        self._masquerade = masquerade
        self._lock = threading.Lock()
        self._with_ports = False

    def install(self, subnets: Sequence[IpNetwork]) -> None:
        """Replace the table by what the records want; without masquerading and host ports there is none.

        Raises Unsupported where the kernel can't, Unavailable when it refuses.
        """
        with self._lock:
            self._install(subnets)

    def _install(self, subnets: Sequence[IpNetwork]) -> None:
        ports = [_open_port(lease, port, subnets) for lease, port in self._leases.ports()]
        if ports or self._masquerade:
            wanted = nat.table(self.table, self._bridge, subnets, masquerade=self._masquerade, ports=ports)
            nftables.commit(self.table, wanted)
        if ports:  # only behind the guard that came with them; and only here may 127.0.0.1 meet a link
            sysctl.write(f"net.ipv4.conf.{self._bridge}.route_localnet", "1")
        self._with_ports = bool(ports)

    def intact(self) -> bool:
        """Whether the table is there, if there has to be one."""
        return not (self._masquerade or self._with_ports) or nftables.exists(self.table)

    def open(self, sandbox_id: str, subnets: Sequence[IpNetwork]) -> None:
        """Let the sandbox's recorded host ports lead to it. Raises as `install`."""
        with self._lock:
            ports = [_open_port(lease, port, subnets) for lease, port in self._leases.ports(sandbox_id)]
            if self._with_ports:
                try:
                    nftables.commit(self.table, nat.open_ports(self.table, ports))
                except Unavailable as error:
                    if not _missing(error):
                        raise
                    self._install(subnets)  # somebody has flushed the ruleset
            else:
                self._install(subnets)
        if udp := {one.port.host_port for one in ports if one.port.protocol == "udp"}:
            conntrack.forget_unled(udp)

    def release(self, sandbox_id: str, subnets: Sequence[IpNetwork]) -> Lease | None:
        """Let the sandbox's host ports lead nowhere, then give its lease up, and with it the record of them.

        Both at once for whoever makes the table anew from the records. Succeeds where the table is gone.
        """
        with self._lock:
            ports = [_open_port(lease, port, subnets) for lease, port in self._leases.ports(sandbox_id)]
            if ports:
                self._close(ports)
            lease = self._leases.release(sandbox_id)
            if ports and not self._masquerade and not self._leases.ports():
                self._remove()  # nothing is in it any more
        if udp := {one.port.host_port for one in ports if one.port.protocol == "udp"}:
            conntrack.forget_led(udp, {target for one in ports for target in one.targets})
        return lease

    def _close(self, ports: Sequence[OpenPort]) -> None:
        try:
            nftables.commit(self.table, nat.close_ports(self.table, ports))
        except Unsupported:
            pass
        except Unavailable as error:
            if not _missing(error):
                raise

    def remove(self) -> None:
        """Delete the table; succeeds when it is gone, and where the kernel has no nftables."""
        with self._lock:
            self._remove()

    def _remove(self) -> None:
        self._with_ports = False
        localnet = f"net.ipv4.conf.{self._bridge}.route_localnet"
        if sysctl.exists(localnet):
            sysctl.write(localnet, "0")  # before what guards it goes
        try:
            nftables.commit(self.table, [nftables.make_table(self.table), nftables.delete_table(self.table)])
        except Unsupported:
            pass


def check(ports: Sequence[HostPort], subnets: Sequence[IpNetwork]) -> None:
    """Raises InvalidSpec for a port that can't be, AlreadyExists for one that a process of this node listens on."""
    versions = {subnet.version for subnet in subnets}
    for port in ports:
        if port.protocol not in nat.PROTOCOLS:
            raise InvalidSpec(f"host port {port}: the protocol is not tcp, udp or sctp")
        if port.host_ip:
            address = ip_address(port.host_ip)
            if address.version == 6 and address.is_loopback:
                raise InvalidSpec(f"host port {port}: the kernel can't lead [::1] to a pod; use 127.0.0.1")
            if address.version not in versions:
                raise InvalidSpec(f"host port {port}: pods have no IPv{address.version} address here")
        _check_free(port)


def _check_free(port: HostPort) -> None:
    """A port that a process listens on would be taken from it without a word."""
    family = socket.AF_INET6 if ":" in port.host_ip else socket.AF_INET
    number = _IPPROTO_SCTP if port.protocol == "sctp" else 0
    try:
        with socket.socket(family, _KINDS[port.protocol] | socket.SOCK_CLOEXEC, number) as tried:
            if port.protocol != "udp":
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections don't count
            if family == socket.AF_INET6:
                tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            tried.bind((port.host_ip, port.host_port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"host port {port}: a process of this node has it") from error
        # Anything else, an address that isn't this node's or a protocol that it lacks, doesn't speak of a process.


def _open_port(lease: Lease, port: HostPort, subnets: Sequence[IpNetwork]) -> OpenPort:
    return OpenPort(port, tuple(subnet[lease.offset] for subnet in subnets))


def _missing(error: BaseException) -> bool:
    """Whether the table, or a set of it, was not there."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno == errno.ENOENT

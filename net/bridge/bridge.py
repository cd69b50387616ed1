"""The bridge network: what `net.network.Network` promises, with one bridge per cribd.

Order of effects: a lease is on disk before its veth pair exists, and is forgotten only after the pair is gone. Pairs
are never deleted on the way of a pod's end (16 to 20 ms each, one at a time, in the kernel): the end of the
namespace removes them, in batches.
"""

import contextlib
import errno
import hashlib
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Final

from net import nftables, rtnetlink, sysctl
from net.bridge import pair, report, subnet
from net.bridge.ipam import Lease, Leases
from net.bridge.pair import Bridge
from net.bridge.rules import Rules, check
from net.errors import CribError, DeadlineExceeded, Exhausted, InvalidSpec, Unavailable, Unsupported, WrongState
from net.netlink import Channel, NetlinkError
from net.network import NOTHING, Attachment, Finding, Inventory, NetNs, NetworkStatus, PodIdentity, Wants
from net.rtnetlink import IpNetwork, Link
from net.transactions import Transactions

logger = logging.getLogger(__name__)

_DEFAULT_MTU: Final = 1500
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_POD_CIDR: Final = "pod CIDR"
_NO_MASQUERADE: Final = "NoMasquerade"
_FIREWALL: Final = "FirewallDropsForwarded"
_SWEEP_LIMIT: Final = 32  # released leases looked at per detach: bounds what one pod pays for others


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeConfig:
    """Empty and 0 mean: derived. `bridge` from the instance, `subnet` a free one, `mtu` the uplink's.

    `subnet6` has no default: without it pods have no IPv6 at all.
    """

    bridge: str = ""
    subnet: str = ""
    subnet6: str = ""
    mtu: int = 0
    masquerade: bool = True


class BridgeNetwork:
    """See `net.network.Network`. Threat model: pods may send any frame; nothing they send reaches this code."""

    def __init__(self, instance: str, root: Path, config: BridgeConfig) -> None:
        self.bridge = config.bridge or (f"{instance}0" if instance == "crib" else instance[:15])
        if not _NAME.fullmatch(self.bridge):
            raise InvalidSpec(f"network.bridge {self.bridge!r}: not an interface name of at most 15 characters")
        if config.mtu and not 68 <= config.mtu <= 65535:
            raise InvalidSpec(f"network.mtu {config.mtu}: not between 68 and 65535")
        self._instance = instance
        self._config = config
        self._subnet = subnet.configured("network.subnet", config.subnet, 4) if config.subnet else None
        self._subnet6 = subnet.configured("network.subnet6", config.subnet6, 6) if config.subnet6 else None
        self._subnet_key = "network.subnet"
        self._late = False  # the kubelet's pod CIDR waits for the last pod with an address of before
        self._mac = f"{pair.MAC_BRIDGE}:{hashlib.sha256(instance.encode()).digest()[:4].hex(':')}"
        self._setup_lock = threading.Lock()
        self._ready: Bridge | None = None
        self._found = NetworkStatus(ready=True)
        self._leases = Leases(root / "leases.db")
        self._rules = Rules(instance, self.bridge, self._leases, masquerade=config.masquerade)

    def close(self) -> None:
        self._leases.close()

    @property
    def pod_sysctls(self) -> Mapping[str, str]:
        # Any pod could else name itself another one's router (CVE-2020-10749).
        return {"net.ipv6.conf.default.accept_ra": "0"} if sysctl.exists("net.ipv6") else {}

    @property
    def used(self) -> bool:
        """Whether a pod has, or had, an address here that isn't free yet."""
        return bool(self._leases.all())

    def tell_cidrs(self, cidrs: Sequence[str]) -> None:
        """Let the kubelet's pod CIDRs be the subnets, as far as the configuration names none; heeded by `setup`."""
        for cidr in cidrs:
            version = ip_network(cidr).version
            if version == 4 and not self._config.subnet:
                self._subnet, self._subnet_key = subnet.configured(_POD_CIDR, cidr, 4), _POD_CIDR
            elif version == 6 and not self._config.subnet6:
                self._subnet6 = subnet.configured(_POD_CIDR, cidr, 6)

    def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        before = self._subnet, self._subnet6
        self.tell_cidrs(cidrs)
        if before != (self._subnet, self._subnet6):
            with self._setup_lock:
                self._ready = None
            logger.info("pod CIDRs %s: %s", " ".join(cidrs), self.status().message or "in use")

    def collect(self) -> None:
        """Nothing is slow here."""

    # What all pods share

    def setup(self) -> None:
        self._set_up(self._ready)

    def _set_up(self, seen: Bridge | None) -> Bridge:
        """Make what is missing, unless another thread has done so since the caller saw `seen`."""
        with self._setup_lock, _explained(f"bridge {self.bridge}"):
            if self._ready and self._ready is not seen:
                return self._ready
            self._ready = None
            with Channel() as channel:
                made = self._make_bridge(channel)
            sysctl.write("net.ipv4.ip_forward", "1")
            if self._subnet6:
                sysctl.forward_ipv6()
            self._found = self._translate(made.subnets)
            self._ready = made
            return made

    def _translate(self, subnets: Sequence[IpNetwork]) -> NetworkStatus:
        """Masquerade what leaves the node. A kernel that can't is told; pods get their addresses all the same."""
        try:
            self._rules.install(subnets)
        except Unsupported as error:
            message = f"{error}: pods reach nothing beyond this node; network.masquerade = false if that is meant"
            return NetworkStatus(ready=False, reason=_NO_MASQUERADE, message=message)
        return self._firewall() if self._config.masquerade else NetworkStatus(ready=True)

    def _firewall(self) -> NetworkStatus:
        """What another table does to pods' traffic, which no table of crib's can undo."""
        drops = nftables.forward_drops()
        if not drops:
            return NetworkStatus(ready=True)
        message = (
            f"the firewall drops forwarded packets by default (chain {', '.join(drops)}): pods may reach nothing "
            f"beyond this node until it accepts what comes from and goes to {self.bridge}"
        )
        return NetworkStatus(ready=True, reason=_FIREWALL, message=message)

    def _make_bridge(self, channel: Channel) -> Bridge:
        """The bridge, up and with the gateways' addresses."""
        links = {link.index: link for link in rtnetlink.links(channel.dump(rtnetlink.all_links()))}
        bridge = next((link for link in links.values() if link.name == self.bridge), None)
        if bridge and not self._ours(bridge):
            kind = bridge.kind or "hardware"
            raise Unavailable(
                f"interface {self.bridge} ({kind}, address {bridge.mac}) is not crib's: remove it or set network.bridge"
            )
        subnets = self._choose_subnets(channel, links, bridge.index if bridge else 0)
        mtu = self._config.mtu or _uplink_mtu(channel, links)
        if not bridge:
            channel.do(rtnetlink.make_bridge(self.bridge, self._mac, mtu))
        elif bridge.mtu != mtu:
            channel.do(rtnetlink.set_mtu(self.bridge, mtu))
        if self._subnet6:
            sysctl.write(f"net.ipv6.conf.{self.bridge}.accept_ra", "0")  # pods are not this host's routers
        elif sysctl.exists("net.ipv6"):
            sysctl.write(f"net.ipv6.conf.{self.bridge}.disable_ipv6", "1")
        channel.do(rtnetlink.up(self.bridge))
        index = next(rtnetlink.links(channel.get(rtnetlink.one_link(self.bridge)))).index
        self._set_gateways(channel, index, subnets)
        if not bridge:
            self._reconnect(channel, index, links.values())
        return Bridge(self.bridge, index, mtu, subnets)

    def _reconnect(self, channel: Channel, index: int, links: Iterable[Link]) -> None:
        """Pods that outlived their bridge become ports of the new one."""
        leased = {pair.host_interface(lease.sandbox_id) for lease in self._leases.all()}
        for link in links:
            if link.name in leased and link.mac.startswith(pair.MAC_HOST) and not link.master:
                channel.do(rtnetlink.set_master(link.name, index), rtnetlink.bridge_port(link.name))

    def _ours(self, link: Link) -> bool:
        return link.kind == "bridge" and link.mac == self._mac

    def _choose_subnets(self, channel: Channel, links: dict[int, Link], own: int) -> tuple[IpNetwork, ...]:
        """The configured, recorded or a free subnet, recorded before anything uses it.

        A recorded one stays while it has leases, and otherwise as long as nothing else on the host overlaps it.
        """
        taken = {
            route.destination: links[route.link].name if route.link in links else "a route"
            for route in rtnetlink.routes(channel.dump(rtnetlink.all_routes(4)))
            if route.destination.prefixlen and route.link != own
        }
        for link, address in rtnetlink.addresses(channel.dump(rtnetlink.all_addresses(4))):
            if link != own:
                taken[address.network] = links[link].name if link in links else "another interface"
        recorded = self._leases.subnets()
        first = self._subnet or (ip_network(recorded[0]) if recorded else None)
        clash = next((other for other in taken if first and first.overlaps(other)), None)
        if clash and self._subnet:
            raise Unavailable(f"{self._subnet_key} {first}: overlaps {clash} of {taken[clash]}")
        second = (self._subnet6,) if self._subnet6 else ()
        if clash or not first:
            free = (subnet.choose(self._instance, taken), *second)
            if self._leases.record_subnets(free):
                return free
        self._late = False
        if first and self._leases.record_subnets(wanted := (first, *second)):
            return wanted
        if self._subnet_key == _POD_CIDR and recorded:
            self._late = True
            return tuple(ip_network(cidr) for cidr in recorded)
        raise Unavailable(f"{self._subnet_key}: pods still have addresses of {', '.join(recorded)}; remove them first")

    def _set_gateways(self, channel: Channel, index: int, subnets: Sequence[IpNetwork]) -> None:
        """Exactly the gateways' addresses on the bridge."""
        wanted = {ip_interface((pair.gateway(net).packed, net.prefixlen)) for net in subnets}
        found = {
            address
            for version in (4, 6)
            for link, address in rtnetlink.addresses(channel.dump(rtnetlink.all_addresses(version)))
            if link == index and not address.ip.is_link_local
        }
        channel.do(
            *(rtnetlink.remove_address(index, address) for address in found - wanted),
            *(rtnetlink.add_address(index, address) for address in wanted - found),
        )

    def status(self) -> NetworkStatus:
        try:
            ready = self._ready
            if not ready or not self._intact(ready) or (self._late and not self.used):
                self._set_up(ready)
            self._sweep(self._leases.released())
            self._leases.checkpoint()
            if self._found.reason == _FIREWALL:
                with _explained("nftables"):
                    self._found = self._firewall()
        except CribError as error:
            return NetworkStatus(ready=False, reason="BridgeNotReady", message=str(error))
        return self._found

    def _intact(self, ready: Bridge) -> bool:
        """Whether what setup made is still there."""
        with _explained(f"bridge {self.bridge}"):
            with Channel() as channel:
                if not _present(channel, ready):
                    return False
            return self._rules.intact()

    def changes(self) -> Transactions | None:
        try:
            return Transactions()
        except Unsupported:
            return None

    def restore(self) -> None:
        ready = self._ready
        if ready and not self._rules.intact():
            logger.warning("table=%s somebody has removed it: putting it back", self._rules.table)
            self._set_up(ready)

    def teardown(self) -> None:
        with self._setup_lock, _explained(f"bridge {self.bridge}"), Channel() as channel:
            leases = self._leases.all()
            if attached := [lease for lease in leases if not lease.released]:
                raise WrongState(f"bridge {self.bridge}: {len(attached)} pods are attached")
            for lease in leases:
                pair.remove(channel, lease, self._recorded())
                self._leases.free(lease.sandbox_id)
            self._ready = None
            self._rules.remove()
            bridge = pair.find(channel, self.bridge)
            if bridge and self._ours(bridge):
                channel.do(rtnetlink.remove_link(self.bridge))

    # One pod

    def attach(self, pod: PodIdentity, netns: NetNs, wants: Wants = NOTHING) -> Attachment:
        if netns.rtnl is None:
            raise InvalidSpec(f"pod {pod.namespace}/{pod.name}: no netlink socket of its namespace was given")
        ready = self._ready or self._set_up(None)
        with _explained(f"pod {pod.namespace}/{pod.name}: {pair.host_interface(pod.sandbox_id)} on {self.bridge}"):
            check(wants.host_ports, ready.subnets)
            lease = self._lease(pod, ready, wants)
            try:
                with Channel() as host, Channel(opened=netns.rtnl) as inside:
                    if not _present(host, ready):  # removed behind our back
                        ready = self._set_up(ready)
                    pair.connect(lease, netns, wants, ready, host, inside)
                if wants.host_ports:
                    self._rules.open(pod.sandbox_id, ready.subnets)
            except BaseException:
                self._undo(lease, ready)
                raise
        return pair.attachment(lease, ready.subnets)

    def _lease(self, pod: PodIdentity, ready: Bridge, wants: Wants) -> Lease:
        last = min(net.num_addresses - (2 if net.version == 4 else 1) for net in ready.subnets)
        for retry in (True, False):
            try:
                return self._leases.take(pod, last, wants.host_ports)
            except Exhausted as error:
                if retry:
                    self._sweep(self._leases.released())
                    continue
                waiting = len(self._leases.released())
                more = f" ({waiting} of them by pods whose namespaces still exist)" if waiting else ""
                raise Exhausted(f"subnet {ready.subnets[0]}: {error}{more}") from error
        raise AssertionError

    def _undo(self, lease: Lease, ready: Bridge) -> None:
        """Take a failed attach back; what can't be is left to the records."""
        try:
            with Channel() as channel:
                pair.remove(channel, lease, ready.subnets)
            self.detach(lease.sandbox_id, None)
        except (CribError, OSError) as error:
            logger.warning("sandbox=%s attach was not undone: %s", lease.sandbox_id, error)

    def detach(self, sandbox_id: str, netns_path: str | None) -> None:
        if lease := self._rules.release(sandbox_id, self._recorded()):
            self._sweep([lease, *self._leases.released(_SWEEP_LIMIT)])

    def attachment(self, sandbox_id: str) -> Attachment | None:
        lease = self._leases.find(sandbox_id)
        if not lease or lease.released:
            return None
        return pair.attachment(lease, self._recorded())

    def _recorded(self) -> list[IpNetwork]:
        """The subnets that leases count in, also before `setup`."""
        return [ip_network(recorded) for recorded in self._leases.subnets()]

    # Looking at it

    def inventory(self, *, current: bool = True) -> Inventory:
        with _explained(f"bridge {self.bridge}"):
            return report.inventory(self.bridge, self._rules.table, self._leases, current=current)

    def check_host(self) -> list[Finding]:
        status = self.status()
        ready = self._ready
        subnets = ready.subnets if ready else tuple(self._recorded())
        with _explained(f"bridge {self.bridge}"):
            rules = self._rules.table if self._config.masquerade else ""
            return report.check(status, self.bridge, rules, subnets)

    # Records and the world

    def reconcile(self, known: set[str]) -> None:
        with _explained(f"bridge {self.bridge}"), Channel() as channel:
            for lease in self._leases.all():
                if lease.sandbox_id not in known:
                    self._rules.release(lease.sandbox_id, self._recorded())
                    pair.remove(channel, lease, self._recorded())
            self._sweep(self._leases.released())
            bridge = pair.find(channel, self.bridge)
            if not bridge or not self._ours(bridge):
                return
            leased = {pair.host_interface(lease.sandbox_id) for lease in self._leases.all()}
            for link in rtnetlink.links(channel.dump(rtnetlink.all_links())):
                if link.master == bridge.index and link.mac.startswith(pair.MAC_HOST) and link.name not in leased:
                    logger.warning("interface=%s no record speaks of it: removing", link.name)
                    pair.remove_link(channel, link.name)

    def _sweep(self, leases: Sequence[Lease]) -> None:
        """Free those of the leases, all given up, whose links have gone."""
        for lease in leases:
            if pair.gone(lease):
                self._leases.free(lease.sandbox_id)


@contextlib.contextmanager
def _explained(subject: str) -> Iterator[None]:
    """Kernel errors as domain errors that name the subject."""
    try:
        yield
    except TimeoutError as error:
        raise DeadlineExceeded(f"{subject}: no answer from the kernel over netlink") from error
    except NetlinkError as error:
        kind = Exhausted if error.errno in (errno.ENOMEM, errno.ENOBUFS) else Unavailable
        raise kind(f"{subject}: {error}") from error
    except OSError as error:
        raise Unavailable(f"{subject}: {error}") from error


def _present(channel: Channel, bridge: Bridge) -> bool:
    found = pair.find(channel, bridge.name)
    return bool(found and found.index == bridge.index)


def _uplink_mtu(channel: Channel, links: dict[int, Link]) -> int:
    """The MTU of the interface that the best default route leaves by."""
    defaults = [
        route
        for version in (4, 6)
        for route in rtnetlink.routes(channel.dump(rtnetlink.all_routes(version)))
        if route.destination.prefixlen == 0 and route.link in links
    ]
    best = min(defaults, key=lambda route: (route.destination.version, route.metric), default=None)
    return min(links[best.link].mtu, 65535) if best else _DEFAULT_MTU

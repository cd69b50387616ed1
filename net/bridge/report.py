"""The built-in network for people: what there is, and what this host lacks for it."""

from collections.abc import Sequence
from ipaddress import ip_network

from net import host, nftables, rtnetlink
from net.bridge import nat, pair
from net.bridge.ipam import Leases
from net.bridge.nat import OpenPort
from net.errors import Unavailable, Unsupported
from net.netlink import Channel
from net.network import Finding, Hold, HostPort, Inventory, NetworkStatus, PodIdentity, Rule, Subject
from net.rtnetlink import IpNetwork

_RULES_FIX = (
    "a kernel with nftables, its nat and its fib (nft_masq, nft_nat, nft_fib_inet), or network.masquerade = false"
)


def inventory(bridge: str, table: str, leases: Leases, *, current: bool) -> Inventory:
    """From the records; whether the bridge is there, and the rules, from the kernel. Raises OSError, Unavailable."""
    subnets = [ip_network(recorded) for recorded in leases.subnets()]
    if not subnets:
        return Inventory()
    ports: dict[str, list[HostPort]] = {}
    for lease, port in leases.ports():
        ports.setdefault(lease.sandbox_id, []).append(port)
    holds = []
    for lease in leases.all():
        attachment = pair.attachment(lease, subnets)
        holds.append(
            Hold(
                network=bridge,
                pod=PodIdentity(sandbox_id=lease.sandbox_id, name=lease.name, namespace=lease.namespace, uid=lease.uid),
                addresses=attachment.addresses,
                host_interface=attachment.host_interface,
                host_ports=tuple(ports.get(lease.sandbox_id, ())),
                since_ns=lease.created_ns,
                released=lease.released,
            )
        )
    with Channel() as channel:
        link = pair.find(channel, bridge)
    detail = f"bridge {bridge}, MTU {link.mtu}" if link else f"bridge {bridge}, not there"
    subject = Subject(name=bridge, kind="built-in", current=current, ranges=tuple(map(str, subnets)), detail=detail)
    try:
        rules = tuple(Rule(f"inet {table}", chain, text) for chain, text in nftables.rules(table))
    except Unsupported:
        rules = ()
    return Inventory(networks=(subject,), holds=tuple(holds), rules=rules)


def check(status: NetworkStatus, bridge: str, table: str, subnets: Sequence[IpNetwork]) -> list[Finding]:
    """`table` is "" where nothing is masqueraded. Raises OSError."""
    versions = sorted({subnet.version for subnet in subnets}) or [4]
    return [
        Finding(
            name="bridge",
            ok=status.ready,
            detail=f"{bridge}: {status.message or status.reason or 'ready'}",
            fix="the cause is named; crib tries again by itself",
        ),
        *(host.forwarding(version) for version in versions),
        *(host.bridged_packets(version) for version in versions),
        *([_translation(table, bridge, subnets)] if table else []),
        _firewall(bridge),
        _uplink(),
    ]


def _translation(table: str, bridge: str, subnets: Sequence[IpNetwork]) -> Finding:
    """Whether the kernel would take every kind of rule that crib makes: asked with a table that goes at once."""
    name = f"{table}-check"
    ports = [OpenPort(HostPort("tcp", 1, 1), tuple(subnet[2] for subnet in subnets))]
    requests = nat.table(name, bridge, subnets, masquerade=True, ports=ports)
    try:
        nftables.commit(name, [*requests, nftables.delete_table(name)])
    except (Unsupported, Unavailable) as error:
        return Finding(name="nftables", ok=False, detail=str(error), fix=_RULES_FIX)
    return Finding(name="nftables", ok=True, detail="masquerading and host ports")


def _firewall(bridge: str) -> Finding:
    try:
        drops = nftables.forward_drops()
    except Unsupported:
        drops = []
    fixes = [f"nft insert rule {chain} {side} {bridge} accept" for chain in drops for side in ("iifname", "oifname")]
    return Finding(
        name="firewall",
        ok=not drops,
        detail=f"drops forwarded packets by default: {', '.join(drops)}"
        if drops
        else "nothing drops what is forwarded",
        fix="; ".join(fixes),
    )


def _uplink() -> Finding:
    """Told, and no fault: a node may have no way out."""
    with Channel() as channel:
        links = {link.index: link.name for link in rtnetlink.links(channel.dump(rtnetlink.all_links()))}
        names = {
            links.get(route.link, "")
            for version in (4, 6)
            for route in rtnetlink.routes(channel.dump(rtnetlink.all_routes(version)))
            if not route.destination.prefixlen
        }
    told = ", ".join(sorted(names - {""}))
    return Finding(name="uplink", ok=True, detail=f"default route by {told}" if told else "there is no default route")

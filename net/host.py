"""What pods' traffic needs of this host, whichever network they have."""

from net import sysctl
from net.network import Finding

_FORWARDING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
_BRIDGED = {4: "net.bridge.bridge-nf-call-iptables", 6: "net.bridge.bridge-nf-call-ip6tables"}


def forwarding(version: int) -> Finding:
    """Packets of that IP version are passed on between links."""
    name = _FORWARDING[version]
    value = sysctl.read(name)
    return Finding(
        name=f"IPv{version} forwarding",
        ok=value == "1",
        detail=f"{name} = {value}" if value else f"this kernel has no IPv{version}",
        fix=f"sysctl -w {name}=1, and a file in /etc/sysctl.d that says so" if value else "boot with it switched on",
    )


def bridged_packets(version: int) -> Finding:
    """Packets between ports of one bridge are shown to iptables, where kube-proxy may have rules for them."""
    name = _BRIDGED[version]
    value = sysctl.read(name)
    told = f"{name} = {value}" if value else "module br_netfilter is not loaded"
    fix = f"sysctl -w {name}=1, and a file in /etc/sysctl.d that says so"
    return Finding(
        name=f"IPv{version} br_netfilter",
        ok=value == "1",
        detail=told if value == "1" else f"{told}: a pod may not get an answer from a service on its own bridge",
        fix=fix if value else f"modprobe br_netfilter, and a file in /etc/modules-load.d that names it; {fix}",
    )

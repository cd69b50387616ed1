"""CNI networks for people: what there is, and what this host lacks for them."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from net import host
from net.cni.cache import Entry
from net.cni.chain import Chain
from net.cni.conf import NetworkConf
from net.cni.result import attachment
from net.errors import CribError
from net.network import Finding, Hold, HostPort, Inventory, NetworkStatus, PodIdentity, Subject

_BRIDGES = frozenset({"bridge"})
_FORWARDERS = frozenset({"bridge", "ptp"})
_IPTABLES = frozenset({"portmap", "firewall"})
_TIMEOUT_S = 10.0


def inventory(conf: NetworkConf | None, entries: Iterable[Entry], *, current: bool) -> Inventory:
    """The configuration that counts, and what was recorded of any."""
    networks: tuple[Subject, ...] = ()
    if conf:
        chain = ", ".join(plugin.type for plugin in conf.plugins)
        detail = f"{conf.path}, version {conf.version}: {chain}"
        networks = (Subject(name=conf.name, kind="CNI", current=current, ranges=(), detail=detail),)
    return Inventory(networks=networks, holds=tuple(map(_hold, entries)))


def _hold(entry: Entry) -> Hold:
    """Without a result it is an attempt of which nobody knows how far it came."""
    found = attachment(entry.result, entry.interface) if entry.result else None
    args = dict(entry.args)
    return Hold(
        network=entry.network,
        pod=PodIdentity(
            sandbox_id=entry.container_id,
            name=args.get("K8S_POD_NAME", ""),
            namespace=args.get("K8S_POD_NAMESPACE", ""),
            uid=args.get("K8S_POD_UID", ""),
        ),
        addresses=found.addresses if found else (),
        host_interface=found.host_interface if found else "",
        host_ports=tuple(_ports(entry.capabilities.get("portMappings"))),
        since_ns=0,
        released=False,
    )


def _ports(told: object) -> Iterator[HostPort]:
    for one in told if isinstance(told, list) else ():
        yield HostPort(one["protocol"], one["hostPort"], one["containerPort"], one["hostIP"])


def check(status: NetworkStatus, directory: Path, conf: NetworkConf | None, chain: Chain) -> list[Finding]:
    """The configuration, each plugin, and what plugins of that name need."""
    configuration = Finding(
        name="configuration",
        ok=conf is not None and not status.message,
        detail=status.message or (f"{conf.name} in {conf.path}" if conf else ""),
        fix=f'a valid network configuration in {directory}, or network.plugin = "builtin"',
    )
    if not conf:
        return [configuration]
    kinds = [kind for plugin in conf.plugins for kind in (plugin.type, _ipam(plugin.conf)) if kind]
    findings = [_plugin(kind, conf, chain) for kind in dict.fromkeys(kinds)]
    if all(finding.ok for finding in findings):
        findings.insert(0, configuration)
    if _FORWARDERS.intersection(kinds):
        findings.append(host.forwarding(4))
    if _BRIDGES.intersection(kinds):
        findings.append(host.bridged_packets(4))
    if users := sorted(_IPTABLES.intersection(kinds)):
        path = shutil.which("iptables")
        text = f"plugin {', '.join(users)} runs it"
        findings.append(
            Finding(name="iptables", ok=bool(path), detail=path or f"not on PATH: {text}", fix="install it")
        )
    return findings


def _ipam(conf: dict[str, object]) -> str:
    """The plugin that this one asks for addresses."""
    ipam = conf.get("ipam")
    kind = ipam.get("type") if isinstance(ipam, dict) else None
    return kind if isinstance(kind, str) else ""


def _plugin(kind: str, conf: NetworkConf, chain: Chain) -> Finding:
    name = f"plugin {kind}"
    try:
        return Finding(name=name, ok=True, detail=chain.find(kind, conf, _TIMEOUT_S))
    except CribError as error:
        fix = "install it (containernetworking-plugins has the usual ones), or set network.cni_plugin_dirs"
        return Finding(name=name, ok=False, detail=str(error), fix=fix)

"""The CNI network: what `net.network.Network` promises, by plugins.

Order of effects: an entry in the cache is on disk before the first plugin runs, and goes once DEL has succeeded. DEL
takes the configuration that ADD had, from the entry, whatever the directory holds by then.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from net import rtnetlink
from net.cni import report, template
from net.cni.cache import Cache, Entry
from net.cni.chain import Chain, Target
from net.cni.conf import Directory, Json, NetworkConf, parse
from net.cni.result import attachment
from net.errors import CribError, NotFound, Unavailable
from net.netlink import Channel
from net.network import NOTHING, Attachment, Finding, Inventory, NetNs, NetworkStatus, PodIdentity, Wants

logger = logging.getLogger(__name__)

NOT_READY: Final = "NetworkPluginNotReady"
_INTERFACE: Final = "eth0"
_BURST_BITS: Final = (1 << 32) - 1  # what the bandwidth plugin takes at most, as other runtimes set it
_STATUS_TIMEOUT_S: Final = 10.0
_STATUS_VALID_S: Final = 10.0
_CHECK_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CniConfig:
    """`cache_dir` is where attachments are recorded; `template` "" means that none is filled in."""

    conf_dir: str = "/etc/cni/net.d"
    plugin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
    cache_dir: str = "/var/lib/cni"
    template: str = ""
    timeout_s: float = 60.0


class CniNetwork:
    """See `net.network.Network`."""

    def __init__(self, instance: str, config: CniConfig) -> None:
        self._owner = instance
        self._config = config
        self._directory = Directory(Path(config.conf_dir))
        self._others: dict[str, Directory] = {}
        self._chain = Chain(config.plugin_dirs, config.timeout_s)
        self._cache = Cache(Path(config.cache_dir))
        self._gate = _Gate()
        self._cidrs: tuple[str, ...] = ()
        self._stale: list[Entry] = []
        self._told: tuple[NetworkConf, float] | None = None

    @property
    def pod_sysctls(self) -> Mapping[str, str]:
        return {}

    @property
    def configured(self) -> bool:
        """Whether the directory holds a configuration, be it a broken one."""
        return self._directory.look().configured

    @property
    def conf(self) -> NetworkConf | None:
        """The configuration that counts now."""
        return self._directory.look().conf

    def setup(self) -> None:
        """Nothing is shared but what plugins share."""

    def close(self) -> None:
        """Nothing is held open."""

    def teardown(self) -> None:
        """Plugins end what they made with its last user, or not at all."""

    # One pod

    def attach(self, pod: PodIdentity, netns: NetNs, wants: Wants = NOTHING) -> Attachment:
        conf = self._usable(wants.conf_dir)
        title = f"pod {pod.namespace}/{pod.name}: network {conf.name}"
        args = (
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", pod.namespace),
            ("K8S_POD_NAME", pod.name),
            ("K8S_POD_INFRA_CONTAINER_ID", pod.sandbox_id),
            ("K8S_POD_UID", pod.uid),
        )
        entry = Entry(
            network=conf.name,
            container_id=pod.sandbox_id,
            interface=_INTERFACE,
            netns=netns.path,
            config=conf.source,
            args=args,
            capabilities=_capabilities(wants, self._cidrs),
            result=None,
            owner=self._owner,
        )
        with self._gate.shared():
            for earlier in self._cache.of(pod.sandbox_id, self._owner):  # an interrupted attempt's
                self._delete(earlier, netns.path)
            _loopback_up(netns, title)
            self._cache.put(entry, durable=True)
            try:
                result = self._chain.add(conf, _target(entry, netns.path))
                found = attachment(result, _INTERFACE)
                self._cache.put(replace(entry, result=result), durable=False)
            except BaseException as error:
                try:
                    self._delete(entry, netns.path)
                except CribError as failure:  # it stays recorded, and owed
                    logger.warning("sandbox=%s attach was not undone: %s", pod.sandbox_id, failure)
                if isinstance(error, CribError):
                    raise type(error)(f"{title}: {error}") from error
                raise
        return found

    def _usable(self, conf_dir: str = "") -> NetworkConf:
        """The configuration, if its plugins are there and speak its version."""
        directory = self._others.setdefault(conf_dir, Directory(Path(conf_dir))) if conf_dir else self._directory
        found = directory.look()
        if not found.conf:
            problems = "; ".join(found.problems)
            raise Unavailable(f"no usable CNI configuration in {directory.path}{': ' if problems else ''}{problems}")
        self._chain.validate(found.conf, _STATUS_TIMEOUT_S)
        return found.conf

    def detach(self, sandbox_id: str, netns_path: str | None) -> None:
        with self._gate.shared():
            for entry in self._cache.of(sandbox_id, self._owner):
                self._delete(entry, netns_path or "")

    def _delete(self, entry: Entry, netns_path: str) -> None:
        """DEL with what ADD had; the entry goes when it has succeeded."""
        conf = parse(entry.config, f"configuration of network {entry.network} as cached")
        self._chain.delete(conf, _target(entry, netns_path if os.path.exists(netns_path) else ""), entry.result)
        self._cache.remove(entry)

    def attachment(self, sandbox_id: str) -> Attachment | None:
        for entry in self._cache.of(sandbox_id, self._owner):
            if entry.result is not None:
                return attachment(entry.result, entry.interface)
        return None

    def check(self, sandbox_id: str) -> None:
        """Have plugins compare the sandbox's attachment with what they made. Raises NotFound, PluginFailed."""
        entries = [entry for entry in self._cache.of(sandbox_id, self._owner) if entry.result is not None]
        if not entries:
            raise NotFound(f"sandbox {sandbox_id} has no CNI attachment")
        with self._gate.shared():
            for entry in entries:
                conf = parse(entry.config, f"configuration of network {entry.network} as cached")
                self._chain.check(conf, _target(entry, entry.netns), entry.result or {})

    # All of them

    def status(self) -> NetworkStatus:
        try:
            conf = self._usable()
            if not self._told or self._told[0] is not conf or time.monotonic() - self._told[1] > _STATUS_VALID_S:
                self._chain.status(conf, min(_STATUS_TIMEOUT_S, self._config.timeout_s))
                self._told = (conf, time.monotonic())
        except CribError as error:
            self._told = None
            return NetworkStatus(ready=False, reason=NOT_READY, message=str(error))
        problems = self._directory.look().problems
        return NetworkStatus(ready=True, message=f"ignored: {'; '.join(problems)}" if problems else "")

    def inventory(self, *, current: bool = True) -> Inventory:
        entries = [entry for entry in self._cache.all() if entry.owner == self._owner]
        return report.inventory(self._directory.look().conf, entries, current=current)

    def check_host(self) -> list[Finding]:
        found = report.check(self.status(), self._directory.path, self._directory.look().conf, self._chain)
        return [*found, self._checked()]

    def _checked(self) -> Finding:
        """Have plugins look at what they made (CHECK), for as long as somebody may wait."""
        deadline = time.monotonic() + _CHECK_S
        entries = [one for one in self._cache.all() if one.owner == self._owner and one.result is not None]
        wrong: list[str] = []
        left = len(entries)
        while left and time.monotonic() < deadline:
            left -= 1
            try:
                self.check(entries[left].container_id)
            except CribError as error:
                wrong.append(f"sandbox {entries[left].container_id[:12]}: {error}")
        whole = f"{len(entries) - left} as plugins made them" + (f", {left} not looked at" if left else "")
        return Finding(
            name="attachments",
            ok=not wrong,
            detail="; ".join(wrong) or whole,
            fix="remove these pods, whose successors get new attachments",
        )

    def reconcile(self, known: set[str]) -> None:
        self._stale = [one for one in self._cache.all() if one.owner == self._owner and one.container_id not in known]

    def collect(self) -> None:
        """Have plugins give up what `reconcile` found to be nobody's, and whatever else they know no owner of (GC).

        Other runtimes' attachments count as owned. May take as long as plugins may; no pod is attached meanwhile.
        """
        with self._gate.exclusive():
            stale, self._stale = self._stale, []
            for entry in stale:
                try:
                    self._delete(entry, entry.netns)
                except CribError as error:
                    logger.warning("sandbox=%s network=%s not detached: %s", entry.container_id, entry.network, error)
                    self._stale.append(entry)
            try:
                conf = self._usable()
                valid = [(one.container_id, one.interface) for one in self._cache.all() if one.network == conf.name]
                self._chain.gc(conf, valid)
            except CribError as error:
                logger.warning("CNI garbage was not collected: %s", error)

    @property
    def uncollected(self) -> bool:
        """Whether `collect` has left something to do."""
        return bool(self._stale)

    def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        self.tell_cidrs(cidrs)
        self.fill_template()

    def tell_cidrs(self, cidrs: Sequence[str]) -> None:
        """The node's pod CIDRs, for plugins that can be told, and the template."""
        self._cidrs = tuple(cidrs)

    def fill_template(self) -> None:
        """Write the configuration that waits for pod CIDRs; somebody's own is left alone.

        Raises InvalidSpec, Unavailable.
        """
        found = self._directory.look()
        ours = str(self._directory.path / template.FILE)
        if self._config.template and self._cidrs and (not found.conf or found.conf.path == ours):
            template.write(Path(self._config.template), self._directory.path, self._cidrs)


def _target(entry: Entry, netns: str) -> Target:
    return Target(
        container_id=entry.container_id,
        netns=netns,
        interface=entry.interface,
        args=entry.args,
        capabilities=entry.capabilities,
    )


def _capabilities(wants: Wants, cidrs: Sequence[str]) -> Json:
    """What plugins may ask to be told; source: CNI's CONVENTIONS.md, and containerd for the last."""
    found: Json = {}
    if wants.host_ports:
        found["portMappings"] = [
            {"hostPort": p.host_port, "containerPort": p.container_port, "protocol": p.protocol, "hostIP": p.host_ip}
            for p in wants.host_ports
        ]
    if wants.ingress_bits or wants.egress_bits:
        found["bandwidth"] = {
            "ingressRate": wants.ingress_bits,
            "ingressBurst": _BURST_BITS if wants.ingress_bits else 0,
            "egressRate": wants.egress_bits,
            "egressBurst": _BURST_BITS if wants.egress_bits else 0,
        }
    if cidrs:
        found["ipRanges"] = [[{"subnet": cidr}] for cidr in cidrs]
    dns = wants.dns
    if dns.servers or dns.searches or dns.options:
        found["dns"] = {"servers": dns.servers, "searches": dns.searches, "options": dns.options}
    rest: Json = {
        "mac": wants.mac,
        "infinibandGUID": wants.infiniband_guid,
        "aliases": wants.aliases,
        "cgroupPath": wants.cgroup_path,
        "io.kubernetes.cri.pod-annotations": dict(wants.annotations),
    }
    return found | {key: value for key, value in rest.items() if value}


def _loopback_up(netns: NetNs, title: str) -> None:
    if netns.rtnl is None:
        return
    try:
        with Channel(opened=netns.rtnl) as inside:
            inside.do(rtnetlink.up("lo"))
    except OSError as error:
        raise Unavailable(f"{title}: loopback: {error}") from error


class _Gate:
    """Any number of pods at a time, or the collection of garbage: the specification has GC run alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._alone = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._alone = True
            self._condition.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()

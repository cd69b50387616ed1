"""The node's network: CNI where a configuration exists, else the built-in bridge; decided anew for every pod.

A pod stays with the network that it got its address from, whatever comes or goes afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Final

from net.bridge import BridgeConfig, BridgeNetwork
from net.cni import CniConfig, CniNetwork
from net.errors import InvalidSpec, Unavailable, WrongState
from net.network import (
    NOTHING,
    Attachment,
    Finding,
    Inventory,
    NetNs,
    NetworkStatus,
    PodIdentity,
    Wants,
)
from net.transactions import Transactions

CHOICES: Final = ("auto", "cni", "builtin")
_CIDR_LIMIT: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """`plugin`: "auto" (CNI where there is a configuration), "cni" (wait for one) or "builtin"."""

    plugin: str = "auto"
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    cni: CniConfig = field(default_factory=CniConfig)


class NodeNetwork:
    """See `net.network.Network`."""

    def __init__(self, instance: str, root: Path, config: NetworkConfig) -> None:
        if config.plugin not in CHOICES:
            raise InvalidSpec(f"network.plugin {config.plugin!r}: none of {', '.join(CHOICES)}")
        self._plugin = config.plugin
        self._cidr_file = root / "pod-cidrs"
        self.bridge = BridgeNetwork(instance, root, config.bridge)
        self.cni = CniNetwork(instance, config.cni)
        self._bridge_idle = False
        self.cni.tell_cidrs(recorded := self._recorded())
        self.bridge.tell_cidrs(recorded)

    @property
    def builtin(self) -> bool:
        """Whether new pods get the built-in network."""
        return self._plugin == "builtin" or (self._plugin == "auto" and not self.cni.configured)

    @property
    def _current(self) -> BridgeNetwork | CniNetwork:
        return self.bridge if self.builtin else self.cni

    @property
    def pod_sysctls(self) -> Mapping[str, str]:
        return self._current.pod_sysctls

    def setup(self) -> None:
        if self.builtin or self.bridge.used:
            self.bridge.setup()

    def attach(self, pod: PodIdentity, netns: NetNs, wants: Wants = NOTHING) -> Attachment:
        current = self.cni if wants.conf_dir else self._current
        if current is self.bridge:
            self._bridge_idle = False
        return current.attach(pod, netns, wants)

    def detach(self, sandbox_id: str, netns_path: str | None) -> None:
        self.cni.detach(sandbox_id, netns_path)
        self.bridge.detach(sandbox_id, netns_path)

    def attachment(self, sandbox_id: str) -> Attachment | None:
        return self.bridge.attachment(sandbox_id) or self.cni.attachment(sandbox_id)

    def status(self) -> NetworkStatus:
        if self.builtin:
            self._bridge_idle = False
            return self.bridge.status()
        if not self._bridge_idle:  # CNI's turn: the bridge goes with its last pod
            try:
                self.bridge.teardown()
                self._bridge_idle = True
            except WrongState:
                self.bridge.status()
        return self.cni.status()

    def changes(self) -> Transactions | None:
        """Of the built-in network only; where another one's rules change all the time they aren't even told."""
        return self.bridge.changes() if self.builtin else None

    def restore(self) -> None:
        if self.builtin or self.bridge.used:
            self.bridge.restore()

    def inventory(self) -> Inventory:
        builtin = self.builtin
        return self.bridge.inventory(current=builtin) + self.cni.inventory(current=not builtin)

    def check_host(self) -> list[Finding]:
        if self.builtin:
            return self.bridge.check_host()
        return [*(self.bridge.check_host() if self.bridge.used else ()), *self.cni.check_host()]

    def reconcile(self, known: set[str]) -> None:
        self.bridge.reconcile(known)
        self.cni.reconcile(known)

    def collect(self) -> None:
        if self.cni.uncollected or not self.builtin:
            self.cni.collect()

    def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        for cidr in cidrs:
            if len(cidr) > _CIDR_LIMIT:
                raise InvalidSpec(f"pod CIDR {cidr[:_CIDR_LIMIT]!r}…: {len(cidr)} characters")
            try:
                ip_network(cidr)
            except ValueError as error:
                raise InvalidSpec(f"pod CIDR {cidr!r}: {error}") from error
        try:
            self._cidr_file.write_text(" ".join(cidrs))
        except OSError as error:
            raise Unavailable(f"pod CIDRs {self._cidr_file}: {error.strerror}") from error
        self.cni.set_pod_cidrs(cidrs)
        if self.builtin:
            self.bridge.set_pod_cidrs(cidrs)

    def _recorded(self) -> list[str]:
        """What the kubelet said last, to an earlier cribd perhaps."""
        try:
            return self._cidr_file.read_text().split()
        except OSError:
            return []

    def teardown(self) -> None:
        self.bridge.teardown()

    def close(self) -> None:
        self.bridge.close()
        self.cni.close()

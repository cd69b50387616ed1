"""What a pod's network is to the rest of crib: the types that cross the room's door."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from net.transactions import Transactions


@dataclass(frozen=True, slots=True, kw_only=True)
class PodIdentity:
    """Who gets the address. `sandbox_id` is the key; the rest is for people, plugins and their arguments."""

    sandbox_id: str
    name: str
    namespace: str
    uid: str


@dataclass(frozen=True, slots=True)
class HostPort:
    """A port of the node that leads to one of the pod's; `protocol` is tcp, udp or sctp, `host_ip` "" any address."""

    protocol: str
    host_port: int
    container_port: int
    host_ip: str = ""

    def __str__(self) -> str:
        at = f"[{self.host_ip}]:" if ":" in self.host_ip else f"{self.host_ip}:" if self.host_ip else ""
        return f"{at}{self.host_port}/{self.protocol}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dns:
    """What the pod resolves names with."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What a pod asks of its network beyond an address. Rates in bits per second, 0 for no limit.

    The built-in network heeds host ports and rates; the rest is for CNI plugins that declare the capability.
    `annotations` are the pod's own, all of them. `conf_dir`: where its CNI configuration is, "" for the node's network.
    """

    host_ports: tuple[HostPort, ...] = ()
    ingress_bits: int = 0
    egress_bits: int = 0
    mac: str = ""
    infiniband_guid: str = ""
    aliases: tuple[str, ...] = ()
    dns: Dns = Dns()
    cgroup_path: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    conf_dir: str = ""


NOTHING: Final = Wants()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetNs:
    """A pod's network namespace; descriptors stay the caller's.

    `path` is its pin under /run/netns, `fd` the namespace, `rtnl` a NETLINK_ROUTE socket that was opened inside it
    (its owner uses it for nothing else while a call of this room has it).
    """

    path: str
    fd: int
    rtnl: socket.socket | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """What a pod got. `addresses` have prefix lengths ("10.88.0.5/16"), primary first; `gateway` is its router."""

    interface: str
    addresses: tuple[str, ...]
    gateway: str
    mac: str
    host_interface: str

    @property
    def ips(self) -> tuple[str, ...]:
        """The addresses without prefix length, primary first."""
        return tuple(address.partition("/")[0] for address in self.addresses)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkStatus:
    """The CRI's NetworkReady condition. `reason` is a CamelCase word, empty while nothing is to be told.

    A ready network may still have a `message`: something on this host that it can't do anything about.
    """

    ready: bool
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A network of this node; `detail` is where it comes from. Of several the `current` one gets new pods."""

    name: str
    kind: str
    current: bool
    ranges: tuple[str, ...]
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What a sandbox holds of a network: addresses and host ports; none of the latter once it is `released`.

    `since_ns` is 0 where nobody has noted it.
    """

    network: str
    pod: PodIdentity
    addresses: tuple[str, ...]
    host_interface: str
    host_ports: tuple[HostPort, ...]
    since_ns: int
    released: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that the kernel has now; `text` says what it is for."""

    table: str
    chain: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Networks, what pods hold of them, and the rules made for that."""

    networks: tuple[Subject, ...] = ()
    holds: tuple[Hold, ...] = ()
    rules: tuple[Rule, ...] = ()

    def __add__(self, other: "Inventory") -> "Inventory":
        return Inventory(
            networks=self.networks + other.networks, holds=self.holds + other.holds, rules=self.rules + other.rules
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that pods' traffic needs of this host; `fix` says what to do while `ok` is false."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


class Network(Protocol):
    """Gives pods addresses. Safe to use from several threads; calls for one sandbox must not overlap.

    Every call blocks (milliseconds), so none belongs in an event loop. Raises the classes of `net.errors`.
    """

    @property
    def pod_sysctls(self) -> Mapping[str, str]:
        """Kernel parameters that a pod's namespace must have before `attach`: only a process inside can set them."""

    def setup(self) -> None:
        """Make what all pods share. Idempotent; puts back what is missing, so it is also the repair."""

    def attach(self, pod: PodIdentity, netns: NetNs, wants: Wants = NOTHING) -> Attachment:
        """Connect the pod's namespace. The same sandbox again gets the same addresses; a failure leaves nothing.

        Raises AlreadyExists where a host port is another's.
        """

    def detach(self, sandbox_id: str, netns_path: str | None) -> None:
        """Give up the sandbox's addresses and host ports.

        Succeeds for what is gone or never was, and without the namespace.
        """

    def attachment(self, sandbox_id: str) -> Attachment | None:
        """What the sandbox was given, from the records; None when it has nothing."""

    def status(self) -> NetworkStatus:
        """Whether pods can be attached now, and why not. Tries to repair first."""

    def changes(self) -> Transactions | None:
        """News of what others may have removed, after which `restore` puts it back; None where nothing can tell.

        The caller closes it.
        """

    def restore(self) -> None:
        """Put back what others have removed of the rules."""

    def inventory(self) -> Inventory:
        """What there is: from the records, and the rules from the kernel."""

    def check_host(self) -> list[Finding]:
        """What this host has, and lacks, of what the network needs."""

    def reconcile(self, known: set[str]) -> None:
        """Free what no sandbox in `known` owns. For the start of the daemon, before pods are made."""

    def collect(self) -> None:
        """Take back what `reconcile` found and can only be asked for slowly. Never in the way of a daemon's start."""

    def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """The node's pod CIDRs, as the kubelet says. Raises InvalidSpec."""

    def teardown(self) -> None:
        """Remove what `setup` made. Raises WrongState while a pod is attached."""

    def close(self) -> None:
        """Let go of files; the network itself stays as it is."""

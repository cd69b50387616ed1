"""The network room: from a namespace path and a pod's identity to addresses."""

from pathlib import Path

from net.bridge import BridgeConfig
from net.cni import CniConfig
from net.network import Attachment, Dns, HostPort, NetNs, Network, NetworkStatus, PodIdentity, Wants
from net.node import NetworkConfig, NodeNetwork

__all__ = [
    "Attachment",
    "BridgeConfig",
    "CniConfig",
    "Dns",
    "HostPort",
    "NetNs",
    "Network",
    "NetworkConfig",
    "NetworkStatus",
    "NodeNetwork",
    "PodIdentity",
    "Wants",
    "open_network",
]


def open_network(instance: str, root: Path, config: NetworkConfig) -> NodeNetwork:
    """The network of this cribd, with its records under `root`. Changes nothing on the host before `setup`.

    `instance` tells cribds with different directories apart. Raises InvalidSpec for a configuration that can't work,
    Unavailable when the records can't be read.
    """
    return NodeNetwork(instance, root, config)

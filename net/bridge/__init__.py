"""The built-in network: a bridge, a veth pair per pod, leased addresses and masquerading, all over netlink."""

from net.bridge.bridge import BridgeConfig, BridgeNetwork

__all__ = ["BridgeConfig", "BridgeNetwork"]

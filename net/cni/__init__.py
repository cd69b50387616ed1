"""CNI: networks of plugins, as a Network."""

from net.cni.network import CniConfig, CniNetwork

__all__ = ["CniConfig", "CniNetwork"]

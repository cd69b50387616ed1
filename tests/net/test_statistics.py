"""Counters of a pod's interfaces, from outside."""

from __future__ import annotations

import pytest

from net.errors import NotFound
from net.statistics import counters
from tests.net.conftest import NewNetwork
from tests.net.given import NewNamespace, pod
from tests.net.namespaces import pinned, talk
from tests.requires import requires

pytestmark = requires("root", "bridge", "ip")


def test_what_went_through(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network()
    namespace = new_namespace()
    attachment = network.attach(pod(1), namespace.netns())
    with pinned(namespace, "crib-t1") as path:
        (before,) = counters(path)
        assert before.name == "eth0"
        talk(None, namespace, attachment.gateway)
        (after,) = counters(path)
        assert 4000 < after.tx_bytes - before.tx_bytes < 20000
        assert 4000 < after.rx_bytes - before.rx_bytes < 20000
        assert after.rx_packets > before.rx_packets
        assert (after.rx_errors, after.tx_errors) == (0, 0)


def test_a_namespace_without_links_and_one_that_is_gone(new_namespace: NewNamespace) -> None:
    with pinned(new_namespace(), "crib-t1") as path:
        assert counters(path) == []
    with pytest.raises(NotFound, match="crib-t1: gone"):
        counters(path)

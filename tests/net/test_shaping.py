"""Rates of pods on the built-in network, as the kernel has them and as bytes get through."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from net import Wants
from tests.net.conftest import NewNetwork
from tests.net.given import NewNamespace, inside, pod
from tests.net.namespaces import Namespace, pinned
from tests.requires import requires

pytestmark = requires("root", "bridge", "ip", "tbf")

RATE = 8_000_000  # bits per second: a million bytes, which a slow machine manages as well
WHOLE_BYTES = 2_000_000


def bytes_per_second(sender: Namespace | None, receiver: Namespace, address: str) -> float:
    """Measured over WHOLE_BYTES by the receiver, from its first byte on."""

    with receiver.socket() as listener, sender.socket() if sender else socket.socket() as caller:
        caller.settimeout(60)
        listener.bind((address, 0))
        listener.listen(1)
        caller.connect((address, listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted, ThreadPoolExecutor(1) as executor:
            accepted.settimeout(60)
            sent = executor.submit(caller.sendall, bytes(WHOLE_BYTES))
            left = WHOLE_BYTES - len(accepted.recv(1))
            began = time.monotonic()
            while left:
                left -= len(accepted.recv(min(left, 1 << 16)))
            took_s = time.monotonic() - began
            sent.result(60)
    return WHOLE_BYTES / took_s


@pytest.mark.parametrize("way", ["ingress", "egress"])
def test_a_rate_holds_one_way(new_network: NewNetwork, new_namespace: NewNamespace, way: str) -> None:
    network = new_network()
    limited, other = new_namespace(), new_namespace()
    wants = Wants(ingress_bits=RATE) if way == "ingress" else Wants(egress_bits=RATE)
    one = network.attach(pod(1), limited.netns(), wants)
    two = network.attach(pod(2), other.netns())
    down = bytes_per_second(other, limited, one.ips[0])
    up = bytes_per_second(limited, other, two.ips[0])
    slow, fast = (down, up) if way == "ingress" else (up, down)
    assert 0.5 * RATE < 8 * slow < 1.05 * RATE, "the headers count as well"
    assert 8 * fast > 3 * RATE, "the other way is free"


def test_both_rates_and_their_end(new_network: NewNetwork, new_namespace: NewNamespace) -> None:
    network = new_network()
    namespace = new_namespace()
    one = network.attach(pod(1), namespace.netns(), Wants(ingress_bits=RATE, egress_bits=2 * RATE))
    with pinned(namespace, "crib-t1") as path:
        assert "tbf 1: root" in inside(path, "tc qdisc show dev eth0")
        assert "rate 16Mbit burst 20000b" in inside(path, "tc qdisc show dev eth0")
        assert "rate 8Mbit" in inside("/proc/self/ns/net", f"tc qdisc show dev {one.host_interface}")
        network.attach(pod(1), namespace.netns(), Wants(ingress_bits=RATE, egress_bits=RATE))
        assert "rate 8Mbit" in inside(path, "tc qdisc show dev eth0"), "attached again: the rate of now"


@pytest.mark.parametrize(("bits", "told"), [(1000, "rate 1Kbit"), (10**11, "rate 100Gbit"), (10**15, "rate 1000Tbit")])
def test_rates_from_least_to_most(new_network: NewNetwork, new_namespace: NewNamespace, bits: int, told: str) -> None:
    network = new_network()
    namespace = new_namespace()
    network.attach(pod(1), namespace.netns(), Wants(ingress_bits=bits, egress_bits=bits))
    with pinned(namespace, "crib-t1") as path:
        assert told in inside(path, "tc qdisc show dev eth0")

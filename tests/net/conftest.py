"""Namespaces and networks that are gone after the test."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from net import BridgeConfig
from net.bridge import BridgeNetwork
from net.errors import CribError
from net.netns import Pins
from runtime.linux.mount import mount, umount
from tests.net.namespaces import Maker, Namespace
from tests.requires import missing

_SYSCTLS = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")

NewNetwork = Callable[..., BridgeNetwork]


@pytest.fixture
def new_namespace() -> Iterator[Callable[[], Namespace]]:
    """Makes namespaces; those that the test didn't end are ended after it."""
    with Maker() as maker, ExitStack() as stack:

        def new() -> Namespace:
            namespace = maker.new()
            stack.callback(namespace.end)
            return namespace

        yield new


@pytest.fixture
def pins() -> Pins:
    return Pins(mount, umount)


@pytest.fixture
def sysctls() -> Iterator[None]:
    """What a network's setup changes on the host, put back after the test."""
    files = [path for name in _SYSCTLS if (path := Path("/proc/sys", name)).exists()]
    before = {path: path.read_text() for path in files}
    yield
    for path, value in before.items():
        path.write_text(value)


@pytest.fixture
def new_network(tmp_path: Path, sysctls: None) -> Iterator[NewNetwork]:
    """Opens networks: `new_network(instance="crib-t", **config)`; the same instance has the same records.

    They masquerade where the kernel can.
    """
    opened: list[BridgeNetwork] = []

    def new(instance: str = "crib-t", **config: object) -> BridgeNetwork:
        config.setdefault("masquerade", missing("nft") is None)
        network = BridgeNetwork(instance, tmp_path / instance, BridgeConfig(**config))  # type: ignore[arg-type]
        opened.append(network)
        return network

    yield new
    for network in opened:
        try:
            network.reconcile(set())
            network.teardown()
        except CribError:  # of a test about a network that can't work
            pass
        network.close()


@pytest.fixture
def outside(new_namespace: Callable[[], Namespace], pins: Pins) -> Iterator[Namespace]:
    """A host beyond this one, at 198.51.100.2 and 2001:db8::2; it knows no way to any pod. The link's MTU is 1400."""
    namespace = new_namespace()
    path = pins.pin(namespace.fd, "outside")
    try:
        for command in (
            "link add up0 mtu 1400 type veth peer name eth0 netns outside",
            "address add 198.51.100.1/24 dev up0",
            "address add 2001:db8::1/64 dev up0 nodad",
            "link set up0 up",
            "-n outside link set eth0 mtu 1400 up",
            "-n outside address add 198.51.100.2/24 dev eth0",
            "-n outside address add 2001:db8::2/64 dev eth0 nodad",
            "route add default via 198.51.100.2",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        yield namespace
        subprocess.run(["ip", "link", "delete", "up0"], check=True)
    finally:
        pins.unpin(path)

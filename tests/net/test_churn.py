"""Many pods made and removed while everything they need fails at some point: nothing is left.

CRIB_CHURN says how many (default 52); before a release 500 is right.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from net import HostPort, Wants
from net.bridge import BridgeNetwork
from net.bridge.ipam import Leases
from net.errors import CribError, Exhausted, Unavailable
from net.netlink import Channel, NetlinkError
from net.netns import Pins
from tests.net.conftest import NewNetwork
from tests.net.given import NewNamespace, ip, nft, pod
from tests.net.namespaces import LinkWatch, Namespace
from tests.net.test_cni import HOME, Host, bridge_list, make_host
from tests.requires import requires

PODS = int(os.environ.get("CRIB_CHURN", "52"))

# Plugins that fail

PLUGINS = ("bridge", "host-local", "portmap")
WAYS = ("before", "after", "garbage", "killed")
POINTS = (None, *itertools.product(PLUGINS, WAYS))
FAULTY = """#!/bin/sh
# Runs the plugin of this name; where an order lies for this call, it fails once: before or after its work.
name=${0##*/} way=
if [ -f "ORDERS/$name.$CNI_COMMAND.$CNI_CONTAINERID" ]; then
    read -r way < "ORDERS/$name.$CNI_COMMAND.$CNI_CONTAINERID"
    rm "ORDERS/$name.$CNI_COMMAND.$CNI_CONTAINERID"
fi
[ -z "$way" ] && exec "HOME/$name"
[ "$way" = before ] || "HOME/$name" > /dev/null
case $way in
    garbage) echo garbage; [ $CNI_COMMAND = ADD ] && exit 0;;
    killed) kill -9 $$;;
    *) echo '{"cniVersion": "1.0.0", "code": 999, "msg": "ordered"}';;
esac
exit 1
"""


@pytest.fixture
def faulty(tmp_path: Path, sysctls: None) -> Iterator[Host]:
    host = make_host(tmp_path)
    (tmp_path / "orders").mkdir()
    for name in PLUGINS:
        path = tmp_path / "bin" / name
        path.write_text(FAULTY.replace("ORDERS", str(tmp_path / "orders")).replace("HOME", HOME))
        path.chmod(0o755)
    conf = bridge_list(tmp_path, "1.0.0", "10.77.0.0/20")
    # The bridge plugin forgets whom it masquerades when host-local's DEL fails: no runtime can help that.
    conf["plugins"][0]["ipMasq"] = False
    host.conf(conf)
    yield host
    subprocess.run("ip link delete cnitest0".split(), check=False, capture_output=True)
    nft("flush", "ruleset")


def rules() -> str:
    """All rules of iptables and nft, without counters."""
    return re.sub(r"counter packets \d+ bytes \d+", "counter", nft("list", "ruleset"))


@requires("root", "bridge", "ip", "cni", "nft", "xtables")
@pytest.mark.timeout(60 + 4 * PODS)
def test_cni(faulty: Host, new_namespace: NewNamespace, pins: Pins) -> None:
    def order(command: str, number: int, point: tuple[str, str] | None) -> bool:
        if point:
            path = faulty.path / "orders" / f"{point[0]}.{command}.{pod(number).sandbox_id}"
            path.write_text(f"{point[1]}\n")
        return point is not None

    def live(number: int, namespace: Namespace) -> bool:
        """One pod's life; whether its ADD failed. What the kubelet asks for again is asked for again."""
        path = pins.pin(namespace.fd, f"crib-t{number}")
        fails = order("ADD", number, POINTS[number % len(POINTS)])
        disturbed = order("DEL", number, POINTS[(number // len(POINTS) + number) % len(POINTS)])
        wants = Wants(host_ports=(HostPort("tcp", 20000 + number, 80), HostPort("udp", 20000 + number, 80)))
        netns = type(namespace.netns())(path=path, fd=namespace.fd, rtnl=namespace.rtnl)
        if fails:
            with pytest.raises(CribError, match=f"pod tests/p{number}: network bridged: "):
                faulty.network.attach(pod(number), netns, wants)
        else:
            assert faulty.network.attach(pod(number), netns, wants).ips
        if disturbed and not fails:
            with pytest.raises(CribError):
                faulty.network.detach(pod(number).sandbox_id, path)
        faulty.network.detach(pod(number).sandbox_id, path)
        pins.unpin(path)
        namespace.end()
        return fails

    live(0, new_namespace())  # makes what all share
    before = rules()
    numbers = range(PODS)
    spaces = [new_namespace() for _ in numbers]
    with ThreadPoolExecutor(8) as executor:
        failed = list(executor.map(live, numbers, spaces))
    assert failed.count(True) == sum(number % len(POINTS) != 0 for number in numbers)
    assert list((faulty.path / "orders").iterdir()) == []
    assert faulty.cached() == []
    assert [one.name for one in (faulty.path / "leases/bridged").iterdir() if one.name[0] in "1f"] == []
    assert pins.list_pins("crib-t") == []
    assert [link["ifname"] for link in ip("link", "show", "master", "cnitest0")] == []
    assert rules() == before


# A kernel that fails


class Crash(BaseException):
    """The daemon ends here: nothing that comes behind, no clean-up either, reaches the kernel."""


@dataclass
class Faults(threading.local):
    """For this thread: the call to the kernel, from now on, that fails; `crash` lets all later ones fail, too."""

    left: int = -1
    crash: bool = False
    after: bool = False
    hit: bool = field(default=False)

    def order(self, left: int, *, crash: bool = False, after: bool = False) -> None:
        self.left, self.crash, self.after, self.hit = left, crash, after, False

    def due(self) -> bool:
        if self.hit:
            return self.crash
        self.left -= 1
        self.hit = self.left == -1
        return self.hit


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Every way to ask the kernel something through a Channel fails where it is ordered."""
    ordered = Faults()

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(channel: Channel, *args: Any, **more: Any) -> Any:
            if not ordered.due():
                return real(channel, *args, **more)
            if ordered.after:
                real(channel, *args, **more)
            raise Crash if ordered.crash else NetlinkError(105, "no buffer space available", 0)

        return call

    for name in ("send", "get", "dump"):
        monkeypatch.setattr(Channel, name, wrap(getattr(Channel, name)))
    return ordered


PORTS = (("tcp", 80), ("udp", 53))


def wants(number: int) -> Wants:
    return Wants(
        host_ports=tuple(HostPort(kind, 20000 + number, port) for kind, port in PORTS),
        ingress_bits=10**7,
        egress_bits=10**7,
    )


def empty(root: Path, network: BridgeNetwork, links: Sequence[str]) -> None:
    with LinkWatch() as watch:
        watch.gone(*links)
    assert network.status().ready
    records = Leases(root / "leases.db")
    try:
        assert (records.all(), records.ports()) == ([], [])
    finally:
        records.close()
    assert [link["ifname"] for link in ip("link", "show", "master", network.bridge)] == []
    assert "elements" not in nft("list", "table", "inet", "crib-t")


@requires("root", "bridge", "ip", "nft", "tbf")
@pytest.mark.timeout(60 + PODS)
def test_built_in(new_network: NewNetwork, new_namespace: NewNamespace, faults: Faults, tmp_path: Path) -> None:
    network = new_network(subnet="10.99.0.0/20", subnet6="fd00:99::/64")
    network.setup()

    def live(number: int, namespace: Namespace) -> str:
        """One pod's life: its attach or its detach fails at the call that its number says."""
        at, after, of_detach = number // 4 % 24, bool(number & 1), bool(number & 2)
        faults.order(-1 if of_detach else at, after=after)
        hit = ""
        try:
            network.attach(pod(number), namespace.netns(), wants(number))
        except (Exhausted, Unavailable):
            hit = "attach"
        faults.order(at % 6 if of_detach else -1, after=after)
        try:
            network.detach(pod(number).sandbox_id, None)
        except CribError:
            hit = hit or "detach"
        faults.order(-1)
        network.detach(pod(number).sandbox_id, None)
        namespace.end()
        return hit

    numbers = range(PODS)
    spaces = [new_namespace() for _ in numbers]
    with ThreadPoolExecutor(8) as executor:
        failed = list(executor.map(live, numbers, spaces))
    assert failed.count("attach") > PODS // 8
    empty(tmp_path / "crib-t", network, [f"veth{pod(number).sandbox_id[:11]}" for number in numbers])


@requires("root", "bridge", "ip", "nft", "tbf")
def test_a_crash_at_every_call(
    new_network: NewNetwork, new_namespace: NewNamespace, faults: Faults, tmp_path: Path
) -> None:
    """What a daemon that ends in the middle of an attach has made, the next one takes back."""
    numbers = itertools.count()
    for after in (False, True):
        for at in itertools.count():
            number = next(numbers)
            namespace = new_namespace()
            network = new_network(subnet="10.99.0.0/20", subnet6="fd00:99::/64")
            network.setup()
            faults.order(at, crash=True, after=after)
            try:
                network.attach(pod(number), namespace.netns(), wants(number))
                over = True
            except Crash:
                over = False
            faults.order(-1)
            network.close()
            restarted = new_network(subnet="10.99.0.0/20", subnet6="fd00:99::/64")
            restarted.setup()
            restarted.reconcile(set())
            assert "eth0" not in namespace.links()
            empty(tmp_path / "crib-t", restarted, [])
            restarted.close()
            namespace.end()
            if over:
                assert at > 8, "there are that many calls, at least"
                break
    new_network(subnet="10.99.0.0/20", subnet6="fd00:99::/64")  # whose end takes the rest away

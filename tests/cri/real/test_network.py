"""Pods' network by way of a cribd: what others do to it, and CNI."""

from __future__ import annotations

import contextlib
import select

import pytest

from net.transactions import Transactions
from tests.cri.real.conftest import Real
from tests.net.given import inside, nft
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "bridge", "ip", "nft", "busybox", "overlay", "seccomp")]


async def test_flushed_rules_come_back_though_nobody_asks(real: Real) -> None:
    await real.pod()
    before = nft("list", "ruleset")
    assert "masquerade" in before
    with contextlib.closing(Transactions()) as changes:
        nft("flush", "ruleset")
        changes.drain()
        while nft("list", "ruleset") != before:
            assert select.select([changes], [], [], 10)[0], real.daemon.log()
            changes.drain()


@requires("tbf")
async def test_rates_of_annotations(real: Real) -> None:
    rates = {"kubernetes.io/ingress-bandwidth": "8M", "kubernetes.io/egress-bandwidth": "16M"}
    pod = await real.pod(real.pod_config(annotations=rates))
    told = inside(f"/run/netns/crib-{pod[:32]}", "tc qdisc show dev eth0")
    assert "tbf 1: root" in told
    assert "rate 16Mbit" in told
    assert "rate 8Mbit" in inside("/proc/self/ns/net", f"tc qdisc show dev veth{pod[:11]}")

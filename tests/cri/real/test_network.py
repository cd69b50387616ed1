"""Pods' network by way of a cribd: what others do to it, and CNI."""

from __future__ import annotations

import contextlib
import select

import pytest

from net.transactions import Transactions
from tests.cri.real.conftest import Real
from tests.net.given import nft
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

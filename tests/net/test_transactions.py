"""News of nftables, as a selector sees them."""

from __future__ import annotations

import contextlib
import select

from net.transactions import Transactions
from tests.net.conftest import NewNetwork
from tests.net.given import nft
from tests.requires import requires

pytestmark = requires("root", "bridge", "ip", "nft")


def readable(changes: Transactions, timeout_s: float = 10) -> bool:
    return bool(select.select([changes], [], [], timeout_s)[0])


def test_one_word_for_each_transaction() -> None:
    with contextlib.closing(Transactions()) as changes:
        assert not readable(changes, 0)
        elements = ", ".join(str(port) for port in range(1, 20000))
        nft(f"table inet other {{ set s {{ type inet_service; elements = {{ {elements} }}; }}; }}")
        assert readable(changes)
        assert len(changes._socket.recv(65536)) < 200
        assert not readable(changes, 0), "of twenty thousand elements it is told nothing"
        for _ in range(3):
            nft("flush", "ruleset")
        changes.drain()
        assert not readable(changes, 0)


def test_more_than_the_queue_holds() -> None:
    with contextlib.closing(Transactions()) as changes:
        changes._socket.setsockopt(1, 8, 1)  # SO_RCVBUF: the least that there is
        for _ in range(40):
            nft("table", "inet", "other", "{", "}")
        assert readable(changes)
        changes.drain()
        nft("flush", "ruleset")
        assert readable(changes)


def test_what_is_removed_is_put_back(new_network: NewNetwork) -> None:
    network = new_network()
    network.setup()
    changes = network.changes()
    assert changes
    with contextlib.closing(changes):
        network.restore()
        assert not readable(changes, 0), "nothing was missing, nothing is made"
        nft("flush", "ruleset")
        assert readable(changes)
        changes.drain()
        network.restore()
        assert "masquerade" in nft("list", "table", "inet", "crib-t")

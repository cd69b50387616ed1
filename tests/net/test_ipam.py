"""Leases: never one address twice, none lost over a restart, none back at once."""

from __future__ import annotations

import ipaddress
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from net import PodIdentity
from net.bridge import subnet
from net.bridge.ipam import Leases
from net.errors import Exhausted, InvalidSpec, Unavailable

SUBNETS = (ipaddress.ip_network("10.99.0.0/29"),)
LAST = 6


def pod(name: str) -> PodIdentity:
    return PodIdentity(sandbox_id=name, name=name, namespace="tests", uid="u")


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Leases]:
    made = Leases(tmp_path / "net/leases.db")
    assert made.record_subnets(SUBNETS)
    yield made
    made.close()


def test_round_robin(leases: Leases) -> None:
    assert [leases.take(pod(name), LAST).offset for name in "abc"] == [2, 3, 4]
    leases.release("a")
    leases.free("a")
    assert [leases.take(pod(name), LAST).offset for name in "defg"[:2]] == [5, 6], "not the one just given up"
    assert leases.take(pod("f"), LAST).offset == 2


def test_the_same_sandbox_keeps_its_address(leases: Leases) -> None:
    first = leases.take(pod("a"), LAST)
    assert leases.take(pod("a"), LAST) == first
    leases.release("a")
    assert leases.take(pod("a"), LAST) == first, "taken up again before its link was gone"


def test_a_released_address_stays_taken(leases: Leases) -> None:
    for name in "abcde":
        leases.take(pod(name), LAST)
    leases.release("c")
    with pytest.raises(Exhausted, match="all 5 addresses are taken"):
        leases.take(pod("f"), LAST)
    leases.free("b")
    assert leases.find("b"), "only what was given up is freed"
    leases.free("c")
    assert leases.take(pod("f"), LAST).offset == 4


def test_restart(leases: Leases, tmp_path: Path) -> None:
    taken = leases.take(pod("a"), LAST)
    again = Leases(tmp_path / "net/leases.db")  # the first is still open, as after kill -9
    assert again.subnets() == ("10.99.0.0/29",)
    assert again.all() == [taken]
    assert again.take(pod("b"), LAST).offset == 3
    again.close()


def test_subnets_change_only_when_empty(leases: Leases) -> None:
    other = (ipaddress.ip_network("10.98.0.0/24"), ipaddress.ip_network("fd00::/64"))
    leases.take(pod("a"), LAST)
    assert not leases.record_subnets(other)
    assert leases.subnets() == ("10.99.0.0/29",)
    leases.release("a")
    leases.free("a")
    assert leases.record_subnets(other)
    assert leases.subnets() == ("10.98.0.0/24", "fd00::/64")
    assert leases.take(pod("a"), 254).offset == 2


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "leases.db"
    path.write_bytes(b"not a database, by far " * 100)
    with pytest.raises(Unavailable, match=r"leases .*/leases\.db: file is not a database"):
        Leases(path)


def test_a_newer_format(tmp_path: Path) -> None:
    path = tmp_path / "leases.db"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(Unavailable, match="format 99 is of another version of crib"):
        Leases(path)


def test_a_directory_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "net").write_text("")
    with pytest.raises(Unavailable, match="leases"):
        Leases(tmp_path / "net/leases.db")


class Machine(RuleBasedStateMachine):
    """Any order of calls and restarts, against what one would write on paper."""

    sandboxes = Bundle("sandboxes")

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases(Path(":memory:"))
        self.leases.record_subnets(SUBNETS)
        self.held: dict[str, int] = {}
        self.released: set[str] = set()
        self.latest = 1

    @rule(target=sandboxes, name=st.sampled_from("abcdefgh"))
    def take(self, name: str) -> str:
        try:
            offset = self.leases.take(pod(name), LAST).offset
        except Exhausted:
            assert len(self.held) == LAST - 1
            return name
        assert 2 <= offset <= LAST
        if name in self.held:
            assert offset == self.held[name]
        else:
            assert offset not in self.held.values()
            turn = [*range(self.latest + 1, LAST + 1), *range(2, self.latest + 1)]
            assert offset == next(number for number in turn if number not in self.held.values())
            self.latest = offset
        self.held[name] = offset
        self.released.discard(name)
        return name

    @rule(name=sandboxes)
    def release(self, name: str) -> None:
        self.leases.release(name)
        if name in self.held:
            self.released.add(name)

    @rule(name=consumes(sandboxes))
    def free(self, name: str) -> None:
        self.leases.free(name)
        if name in self.released:
            self.released.discard(name)
            del self.held[name]

    @invariant()
    def the_records_agree(self) -> None:
        assert {lease.sandbox_id: lease.offset for lease in self.leases.all()} == self.held
        assert {lease.sandbox_id for lease in self.leases.released()} == self.released

    def teardown(self) -> None:
        self.leases.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=30)


def networks(*cidrs: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(cidr) for cidr in cidrs]


def test_the_first_free_subnet() -> None:
    assert str(subnet.choose("crib", [])) == "10.88.0.0/16"
    assert str(subnet.choose("crib", networks("10.88.3.0/24", "fd00::/8", "10.89.0.0/16"))) == "10.90.0.0/16"
    assert str(subnet.choose("crib", networks("10.0.0.0/8"))) == "172.24.0.0/16"


def test_instances_start_from_different_places() -> None:
    assert len({subnet.choose(f"crib-{number}", []) for number in range(20)}) > 10


def test_no_free_subnet() -> None:
    with pytest.raises(Unavailable, match=r"no free subnet between .* set network\.subnet"):
        subnet.choose("crib-x", networks("10.0.0.0/8", "172.16.0.0/12"))


@pytest.mark.parametrize("cidr", ["", "x", "10.0.0.1/16", "10.0.0.0/31", "fd00::/64"])
def test_configured_subnets_that_cannot_be(cidr: str) -> None:
    with pytest.raises(InvalidSpec, match=r"network\.subnet"):
        subnet.configured("network.subnet", cidr, 4)

"""`crib net` and `crib net check`, against a cribd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cri.cli.conftest import Crib, loaded
from tests.cri.cli.fake import IMAGE
from tests.cri.real.daemon import Daemon
from tests.requires import requires

pytestmark = requires("root", "bridge", "busybox", "overlay", "seccomp", "nft")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with loaded("net", tmp_path_factory.mktemp("image")) as daemon:
        yield daemon


@pytest.fixture
def crib(daemon: Daemon, tmp_path: Path) -> Crib:
    return Crib(daemon.listen, tmp_path / "logs")


def test_net(crib: Crib) -> None:
    crib("run", "-d", "--name", "web", "-p", "18080:80", "-p", "127.0.0.1:15353:53/udp", IMAGE, "sleep", "100")
    told = crib.json("net")
    (network,) = told["networks"]
    assert (network["kind"], network["current"]) == ("built-in", True)
    (lease,) = told["leases"]
    address = lease["addresses"][0].partition("/")[0]
    assert (lease["pod_name"], lease["released"]) == ("web", False)
    assert {(row["host_ip"], row["host_port"], row["protocol"]) for row in told["host_ports"]} == {
        ("", 18080, "tcp"),
        ("127.0.0.1", 15353, "udp"),
    }
    assert any("to elsewhere" in rule["text"] for rule in told["rules"])
    text = crib("net")
    for words in (
        ["NETWORK", "KIND", "NEW", "PODS", "RANGE", "DETAIL"],
        ["127.0.0.1:15353/udp", "default/web", f"{address}:53"],
        ["18080/tcp", "default/web", f"{address}:80"],
    ):
        assert words in [line.split() for line in text.splitlines()]
    crib("rm", "-f", "--all")


def test_check(crib: Crib) -> None:
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    rows = {row["name"]: row for row in crib.json("net", "check")}
    assert rows["IPv4 forwarding"] == {
        "name": "IPv4 forwarding",
        "ok": True,
        "detail": "net.ipv4.ip_forward = 1",
        "fix": "",
    }
    forward.write_text("0")
    try:
        told = crib.full("net", "check", code=1).stdout.decode()
        (line,) = (line for line in told.splitlines() if line.startswith("IPv4 forwarding"))
        assert " no " in line
        assert "sysctl -w net.ipv4.ip_forward=1" in line
    finally:
        forward.write_text("1")

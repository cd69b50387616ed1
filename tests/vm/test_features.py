"""What each machine offers: a feature that tests rely on can't get lost unseen, and docs/testing.md stays true."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.requires import requires

pytestmark = [requires("root", "vm"), pytest.mark.timeout(600)]

SYSTEMD = {"systemd", "systemd-scope"}
# hugetlb: User-Mode Linux has no huge pages. Newest Debian userland on the newest kernel: no iptables-legacy modules.
NEWEST_MISSES = {"cgroup-hugetlb", "iptables-legacy"}
# As Debian 12 configures its user-mode-linux, and what came after 6.1.
OLD_MISSES = {
    *("cgroup-cpuset", "cgroup-hugetlb", "psi", "time-namespace"),
    *("iptables-nft", "nft-inet", "nft-inet-nat", "nft-ip-nat", "nft-maps"),
    *("idmapped-tmpfs", "overlay-lowerdir-add", "overlay-lowerdir-fd"),
}


@pytest.mark.parametrize(
    ("kernel", "init", "misses"),
    [
        pytest.param("newest", "--systemd", NEWEST_MISSES, marks=requires("vm-newest")),
        pytest.param("newest", "--no-systemd", NEWEST_MISSES | SYSTEMD, marks=requires("vm-newest")),
        ("6.1", "--systemd", OLD_MISSES),
        ("6.1", "--no-systemd", OLD_MISSES | SYSTEMD),
    ],
)
def test_features(vm: str, kernel: str, init: str, misses: set[str]) -> None:
    command = [vm, "features", "--kernel", kernel, init, "--timeout", "300", "--json"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    report = json.loads(output)
    missing = {name: detail for name, (there, detail) in report["features"].items() if not there}
    assert set(missing) == misses, missing
    if kernel != "newest":
        assert report["kernel"].startswith(f"{kernel}.")

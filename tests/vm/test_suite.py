"""The root tests in the test machine: on cgroup v2 with systemd all of them, then without it, and on an old kernel."""

from __future__ import annotations

import subprocess

import pytest

from tests.requires import requires

LIMIT_S = 2400

pytestmark = [requires("root", "vm"), pytest.mark.timeout(LIMIT_S + 120)]

# Without systemd what meets the cgroups: the rest doesn't know the difference.
CGROUPS = ("tests/runtime", "--ignore=tests/runtime/images", "tests/cri/real")
# On 6.1 the engine: its kernel interfaces' fallbacks are what an old kernel is for. Its User-Mode Linux is slower,
# and Debian's has no nftables for the network.
ENGINE = ("tests/runtime", "--ignore=tests/runtime/images", "tests/security")


@pytest.mark.parametrize(
    ("kernel", "init", "paths"),
    [
        pytest.param("newest", "--systemd", ("tests",), marks=requires("vm-newest")),
        pytest.param("newest", "--no-systemd", CGROUPS, marks=requires("vm-newest")),
        ("6.1", "--systemd", ENGINE),
    ],
)
def test_root_tests(
    vm: str, kernel: str, init: str, paths: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [vm, "test", "--kernel", kernel, init, "--timeout", str(LIMIT_S), "--durations=5", *paths]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    with capsys.disabled():
        summary = done.stdout.rstrip().rpartition("\n")[2].strip("= ")
        print(f"\n  guest, {kernel}, {init.lstrip('-')}: {summary}")  # noqa: T201
    if done.returncode:
        pytest.fail(f"exit status {done.returncode} of the guest:\n{done.stdout[-60_000:]}", pytrace=False)

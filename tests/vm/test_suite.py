"""The root tests in the test machine: on cgroup v2 with systemd all of them, then without it, and on an old kernel."""

from __future__ import annotations

import subprocess

import pytest

from tests.requires import requires

LIMIT_S = 2400

pytestmark = [requires("root", "vm"), pytest.mark.timeout(LIMIT_S + 120)]

# Without systemd what meets the cgroups: the rest doesn't know the difference.
CGROUPS = ("tests/runtime", "--ignore=tests/runtime/images", "tests/cri/real")
# On 6.1, which CI has: its User-Mode Linux is slower, and without nftables most of the network's tests are skipped.
MOUNTS = tuple(f"tests/cri/real/test_{name}.py" for name in ("mounts", "images", "modes"))
OLD = ("tests/runtime", "--ignore=tests/runtime/images", "tests/security", *MOUNTS)


@pytest.mark.parametrize(
    ("kernel", "init", "paths"),
    [
        pytest.param("newest", "--systemd", ("tests",), marks=requires("vm-newest")),
        pytest.param("newest", "--no-systemd", CGROUPS, marks=requires("vm-newest")),
        ("6.1", "--systemd", OLD),
    ],
)
def test_root_tests(
    vm: str, kernel: str, init: str, paths: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [vm, "test", "--kernel", kernel, init, "--timeout", str(LIMIT_S), "-rfE", "--durations=5", *paths]
    lines: list[str] = []
    with (
        capsys.disabled(),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as run,
    ):
        assert run.stdout
        print(f"\n  {' '.join(command)}")  # noqa: T201
        for line in run.stdout:
            lines.append(line)
            print("  guest:", line, end="", flush=True)  # noqa: T201 - CI is to show how far it got
    if run.returncode:
        pytest.fail(f"exit status {run.returncode} of the guest, whose output is above: {lines[-1]}", pytrace=False)

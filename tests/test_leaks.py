"""The search for leaks finds each kind, and lets go of what the kernel removes late."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import enclosure, leaks
from tests.limits import scaled
from tests.requires import requires

pytestmark = requires("root", "ip")


def sh(command: str) -> None:
    subprocess.run(["sh", "-euc", command], check=True, timeout=scaled(30))


def kill_orphan() -> None:
    for pid, text in enclosure.descendants().items():
        if text.endswith("sleep 1234"):
            os.kill(pid, signal.SIGKILL)


CGROUP = next(Path(path) for path in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if Path(path, "cgroup.procs").exists())


@pytest.mark.parametrize(
    ("kind", "make", "undo"),
    [
        ("process", lambda tmp: sh("setsid sleep 1234 & exit 0"), lambda tmp: kill_orphan()),
        ("mount", lambda tmp: sh(f"mount -t tmpfs leak {tmp}"), lambda tmp: sh(f"umount {tmp}")),
        ("mount", lambda tmp: sh("ip netns add leak"), lambda tmp: sh("ip netns del leak")),
        ("file", lambda tmp: sh("touch /run/netns/leak"), lambda tmp: sh("rm /run/netns/leak")),
        ("network interface", lambda tmp: sh("ip link add leak type veth"), lambda tmp: sh("ip link del leak")),
        ("cgroup", lambda tmp: (CGROUP / tmp.name).mkdir(), lambda tmp: (CGROUP / tmp.name).rmdir()),
    ],
)
def test_a_leak_is_found(tmp_path: Path, kind: str, make: Callable[[Path], None], undo: Callable[[Path], None]) -> None:
    tmp = tmp_path / f"crib-{uuid.uuid4()}"
    tmp.mkdir()
    before = leaks.Machine.now()
    make(tmp)
    left = leaks.left_since(before, settle_s=0)
    undo(tmp)
    assert any(text.startswith(kind) for text in left), left
    assert leaks.left_since(before) == []


@requires("nft")
def test_a_table_is_found() -> None:
    before = leaks.Machine.now()
    sh("nft add table inet leak")
    left = leaks.left_since(before, settle_s=0)
    sh("nft delete table inet leak")
    assert left == ["nft table inet leak"]


def test_a_link_that_goes_with_its_namespace_is_no_leak() -> None:
    before = leaks.Machine.now()
    sh("ip netns add late; ip link add late type veth peer name peer netns late; ip netns del late")
    assert leaks.left_since(before) == []

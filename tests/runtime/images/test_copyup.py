"""What is copied for an image's VOLUMEs, and what that counts for. As a whole: tests/cri/real/test_volumes.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.images.copyup import Copier, LimitReached
from tests.requires import requires

pytestmark = requires("root")

ENTRY = 4096


def copied(root: Path, target: Path, limit_bytes: int) -> None:
    target.mkdir()
    here = os.open(".", os.O_PATH)  # the program goes from directory to directory
    fds = os.open(root, os.O_PATH), os.open(target, os.O_RDONLY)
    try:
        Copier(fds[0], limit_bytes, ENTRY).copy("v", fds[1])
    finally:
        os.fchdir(here)
        for fd in (*fds, here):
            os.close(fd)


@pytest.mark.parametrize("what", ["attribute", "content", "entry"])
def test_everything_counts(run_dir: Path, what: str) -> None:
    volume = run_dir / "v"
    volume.mkdir()
    (volume / "file").write_bytes(b"x" * 100 if what == "content" else b"")
    needed = ENTRY
    if what == "attribute":
        os.setxattr(volume / "file", "trusted.x", b"x" * 100)
    if what == "entry":
        os.mkfifo(volume / "fifo")
    needed += {"attribute": 100, "content": 100, "entry": ENTRY}[what]
    with pytest.raises(LimitReached, match=f"more than {needed - 1} bytes"):
        copied(run_dir, run_dir / "less", needed - 1)
    copied(run_dir, run_dir / "enough", needed)
    assert sorted(os.listdir(run_dir / "enough")) == sorted(os.listdir(volume))


def test_links_stay_links_however_many(run_dir: Path) -> None:
    volume = run_dir / "v"
    (volume / "d").mkdir(parents=True)
    (volume / "f").write_text("x")
    for number in range(1000):
        os.link(volume / "f", volume / f"d/{number}")
    copied(run_dir, run_dir / "target", 1 << 30)
    assert {entry.inode() for entry in os.scandir(run_dir / "target/d")} == {(run_dir / "target/f").stat().st_ino}
    assert (run_dir / "target/f").stat().st_nlink == 1001

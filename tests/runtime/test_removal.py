"""Removing trees that containers have filled, against real directories."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from runtime.removal import remove_tree
from tests.requires import requires


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that a removal has started."""
    started: list[str] = []
    run = subprocess.run

    def noted(command: list[str], **how: object) -> object:
        started.append(command[0])
        return run(command, **how)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", noted)
    return started


def test_a_few_entries_need_no_program(tmp_path: Path, programs: list[str]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    tree = tmp_path / "tree"
    (tree / "upper" / "etc").mkdir(parents=True)
    (tree / "upper" / "etc" / "hosts").touch()
    (tree / "upper" / "link").symlink_to(outside)
    os.mkfifo(tree / "upper" / "pipe")
    (tree / "work" / "work").mkdir(parents=True, mode=0o700)
    (tree / "work" / "work").chmod(0)
    remove_tree(tree)
    assert not tree.exists()
    assert (outside / "kept").exists()
    assert not programs


def test_many_entries(tmp_path: Path, programs: list[str]) -> None:
    tree = tmp_path / "tree"
    for number in range(100):
        (tree / "d" / str(number)).mkdir(parents=True)
    remove_tree(tree)
    assert not tree.exists()
    assert programs == ["rm"]


def test_a_deep_tree(tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    remove_tree(deep)
    assert not deep.exists()


def test_what_is_missing_or_no_directory(tmp_path: Path) -> None:
    remove_tree(tmp_path / "missing")
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    remove_tree(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert target.is_dir()


@requires("root")
def test_another_file_system_stays(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "mounted").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree / "mounted"], check=True)
    try:
        (tree / "mounted" / "kept").touch()
        with pytest.raises(OSError, match="remove"):
            remove_tree(tree)
        assert (tree / "mounted" / "kept").exists()
    finally:
        subprocess.run(["umount", tree / "mounted"], check=True)

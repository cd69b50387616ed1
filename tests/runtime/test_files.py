"""Directories made below a root that somebody else may have filled."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.linux import files
from runtime.linux.lib import SyscallError


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def _make(root: int, path: str, mode: int = 0o755) -> os.stat_result:
    made = files.make_directories(root, path, mode)
    try:
        return os.fstat(made)
    finally:
        os.close(made)


@pytest.mark.parametrize("path", ["/a/b/c", "a/b/c", "/a//b/./c/", "/a/x/../b/c"])
def test_what_is_missing_is_made(tmp_path: Path, root: int, path: str) -> None:
    assert os.path.samestat(_make(root, path), (tmp_path / "a/b/c").stat())
    assert os.path.samestat(_make(root, path), (tmp_path / "a/b/c").stat())


def test_the_mode_is_the_one_asked_for(tmp_path: Path, root: int) -> None:
    os.chmod(tmp_path, 0o2755)
    before = os.umask(0o077)
    try:
        assert _make(root, "/a/b", 0o751).st_mode & 0o7777 == 0o751
    finally:
        os.umask(before)


@pytest.mark.parametrize("target", ["/there/it/is", "there/it/is", "../../there/it/is"])
def test_a_dangling_link_is_followed_inside(tmp_path: Path, root: int, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    assert os.path.samestat(_make(root, "/link/below"), (tmp_path / "there/it/is/below").stat())


@pytest.mark.parametrize("path", ["/loop", "/loop/below", "/" + "deep/" * 60])
def test_it_ends(tmp_path: Path, root: int, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SyscallError) as raised:
        _make(root, path)
    assert raised.value.errno == errno.ELOOP


def test_a_file_is_no_directory(tmp_path: Path, root: int) -> None:
    (tmp_path / "file").touch()
    for path in ("/file", "/file/below"):
        with pytest.raises(SyscallError):
            _make(root, path)


def test_a_directory_is_spread_where_that_can_be(tmp_path: Path) -> None:
    files.spread(str(tmp_path))
    files.spread(str(tmp_path))
    files.spread("/proc/self")

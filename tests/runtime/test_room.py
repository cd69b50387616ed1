"""Databases on a full disk."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import room
from tests.requires import requires

PAGES = 100


@pytest.fixture
def disk(run_dir: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(run_dir)], check=True)
    yield run_dir
    subprocess.run(["umount", str(run_dir)], check=True)


def opened(path: Path) -> sqlite3.Connection:
    db = room.connect(path)
    db.execute("PRAGMA wal_autocheckpoint = 0")
    return db


def fill(directory: Path) -> None:
    with contextlib.suppress(OSError), open(directory / "fill", "ab", 0) as file:
        while True:
            file.write(bytes(4096))


def test_a_database_keeps_its_log_and_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for number in range(3):
        db = opened(path)
        room.reserve(db, PAGES)
        db.execute("CREATE TABLE IF NOT EXISTS t (n)")
        db.execute("INSERT INTO t VALUES (?)", (number,))
        room.close(db, path)
        assert path.stat().st_size > PAGES * 4096
        assert (tmp_path / "db-wal").stat().st_size > PAGES * 4096
        assert sorted(each.name for each in tmp_path.iterdir()) == ["db", "db-wal"]
    with sqlite3.connect(path) as db:  # somebody's who knows nothing of that
        assert db.execute("SELECT n FROM t").fetchall() == [(0,), (1,), (2,)]
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_an_old_log_that_is_in_the_way_stays_where_it_is(tmp_path: Path) -> None:
    """It would undo what came after."""
    (tmp_path / "db-wal.kept").mkdir()
    for number in range(2):
        db = opened(tmp_path / "db")
        db.execute("CREATE TABLE IF NOT EXISTS t (n)")
        db.execute("INSERT INTO t VALUES (?)", (number,))
        room.close(db, tmp_path / "db")
        assert sorted(each.name for each in tmp_path.iterdir()) == ["db", "db-wal.kept"]


@requires("root")
@pytest.mark.parametrize("closed", [False, True])
def test_there_is_no_end_to_what_can_be_deleted(disk: Path, closed: bool) -> None:
    path = disk / "db"
    db = opened(path)
    room.reserve(db, PAGES)
    db.execute("CREATE TABLE t (n, bytes)")
    db.executemany("INSERT INTO t VALUES (?, zeroblob(1000))", [(number,) for number in range(300)])
    fill(disk)
    assert not room.left(disk)
    if closed:
        room.close(db, path)
        fill(disk)
        db = opened(path)
        assert room.alone(db)
    room.reserve(db, 10 * PAGES)  # which is for another time
    folded = False
    for number in range(300):
        try:
            db.execute("DELETE FROM t WHERE n = ?", (number,))
        except sqlite3.OperationalError:
            folded = True
            room.fold_in(db)
            db.execute("DELETE FROM t WHERE n = ?", (number,))
        fill(disk)
    assert db.execute("SELECT count(*) FROM t").fetchone() == (0,)
    assert folded
    db.close()

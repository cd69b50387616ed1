"""Room in an SQLite database for when the disk is full, and somebody takes every byte that is given back.

A database in WAL mode grows in two files: its log with each write, itself when the log is folded in. Here both are
larger than they need be, so that what ends something can be written without a free byte on the disk: into the log as
far as that has come before, and when that is used up, into the same log from its start, once it has been folded into
free pages of the database. Nothing may shorten the log, then, neither a checkpoint nor the end.

The leaf of all rooms' SQL: the standard library alone.
"""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any, Final

_NEEDED_BYTES: Final = 1 << 20


def connect(path: Path, **options: Any) -> sqlite3.Connection:
    """A connection in WAL mode, where each statement is a transaction. Raises sqlite3.Error.

    On a full disk it is the only one that there can be: several would share an index of the log, in a file that is made
    anew each time.
    """
    db: sqlite3.Connection = sqlite3.connect(path, isolation_level=None, **options)
    try:
        db.execute(f"PRAGMA locking_mode = {'NORMAL' if left(path.parent) else 'EXCLUSIVE'}")
        db.execute("PRAGMA journal_mode = WAL")
        return db
    except BaseException:
        db.close()
        raise


def alone(db: sqlite3.Connection) -> bool:
    """Whether no other connection is possible."""
    return bool(db.execute("PRAGMA locking_mode").fetchone()[0] == "exclusive")


def reserve(db: sqlite3.Connection, pages: int) -> None:
    """See to it that the database has so many free pages, and that its log is as long. A full disk leaves it as it is.

    Waits for the disk.
    """
    try:
        (free,) = db.execute("PRAGMA freelist_count").fetchone()
        if free >= pages:
            return
        (size_bytes,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("CREATE TABLE IF NOT EXISTS room (bytes BLOB)")
        db.execute("INSERT INTO room VALUES (zeroblob(?))", (pages * size_bytes,))  # alone: or else it isn't written
        db.execute("DROP TABLE room")
        fold_in(db)
    except sqlite3.OperationalError as error:
        if "full" not in str(error) and "locked" not in str(error):  # another time
            raise


def fold_in(db: sqlite3.Connection) -> None:
    """Have the log begin anew in the room that it has. Waits for the disk."""
    with contextlib.suppress(sqlite3.OperationalError):
        db.execute("PRAGMA wal_checkpoint(RESTART)")


def left(directory: Path) -> bool:
    """Whether the disk has room for what is new: what is reserved is for ends."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize >= _NEEDED_BYTES


def close(db: sqlite3.Connection, path: Path) -> None:
    """Close the connection, and keep the log, which SQLite removes with the last one: as if the power had failed just
    before. Nobody may open the database meanwhile."""
    log, kept = path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-wal.kept")
    try:
        kept.unlink(missing_ok=True)
        os.link(log, kept)
    except OSError:  # what has that name now, if anything, is an old log: it would undo what came after
        db.close()
        return
    db.close()
    with contextlib.suppress(OSError):
        os.rename(kept, log)
        kept.unlink(missing_ok=True)  # where that is still the same file

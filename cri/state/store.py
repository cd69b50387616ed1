"""The records on disk: SQLite in WAL mode with synchronous NORMAL.

That survives a crash of cribd at any point, and loses at most the last writes on power loss, after which no pod runs
anyway. A write is about 15 µs into the page cache and is made in the event loop; what waits for the disk, the
checkpoint, is `checkpoint()`, for a worker thread.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from cri.state.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState, Timeline
from runtime import room
from runtime.errors import Exhausted, Unavailable

SCHEMA_VERSION: Final = 1
_CHECKPOINT_WRITES: Final = 1000
_RESERVE_PAGES: Final = 256
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS record (
    kind TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quarantine (
    kind TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL, error TEXT NOT NULL, at_ns INTEGER NOT NULL
);
"""
_PUT: Final = {
    rows: f"INSERT INTO record (kind, id, body) VALUES {', '.join(['(?, ?, ?)'] * rows)} "
    "ON CONFLICT DO UPDATE SET body = excluded.body"
    for rows in (1, 2)
}
_logger = logging.getLogger(__name__)
_Kind = TypeVar("_Kind", bound=msgspec.Struct)
_encode = msgspec.msgpack.Encoder().encode


class Store:
    """Used by the event loop's thread alone, `checkpoint` excepted.

    On a full disk what begins something raises Exhausted; for what finishes or ends it room is kept (`runtime.room`).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writes = 0
        try:
            self._db = self._open()
        except sqlite3.OperationalError as error:
            raise Unavailable(f"state database {path}: {error}") from error
        except sqlite3.DatabaseError as error:
            aside = path.with_name(f"{path.name}.broken-{time.time_ns()}")
            _logger.error("state database %s is damaged (%s): moved to %s", path, error, aside)
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
                with contextlib.suppress(FileNotFoundError):
                    path.with_name(name).rename(path.with_name(name.replace(path.name, aside.name)))
            self._db = self._open()
            _logger.warning("%s records of it could be read", self._salvage(aside))
        self._alone = room.alone(self._db)
        room.reserve(self._db, _RESERVE_PAGES)

    def _open(self) -> sqlite3.Connection:
        db = room.connect(self._path, timeout=5.0, cached_statements=32, check_same_thread=False)
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA wal_autocheckpoint = 0")
            if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found.replace("\n", " "))
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise Unavailable(
                    f"state database {self._path} has version {version}, this cribd knows up to {SCHEMA_VERSION}"
                )
            if version < SCHEMA_VERSION:
                db.executescript(_SCHEMA)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            db.close()
            raise
        return db

    def _salvage(self, damaged: Path) -> int:
        """Copy the records before the damage and those after it; how many there are."""
        with contextlib.closing(sqlite3.connect(damaged)) as old, self._together():
            for order in ("", "DESC"):
                with contextlib.suppress(sqlite3.DatabaseError):
                    for row in old.execute(f"SELECT kind, id, body FROM record ORDER BY kind {order}, id {order}"):
                        if [type(value) for value in row] == [str, str, bytes]:
                            self._db.execute("INSERT OR IGNORE INTO record VALUES (?, ?, ?)", row)
            return int(self._db.execute("SELECT count(*) FROM record").fetchone()[0])

    def close(self) -> None:
        room.close(self._db, self._path)

    def load(self) -> tuple[list[SandboxRecord], list[ContainerRecord]]:
        """All pods and containers. A record that can't be read is set aside."""
        return self._load("sandbox", SandboxRecord), self._load("container", ContainerRecord)

    def quarantined(self) -> list[tuple[str, str, str]]:
        """(kind, id, error) of the records set aside."""
        return self._db.execute("SELECT kind, id, error FROM quarantine ORDER BY at_ns").fetchall()

    def put_sandbox(self, record: SandboxRecord, timeline: Timeline | None = None) -> None:
        """Keep a pod as it is now, and how it was started."""
        rows: list[object] = ["sandbox", record.id, _encode(record)]
        if timeline is not None:
            rows += ["timeline", record.id, _encode(timeline)]
        self._put(rows, begins=record.state is SandboxState.MAKING)

    def put_container(self, record: ContainerRecord, spec: bytes | None = None) -> None:
        """Keep a container as it is now, and the OCI spec (JSON) that it is run with."""
        rows: list[object] = ["container", record.id, _encode(record)]
        if spec is not None:
            rows += ["spec", record.id, spec]
        self._put(rows, begins=record.state in (ContainerState.CREATING, ContainerState.STARTING))

    def put_timeline(self, id: str, timeline: Timeline) -> None:
        """Keep how a container was started."""
        self._put(["timeline", id, _encode(timeline)], begins=False)

    def _put(self, rows: list[object], begins: bool) -> None:
        """One statement, so all or nothing without a transaction's two more."""
        if begins and not room.left(self._path.parent):
            raise Exhausted(f"state database {self._path}: no space left on device")
        self._write(_PUT[len(rows) // 3], *rows)

    def spec(self, id: str) -> bytes | None:
        return self._body("spec", id)

    def timeline(self, id: str) -> Timeline | None:
        body = self._body("timeline", id)
        try:
            return None if body is None else msgspec.msgpack.decode(body, type=Timeline)
        except (msgspec.DecodeError, ValueError):
            return None

    def delete(self, id: str) -> None:
        """Forget all that is kept of a pod or a container; it needn't exist."""
        statement = "DELETE FROM record WHERE kind IN ('sandbox', 'container', 'spec', 'timeline') AND id = ?"
        self._write(statement, id)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Writes inside happen all or not at all."""
        self._write("BEGIN")
        try:
            yield
            self._write("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    @property
    def checkpoint_due(self) -> bool:
        return self._writes >= _CHECKPOINT_WRITES

    def checkpoint(self) -> None:
        """Move the log into the database, on a connection of its own where that can be: this waits for the disk."""
        self._writes = 0
        with contextlib.ExitStack() as stack:
            db = self._db
            if not self._alone:
                db = stack.enter_context(contextlib.closing(room.connect(self._path, timeout=5.0)))
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            room.reserve(db, _RESERVE_PAGES)

    def _write(self, statement: str, *values: object) -> None:
        self._writes += 1
        for last in (False, True):
            try:
                self._db.execute(statement, values)
                return
            except sqlite3.DatabaseError as error:
                if "full" not in str(error):
                    raise Unavailable(f"state database {self._path}: {error}") from error
                if last:
                    raise Exhausted(f"state database {self._path}: {error}") from error
            room.fold_in(self._db)  # this waits for the disk, as little else would help

    def _body(self, kind: str, id: str) -> bytes | None:
        found = self._db.execute("SELECT body FROM record WHERE kind = ? AND id = ?", (kind, id)).fetchone()
        return None if found is None else bytes(found[0])

    def set_aside(self, kind: str, id: str, error: str) -> None:
        """Move a record to quarantine: it stays on disk for a person to look at, and in nobody's way."""
        _logger.error("%s record %s can't be used, set aside: %s", kind, id, error)
        with self._together():
            self._write(
                "INSERT INTO quarantine SELECT kind, id, body, ?, ? FROM record WHERE kind = ? AND id = ?",
                error,
                time.time_ns(),
                kind,
                id,
            )
            self._write("DELETE FROM record WHERE kind = ? AND id = ?", kind, id)

    def _load(self, kind: str, record: type[_Kind]) -> list[_Kind]:
        decoder = msgspec.msgpack.Decoder(record)
        good: list[_Kind] = []
        for id, body in self._db.execute("SELECT id, body FROM record WHERE kind = ?", (kind,)).fetchall():
            try:
                good.append(decoder.decode(body))
            except (msgspec.DecodeError, ValueError) as error:
                self.set_aside(kind, id, str(error))
        return good

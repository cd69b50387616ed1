"""Address leases: which sandbox holds which address, on disk before any interface has it.

A lease is an offset into the subnet, so a second address family needs no second record. Addresses are handed out
round robin: one that was given up comes back last, when nobody's neighbour cache remembers it. A lease that was given
up is *released* and keeps its offset until its link is gone. A lease's host ports are gone once it is released.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from net.errors import AlreadyExists, Exhausted, Unavailable
from net.network import HostPort, PodIdentity
from net.rtnetlink import IpNetwork
from runtime import room

FIRST_OFFSET: Final = 2  # 0 is the network's own, 1 the gateway's
_SCHEMA_VERSION: Final = 2
_RESERVE_PAGES: Final = 64
_SCHEMA: Final = """
CREATE TABLE network (
    subnets TEXT NOT NULL,
    last_offset INTEGER NOT NULL
) STRICT;
CREATE TABLE lease (
    offset INTEGER PRIMARY KEY,
    sandbox_id TEXT NOT NULL UNIQUE,
    released INTEGER NOT NULL DEFAULT 0,
    name TEXT NOT NULL,
    namespace TEXT NOT NULL,
    uid TEXT NOT NULL,
    created_ns INTEGER NOT NULL
) STRICT;
"""
_SCHEMA_2: Final = """
CREATE TABLE host_port (
    protocol TEXT NOT NULL,
    host_port INTEGER NOT NULL,
    host_ip TEXT NOT NULL,
    container_port INTEGER NOT NULL,
    sandbox_id TEXT NOT NULL,
    PRIMARY KEY (protocol, host_port, host_ip)
) STRICT;
"""
_COLUMNS: Final = "offset, sandbox_id, released, name, namespace, uid, created_ns"


@dataclass(frozen=True, slots=True)
class Lease:
    """A sandbox's hold on the subnet's address number `offset`."""

    offset: int
    sandbox_id: str
    released: bool
    name: str
    namespace: str
    uid: str
    created_ns: int


class Leases:
    """The leases of one network, in a SQLite file. Safe to use from several threads, and from several processes.

    Survives a crash of the daemon at any point. A power failure may take the latest changes with it, and with those
    the links that they spoke of: nothing to protect is left, so a pod's start doesn't wait for the disk.
    Raises Unavailable when the file can't be used, Exhausted when the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = room.connect(path, timeout=5.0, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise Unavailable(f"leases {path}: {error}") from error
        try:
            self._open()
        except sqlite3.Error as error:
            self._database.close()
            raise Unavailable(f"leases {path}: {error}") from error
        except BaseException:
            self._database.close()
            raise

    def _open(self) -> None:
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA wal_autocheckpoint = 10000")  # `checkpoint` comes first
        with self._transaction() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise Unavailable(f"leases {self._path}: format {version} is of another version of crib")
            for schema in (_SCHEMA, _SCHEMA_2)[version:]:
                for statement in schema.split(";"):
                    database.execute(statement)
            if version < _SCHEMA_VERSION:
                database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        room.reserve(self._database, _RESERVE_PAGES)

    def close(self) -> None:
        with self._lock:
            room.close(self._database, self._path)

    def subnets(self) -> tuple[str, ...]:
        """What the offsets count in, IPv4 first; empty before anything was recorded."""
        with self._transaction() as database:
            return _subnets(database)

    def record_subnets(self, subnets: Sequence[IpNetwork]) -> bool:
        """Let offsets count in `subnets` from now on; False, and no change, while leases of others exist."""
        with self._transaction() as database:
            wanted = tuple(str(subnet) for subnet in subnets)
            if _subnets(database) == wanted:
                return True
            if database.execute("SELECT 1 FROM lease LIMIT 1").fetchone():
                return False
            database.execute("DELETE FROM network")
            database.execute("INSERT INTO network VALUES (?, ?)", (" ".join(wanted), FIRST_OFFSET - 1))
            return True

    def take(self, pod: PodIdentity, last_offset: int, ports: Sequence[HostPort] = ()) -> Lease:
        """A lease for the sandbox, with an offset of at most `last_offset`; its old one if it has one.

        `ports` are the sandbox's from now on. Raises AlreadyExists where one is another's, Exhausted.
        """
        with self._transaction(begins=True) as database:
            if ports:
                _take_ports(database, pod.sandbox_id, ports)
            database.execute("UPDATE lease SET released = 0 WHERE sandbox_id = ?", (pod.sandbox_id,))
            if found := _one(database, pod.sandbox_id):
                return found
            (latest,) = database.execute("SELECT last_offset FROM network").fetchone()
            offset = _free(database, latest + 1, last_offset) or _free(database, FIRST_OFFSET, latest)
            if offset is None:
                raise Exhausted(f"all {last_offset - FIRST_OFFSET + 1} addresses are taken")
            row = (offset, pod.sandbox_id, 0, pod.name, pod.namespace, pod.uid, time.time_ns())
            database.execute(f"INSERT INTO lease ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            database.execute("UPDATE network SET last_offset = ?", (offset,))
            return _lease(row)

    def find(self, sandbox_id: str) -> Lease | None:
        with self._transaction() as database:
            return _one(database, sandbox_id)

    def all(self) -> list[Lease]:
        with self._transaction() as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM lease ORDER BY offset").fetchall()
        return [_lease(row) for row in rows]

    def released(self, limit: int = -1) -> list[Lease]:
        """Leases that wait for their link to go, oldest first."""
        with self._transaction() as database:
            query = f"SELECT {_COLUMNS} FROM lease WHERE released ORDER BY created_ns LIMIT ?"
            return [_lease(row) for row in database.execute(query, (limit,)).fetchall()]

    def ports(self, sandbox_id: str = "") -> list[tuple[Lease, HostPort]]:
        """Host ports of one sandbox, or of all, with the leases that they lead to."""
        names = ", ".join(f"lease.{name}" for name in _COLUMNS.split(", "))
        query = (
            f"SELECT {names}, protocol, host_port, container_port, host_ip FROM host_port JOIN lease USING (sandbox_id)"
        )
        with self._transaction() as database:
            rows = database.execute(
                f"{query} WHERE ?1 IN ('', sandbox_id) ORDER BY host_port", (sandbox_id,)
            ).fetchall()
        return [(_lease(row[:7]), HostPort(*row[7:])) for row in rows]

    def release(self, sandbox_id: str) -> Lease | None:
        """Give the lease up, if there is one, and its host ports; its offset stays taken until `free`."""
        with self._transaction() as database:
            database.execute("DELETE FROM host_port WHERE sandbox_id = ?", (sandbox_id,))
            database.execute("UPDATE lease SET released = 1 WHERE sandbox_id = ?", (sandbox_id,))
            return _one(database, sandbox_id)

    def free(self, sandbox_id: str) -> None:
        """Forget the lease if it is still given up; the caller has seen that its link is gone."""
        with self._transaction() as database:
            database.execute("DELETE FROM lease WHERE sandbox_id = ? AND released", (sandbox_id,))

    def checkpoint(self) -> None:
        """Move what was written into the database proper. Waits for the disk, so it isn't left to a pod's start."""
        with self._lock:
            try:
                self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            except sqlite3.Error as error:
                raise Unavailable(f"leases {self._path}: {error}") from error

    @contextmanager
    def _transaction(self, *, begins: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                if not room.left(self._path.parent):
                    if begins:
                        raise Exhausted(f"leases {self._path}: no space left on device")
                    room.fold_in(self._database)
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                except BaseException:
                    if self._database.in_transaction:  # a full disk has already ended it
                        self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
            raise (Exhausted if full else Unavailable)(f"leases {self._path}: {error}") from error


def _subnets(database: sqlite3.Connection) -> tuple[str, ...]:
    row = database.execute("SELECT subnets FROM network").fetchone()
    return tuple(row[0].split()) if row else ()


def _one(database: sqlite3.Connection, sandbox_id: str) -> Lease | None:
    row = database.execute(f"SELECT {_COLUMNS} FROM lease WHERE sandbox_id = ?", (sandbox_id,)).fetchone()
    return _lease(row) if row else None


def _take_ports(database: sqlite3.Connection, sandbox_id: str, ports: Sequence[HostPort]) -> None:
    """Two ports are in each other's way when their addresses are the same or one of them is any address."""
    database.execute("DELETE FROM host_port WHERE sandbox_id = ?", (sandbox_id,))
    for port in ports:
        query = (
            "SELECT namespace, name FROM host_port JOIN lease USING (sandbox_id) WHERE protocol = ?1 AND host_port = ?2"
            " AND sandbox_id != ?4 AND (host_ip = ?3 OR '' IN (host_ip, ?3)"
            " OR ('::' IN (host_ip, ?3) AND instr(host_ip, ':') AND instr(?3, ':')))"
        )
        row = (port.protocol, port.host_port, port.host_ip, sandbox_id)
        if holder := database.execute(query, row).fetchone():
            raise AlreadyExists(f"host port {port}: pod {'/'.join(holder)} has it")
        values = (port.protocol, port.host_port, port.host_ip, port.container_port, sandbox_id)
        database.execute("INSERT OR REPLACE INTO host_port VALUES (?, ?, ?, ?, ?)", values)


def _lease(row: tuple[int, str, int, str, str, str, int]) -> Lease:
    offset, sandbox_id, released, name, namespace, uid, created_ns = row
    return Lease(offset, sandbox_id, bool(released), name, namespace, uid, created_ns)


def _free(database: sqlite3.Connection, first: int, last: int) -> int | None:
    """The first offset from `first` to `last` that no lease has."""
    wanted = first
    rows = database.execute("SELECT offset FROM lease WHERE offset BETWEEN ? AND ? ORDER BY offset", (first, last))
    for (taken,) in rows:
        if taken != wanted:
            break
        wanted += 1
    return wanted if wanted <= last else None

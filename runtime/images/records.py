"""The store's records: two SQLite databases in the store's directory.

`images.db` holds images, names and layers, and is synchronised at each commit: it survives power loss. `rootfs.db`
holds what is prepared for containers, is written on a pod's start path and is not synchronised: it survives a crash of
cribd, and after power loss the directories that it doesn't know are removed. A layer's number is given out only once.
"""

import contextlib
import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import room
from runtime.errors import Exhausted, Unavailable, WrongState
from runtime.images.manifest import digest_of
from runtime.images.reference import is_digest

log = logging.getLogger(__name__)

_VERSION = 1
_RESERVE_PAGES = 64
_LOCK_WAIT_S = 2.0
_LOCK_POLL_S = 0.05
_SCHEMA = """
CREATE TABLE layers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    diff_id TEXT NOT NULL,
    below TEXT NOT NULL,
    bytes_used INTEGER NOT NULL,
    inodes INTEGER NOT NULL
) STRICT;
CREATE TABLE images (
    id TEXT PRIMARY KEY,
    config BLOB NOT NULL,
    manifest_digest TEXT NOT NULL,
    manifest BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE image_layers (
    image TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    layer INTEGER NOT NULL REFERENCES layers(number),
    PRIMARY KEY (image, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE names (
    name TEXT PRIMARY KEY,
    image TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
"""
_ROOTFS_SCHEMA = """
CREATE TABLE rootfs (
    container TEXT PRIMARY KEY,
    image TEXT NOT NULL,
    layers TEXT NOT NULL
) STRICT, WITHOUT ROWID;
"""
_ALL_ROOTFS = "SELECT container, image, layers FROM rootfs"


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's directory. `below` is "" when it is the same on top of any layer, else the chain id that it is for."""

    number: int
    diff_id: str
    below: str
    bytes_used: int
    inodes: int


@dataclass(frozen=True, slots=True)
class StoredImage:
    id: str
    config: bytes
    manifest_digest: str
    manifest: bytes
    layers: tuple[int, ...]

    @property
    def intact(self) -> bool:
        """Whether the documents are those of their digests."""
        documents = ((self.config, self.id), (self.manifest, self.manifest_digest))
        return all(is_digest(told) and digest_of(data, told) == told for data, told in documents)


@dataclass(frozen=True, slots=True)
class StoredRootFs:
    container: str
    image: str
    layers: tuple[int, ...]


class Database:
    """One connection, used by one thread at a time. Raises Exhausted when the disk is full, else Unavailable."""

    def __init__(self, path: Path, schema: str, synchronous: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._connection = room.connect(path, check_same_thread=False, timeout=10)
        except sqlite3.Error as error:
            raise _translated(path, error) from error
        try:
            [(found,)] = self._connection.execute("PRAGMA quick_check(1)")
            if found != "ok":
                raise sqlite3.DatabaseError(f"database disk image is malformed: {' '.join(found.split())}")
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._connection.execute("PRAGMA foreign_keys = ON")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._connection.executescript(f"BEGIN; {schema} PRAGMA user_version = {_VERSION}; COMMIT;")
            elif version != _VERSION:
                raise Unavailable(f"{path}: made by another version of crib (schema {version})")
            room.reserve(self._connection, _RESERVE_PAGES)
        except sqlite3.Error as error:
            self._connection.close()
            raise _translated(path, error) from error
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            room.close(self._connection, self._path)

    @contextlib.contextmanager
    def transaction(self, *, begins: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing; what is raised inside rolls back. A full disk's reserve is not for what begins."""
        with self._lock:
            try:
                self._make_room(begins)
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise _translated(self._path, error) from error

    def _make_room(self, begins: bool) -> None:
        if not room.left(self._path.parent):
            if begins:
                raise Exhausted(f"{self._path}: no space left on device")
            room.fold_in(self._connection)

    def execute(
        self, statement: str, arguments: tuple[object, ...] = (), *, begins: bool | None = None
    ) -> list[tuple[object, ...]]:
        """One statement, which is a transaction of its own; `begins` is None for one that only reads."""
        with self._lock:
            try:
                if begins is not None:
                    self._make_room(begins)
                return self._connection.execute(statement, arguments).fetchall()
            except sqlite3.Error as error:
                raise _translated(self._path, error) from error


def _translated(path: Path, error: sqlite3.Error) -> Exception:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return Exhausted(f"{path}: no space left on device")
    return Unavailable(f"{path}: {error}")


class ImageRecords:
    """Images, names and layers; each method is one durable transaction."""

    def __init__(self, root: Path) -> None:
        self._database = Database(root / "images.db", _SCHEMA, "FULL")
        self.close: Callable[[], None] = self._database.close

    def new_layers(self, diff_ids: Iterable[str]) -> list[int]:
        """Numbers of layers about to be made, written before their directories are."""
        with self._database.transaction(begins=True) as db:
            return [
                int(db.execute("INSERT INTO layers VALUES (NULL, ?, '', 0, 0)", (diff_id,)).lastrowid or 0)
                for diff_id in diff_ids
            ]

    def commit(self, image: StoredImage, layers: Iterable[Layer], names: Iterable[str]) -> None:
        """The image is complete and synchronised: it has these layers, and these names are its own from now on."""
        with self._database.transaction(begins=True) as db:
            for layer in layers:
                db.execute(
                    "UPDATE layers SET below = ?, bytes_used = ?, inodes = ? WHERE number = ?",
                    (layer.below, layer.bytes_used, layer.inodes, layer.number),
                )
            db.execute(
                "INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)",
                (image.id, image.config, image.manifest_digest, image.manifest),
            )
            db.execute("DELETE FROM image_layers WHERE image = ?", (image.id,))
            db.executemany(
                "INSERT INTO image_layers VALUES (?, ?, ?)",
                [(image.id, position, number) for position, number in enumerate(image.layers)],
            )
            self._name(db, image.id, names)

    def name(self, image: str, names: Iterable[str]) -> None:
        """These names are the image's from now on."""
        with self._database.transaction(begins=True) as db:
            self._name(db, image, names)

    def _name(self, db: sqlite3.Connection, image: str, names: Iterable[str]) -> None:
        db.executemany("INSERT OR REPLACE INTO names VALUES (?, ?)", [(name, image) for name in names])

    def remove_image(self, image: str) -> None:
        """The image and its names are gone; layers that nothing else needs are about to be removed."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM images WHERE id = ?", (image,))

    def disown(self, number: int) -> None:
        """The layer is damaged and no image's any more: what a container keeps of it is nobody's to share."""
        with self._database.transaction() as db:
            db.execute("UPDATE layers SET diff_id = '' WHERE number = ?", (number,))

    def adopt(self, layers: Iterable[Layer]) -> None:
        """Directories that have no record have one from now on, and their numbers aren't given out again."""
        with self._database.transaction() as db:
            db.executemany(
                "INSERT INTO layers VALUES (?, ?, ?, ?, ?)",
                [(layer.number, layer.diff_id, layer.below, layer.bytes_used, layer.inodes) for layer in layers],
            )

    def forget_layers(self, numbers: Iterable[int]) -> None:
        """The directories of these layers are gone."""
        with self._database.transaction() as db:
            db.executemany("DELETE FROM layers WHERE number = ?", [(number,) for number in numbers])

    def layers(self) -> list[Layer]:
        """All that were ever begun and not yet removed; those are whole that an image or a container names."""
        return [Layer(*row) for row in self._rows("SELECT number, diff_id, below, bytes_used, inodes FROM layers")]

    def images(self) -> list[StoredImage]:
        layers: dict[str, list[int]] = {}
        for image, number in self._rows("SELECT image, layer FROM image_layers ORDER BY image, position"):
            layers.setdefault(image, []).append(number)
        return [
            StoredImage(id, config, manifest_digest, manifest, tuple(layers.get(id, ())))
            for id, config, manifest_digest, manifest in self._rows(
                "SELECT id, config, manifest_digest, manifest FROM images"
            )
        ]

    def names(self) -> dict[str, str]:
        """The image of each name."""
        return dict(self._rows("SELECT name, image FROM names"))

    def _rows(self, statement: str) -> Iterable[tuple[Any, ...]]:
        return self._database.execute(statement)


class RootFsRecords:
    """What is prepared for containers."""

    def __init__(self, root: Path) -> None:
        path = root / "rootfs.db"
        readable: list[StoredRootFs] = []
        try:
            self._database = Database(path, _ROOTFS_SCHEMA, "NORMAL")
        except Unavailable as error:
            # Power loss may damage what is not synchronised.
            readable = _readable(path)
            log.error("%s: %d records of it could be read", error, len(readable))
            for name in ("rootfs.db", "rootfs.db-wal", "rootfs.db-shm"):
                (root / name).unlink(missing_ok=True)
            self._database = Database(path, _ROOTFS_SCHEMA, "NORMAL")
        # The write-ahead log is folded in by `checkpoint`, never by a container's start.
        self._database.execute("PRAGMA wal_autocheckpoint = 0")
        self.close: Callable[[], None] = self._database.close
        for rootfs in readable:
            self.add(rootfs)

    def add(self, rootfs: StoredRootFs) -> None:
        self._database.execute(
            "INSERT INTO rootfs VALUES (?, ?, ?)",
            (rootfs.container, rootfs.image, json.dumps(rootfs.layers)),
            begins=True,
        )

    def remove(self, container: str) -> None:
        self._database.execute("DELETE FROM rootfs WHERE container = ?", (container,), begins=False)

    def all(self) -> list[StoredRootFs]:
        return list(map(_rootfs, self._database.execute(_ALL_ROOTFS)))

    def checkpoint(self) -> None:
        self._database.execute("PRAGMA wal_checkpoint(RESTART)")


def _rootfs(row: tuple[object, ...]) -> StoredRootFs:
    container, image, layers = map(str, row)
    return StoredRootFs(container, image, tuple(map(int, json.loads(layers))))


def _readable(path: Path) -> list[StoredRootFs]:
    """The records before the damage and those after it: their containers may run."""
    found: dict[str, StoredRootFs] = {}
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as db:
        for order in ("", "DESC"):
            with contextlib.suppress(sqlite3.Error, ValueError, TypeError):
                for rootfs in map(_rootfs, db.execute(f"{_ALL_ROOTFS} ORDER BY container {order}")):
                    found[rootfs.container] = rootfs
    return list(found.values())


def lock(path: Path) -> int:
    """A descriptor that holds the lock on `path`, as does whoever inherits it. Raises WrongState.

    The children of a killed cribd that were writing to the store, or were just being started, die a moment after it:
    that is waited for.
    """
    fd = os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError as error:
            if time.monotonic() > deadline_s:
                os.close(fd)
                raise WrongState(f"image store {path.parent} is in use by another process") from error
            threading.Event().wait(_LOCK_POLL_S)

"""The layers' directories and who needs them.

Every user of a layer holds it: an image, a container, a transfer under way. A layer that nobody holds any more leaves
the shelf at once, so that nobody can come to need it, and is then removed by whoever let go last.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import CribError
from runtime.images.layers import short_name, usage_of
from runtime.images.records import ImageRecords, Layer
from runtime.removal import remove_tree

log = logging.getLogger(__name__)

_TURN_POLL_S = 0.1
_SEAL = ".seal"


class Shelf:
    """Thread-safe; its lock is never held across work on the disk."""

    def __init__(self, base: Path, recipes: Path, records: ImageRecords) -> None:
        self.base = base
        self.recipes = recipes
        self._records = records
        self._lock = threading.Lock()
        self._layers: dict[int, Layer] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self._hidden: set[int] = set()
        self._holds: Counter[int] = Counter()
        self._turns: dict[str, tuple[threading.Lock, int]] = {}

    def path(self, number: int) -> Path:
        return self.base / short_name(number)

    def recipe(self, number: int) -> Path:
        """How the layer's tar is put together again; not there where that can't be."""
        return self.recipes / short_name(number)

    def seal(self, number: int) -> Path:
        """What its recipe doesn't tell, see `runtime.images.seal`; not there where it tells all."""
        return self.recipes / f"{short_name(number)}{_SEAL}"

    def paths(self, number: int) -> tuple[Path, Path, Path]:
        """All that a layer may have on the disk."""
        return self.path(number), self.recipe(number), self.seal(number)

    def restore(self, layer: Layer) -> None:
        """Hold a layer that the records name, putting it on the shelf if it is the first time."""
        with self._lock:
            self._layers[layer.number] = layer
            self._numbers.setdefault((layer.diff_id, layer.below), layer.number)
            self._holds[layer.number] += 1

    def add(self, layer: Layer) -> Layer:
        """Put a finished layer on the shelf and hold it; an equal one that is there is held and returned instead."""
        with self._lock:
            number = self._numbers.setdefault((layer.diff_id, layer.below), layer.number)
            self._holds[number] += 1
            return self._layers.setdefault(number, layer)

    def known(self, number: int) -> bool:
        return number in self._layers

    def hold_equal(self, diff_id: str, chain_below: str) -> Layer | None:
        """Hold the layer with this content that fits on top of `chain_below`, if there is one."""
        with self._lock:
            number = self._numbers.get((diff_id, ""), self._numbers.get((diff_id, chain_below)))
            if number is None:
                return None
            self._holds[number] += 1
            return self._layers[number]

    def hold(self, numbers: Iterable[int]) -> None:
        """Hold layers that are held already."""
        with self._lock:
            self._holds.update(numbers)

    def get(self, number: int) -> Layer:
        return self._layers[number]

    def all(self) -> list[Layer]:
        with self._lock:
            return list(self._layers.values())

    def hide(self, number: int) -> None:
        """Let no one come to need this layer, which is damaged, any more."""
        with self._lock:
            layer = self._layers.get(number)
            if layer is not None and self._numbers.get((layer.diff_id, layer.below)) == number:
                del self._numbers[layer.diff_id, layer.below]
                self._hidden.add(number)

    def hidden(self, number: int) -> bool:
        return number in self._hidden

    def release(self, numbers: Iterable[int]) -> list[int]:
        """Let go; returns those that nobody holds any more and that the caller is to `remove`."""
        doomed = []
        with self._lock:
            for number in numbers:
                self._holds[number] -= 1
                if self._holds[number] == 0:
                    del self._holds[number]
                    layer = self._layers.pop(number)
                    self._hidden.discard(number)
                    if self._numbers.get((layer.diff_id, layer.below)) == number:
                        del self._numbers[layer.diff_id, layer.below]
                    doomed.append(number)
        return doomed

    def remove(self, doomed: Iterable[int]) -> None:
        """Remove directories that are on the shelf no more, then their records.

        What fails is logged: it is tried again when the store is next opened.
        """
        if gone := self.delete(doomed):
            try:
                self._records.forget_layers(gone)
            except CribError as error:
                log.warning("records of removed layers are left behind: %s", error)

    def delete(self, doomed: Iterable[int]) -> list[int]:
        """Remove the directories alone; returns those that are gone."""
        gone = []
        for number in doomed:
            try:
                path, *beside = self.paths(number)
                for file in beside:
                    file.unlink(missing_ok=True)
                remove_tree(path)
                gone.append(number)
            except OSError as error:
                log.warning("layer %s is left behind: %s", short_name(number), error)
        return gone

    def usage(self) -> tuple[int, int]:
        """Bytes and inodes of all layers and their directories. Walks those that are on their way in or out."""
        layers = self.all()
        finished = {short_name(layer.number) for layer in layers}
        others = [
            f"{directory}/{name}"
            for directory in (self.base, self.recipes)
            for name in os.listdir(directory)
            if name.removesuffix(_SEAL) not in finished
        ]
        bytes_used, inodes = usage_of(others)
        for status in map(os.lstat, (self.base, self.recipes)):
            bytes_used, inodes = bytes_used + status.st_blocks * 512, inodes + 1
        return bytes_used + sum(layer.bytes_used for layer in layers), inodes + sum(layer.inodes for layer in layers)

    @contextmanager
    def turn(self, digest: str, check: Callable[[], None]) -> Iterator[None]:
        """Only one at a time makes or removes the layer or image `digest`; `check` raises when waiting is to end."""
        with self._lock:
            lock, users = self._turns.get(digest, (threading.Lock(), 0))
            self._turns[digest] = (lock, users + 1)
        try:
            while not lock.acquire(timeout=_TURN_POLL_S):
                check()
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                lock, users = self._turns.pop(digest)
                if users > 1:
                    self._turns[digest] = (lock, users - 1)

"""One image on its way into the store: its layers fetched and unpacked in parallel, then committed as one.

Order: numbers of new layers are recorded; directories are made and filled; the file system is synchronised once; one
transaction makes layers, image and names valid together. Whatever fails on the way leaves nothing.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from runtime.errors import Cancelled, CribError, Exhausted, Unavailable, of_disk
from runtime.images import seal
from runtime.images.errors import BadContent, BadImage
from runtime.images.image import ImagesConfig, Progress
from runtime.images.layers import Unpack, Unpacked, Unpacker, sync
from runtime.images.manifest import Config, Descriptor, Manifest, chain_ids, parse_config
from runtime.images.records import ImageRecords, Layer, StoredImage
from runtime.images.settle import settle
from runtime.images.shelf import Shelf
from runtime.removal import remove_tree

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.1
_SYNC_TIMEOUT_S = 600.0
_SYNC_EVERY_S = 3.0
# What a layer that can't stand alone has below it when it is the lowest.
_NOTHING_BELOW = "none"


@dataclass(frozen=True, slots=True)
class Content:
    """What an image consists of; `names` are those that it is to have."""

    manifest: Manifest
    manifest_digest: str
    raw_manifest: bytes
    raw_config: bytes
    names: tuple[str, ...]


class Source(Protocol):
    """Where layers come from: a registry, an archive."""

    def fetch(self, descriptor: Descriptor, take: Callable[[bytes], None]) -> None:
        """Give the blob to `take`, piece by piece; on return it is verified. What `take` raises passes through."""

    def another(self, descriptor: Descriptor) -> bool:
        """After wrong content: whether there is somewhere else to bring the blob from."""

    def cancel(self) -> None:
        """Make a running `fetch` end soon."""


class Transfer:
    """Installs one image; `run` is called once, `cancel` from any thread."""

    def __init__(
        self,
        content: Content,
        source: Source,
        shelf: Shelf,
        records: ImageRecords,
        unpacker: Unpacker,
        config: ImagesConfig,
        progress: Callable[[Progress], None],
    ) -> None:
        self._content = content
        self._source = source
        self._shelf = shelf
        self._records = records
        self._unpacker = unpacker
        self._config = config
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped = False
        self._children: set[Unpack] = set()
        self._idle: list[Unpack] = []
        self._numbers: dict[str, int] = {}
        self._held: list[int] = []
        self._fetching = threading.Semaphore(config.max_parallel)
        self._open: dict[str, tuple[int, Unpacked]] = {}
        # What settling all of its layers may look at.
        self._steps = iter(range(config.entries_limit))

    def cancel(self) -> None:
        with self._lock:
            self._stopped = True
            children = list(self._children)
        self._source.cancel()
        for child in children:
            child.kill()

    def run(self) -> StoredImage:
        """Returns the image, committed, with every layer of it held for it. Raises CribError."""
        parsed = parse_config(self._content.raw_config, len(self._content.manifest.layers))
        doomed: list[int] = []
        try:
            layers = self._layers(parsed)
            self._check()
            sync(self._shelf.base, _SYNC_TIMEOUT_S)
            stored = StoredImage(
                id=self._content.manifest.config.digest,
                config=self._content.raw_config,
                manifest_digest=self._content.manifest_digest,
                manifest=self._content.raw_manifest,
                layers=tuple(layer.number for layer in layers),
            )
            self._check()
            self._records.commit(stored, layers, self._content.names)
            self._shelf.hold(stored.layers)
            return stored
        except OSError as error:
            raise of_disk(f"image {self._content.manifest.config.digest}", error) from error
        finally:
            doomed += self._shelf.release(self._held)
            doomed += set(self._numbers.values()) - set(self._held)
            self._shelf.remove(doomed)

    def _layers(self, parsed: Config) -> list[Layer]:
        chains = (_NOTHING_BELOW, *chain_ids(parsed.diff_ids))
        wanted: dict[str, tuple[Descriptor, str]] = {}
        for descriptor, diff_id, below in zip(self._content.manifest.layers, parsed.diff_ids, chains, strict=False):
            wanted.setdefault(diff_id, (descriptor, below))
        missing = [diff_id for diff_id, (_, below) in wanted.items() if not self._on_shelf(diff_id, below)]
        self._numbers = dict(zip(missing, self._records.new_layers(missing), strict=True)) if missing else {}
        for diff_id, (descriptor, _) in wanted.items():
            self._report(descriptor, "waiting" if diff_id in self._numbers else "exists", 0)
        if missing:
            with self._synchronised_meanwhile():
                try:
                    self._in_parallel([(diff_id, *wanted[diff_id]) for diff_id in missing])
                finally:
                    self._end_children()
        layers: list[Layer] = []
        for descriptor, diff_id, below in zip(self._content.manifest.layers, parsed.diff_ids, chains, strict=False):
            layers.append(self._settled(diff_id, descriptor, below, layers))
        return layers

    def _on_shelf(self, diff_id: str, below: str) -> bool:
        layer = self._shelf.hold_equal(diff_id, below)
        if layer is not None:
            self._held.append(layer.number)
        return layer is not None

    @contextmanager
    def _synchronised_meanwhile(self) -> Iterator[None]:
        """The disk is kept at work, so that the sync at the end has little left to wait for."""
        ended = threading.Event()

        def run() -> None:
            with suppress(Unavailable):  # the sync at the end will tell
                while not ended.wait(_SYNC_EVERY_S):
                    sync(self._shelf.base, _SYNC_TIMEOUT_S)

        thread = threading.Thread(target=run, name="sync")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _in_parallel(self, jobs: list[tuple[str, Descriptor, str]]) -> None:
        # While some are fetched, as many are about to be or come to the end of being unpacked.
        with ThreadPoolExecutor(2 * self._config.max_parallel, thread_name_prefix="layer") as pool:
            futures = [pool.submit(self._layer, *job) for job in jobs]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failures = [error for future in futures if future in done and (error := future.exception())]
            if failures:
                self.cancel()
                pool.shutdown(cancel_futures=True)
                # The cause, not what followed from it.
                raise next((error for error in failures if not isinstance(error, Cancelled)), failures[0])

    def _layer(self, diff_id: str, descriptor: Descriptor, below: str) -> None:
        with self._shelf.turn(diff_id, self._check):
            if self._on_shelf(diff_id, below):  # another transfer has brought it meanwhile
                self._report(descriptor, "exists", descriptor.size)
                return
            number = self._numbers[diff_id]
            unpacked = self._brought(number, descriptor)
            if unpacked.diff_id != diff_id:
                raise BadContent(f"layer {descriptor.digest} unpacks to {unpacked.diff_id}, the image wants {diff_id}")
            if unpacked.spoilt:
                self._shelf.recipe(number).unlink()
            if unpacked.implied or unpacked.lower_links:
                self._open[diff_id] = (number, unpacked)
            else:
                self._held.append(self._shelf.add(self._layer_of(number, diff_id, "", unpacked)).number)
            self._report(descriptor, "done", descriptor.size)

    def _layer_of(self, number: int, diff_id: str, below: str, unpacked: Unpacked) -> Layer:
        """The finished layer, with what is kept to check it."""
        shelf = self._shelf
        more = seal.finish(*shelf.paths(number), unpacked)
        return Layer(number, diff_id, below, unpacked.bytes_used + more[0], unpacked.inodes + more[1])

    def _brought(self, number: int, descriptor: Descriptor) -> Unpacked:
        """Unpack the layer, from another host when one has sent something else."""
        while True:
            try:
                return self._unpack(number, descriptor)
            except BadContent as error:
                if not self._source.another(descriptor):
                    raise
                log.warning("%s; another host is asked", error)
                remove_tree(self._shelf.path(number))

    def _unpack(self, number: int, descriptor: Descriptor) -> Unpacked:
        if descriptor.size > self._config.layer_limit_bytes:
            limit = self._config.layer_limit_bytes
            raise Exhausted(f"layer {descriptor.digest} of {descriptor.size} bytes, the limit is {limit}")
        with self._begun(number) as child:
            with self._fetching:
                self._feed(child, descriptor)
            self._report(descriptor, "unpacking", descriptor.size)
            return self._finished(child, descriptor)

    @contextmanager
    def _begun(self, number: int) -> Iterator[Unpack]:
        """A child at work on the layer, which is over when the context is."""
        path = self._shelf.path(number)
        path.mkdir(0o755)
        os.chmod(path, 0o755)
        child = self._child()
        try:
            self._check()
            with open(self._shelf.recipe(number), "wb") as recipe:
                child.begin(path, recipe.fileno())
            yield child
        finally:
            if not child.ready:
                child.close()
            with self._lock:
                if child.ready:
                    self._idle.append(child)
                else:
                    self._children.discard(child)

    def _child(self) -> Unpack:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        child = self._unpacker.fork()
        with self._lock:
            self._children.add(child)
        return child

    def _end_children(self) -> None:
        """All of them are idle."""
        with self._lock:
            children, self._children, self._idle = self._children, set(), []
        for child in children:
            child.kill()
        for child in children:
            child.close()

    def _feed(self, child: Unpack, descriptor: Descriptor) -> None:
        position = 0
        reported_at = 0.0
        refused: BadImage | None = None

        def take(data: bytes) -> None:
            nonlocal position, reported_at, refused
            if refused is None and not child.write(data):
                refused = self._refusal(child, descriptor)
            position += len(data)
            now = time.monotonic()
            if now - reported_at >= _REPORT_EVERY_S:
                reported_at = now
                self._report(descriptor, "downloading", position)

        self._source.fetch(descriptor, take)
        if refused is not None:
            raise refused

    def _refusal(self, child: Unpack, descriptor: Descriptor) -> BadImage:
        """Why the child has ended before its input has. If it found nonsense, the rest is fetched to tell whether the
        image is bad or what a host sent for it."""
        try:
            self._finished(child, descriptor)
        except BadImage as error:
            return error
        return BadImage(f"layer {descriptor.digest}: it is complete before its size is reached")

    def _finished(self, child: Unpack, descriptor: Descriptor) -> Unpacked:
        try:
            return child.finish()
        except CribError as error:
            raise type(error)(f"layer {descriptor.digest}: {error}") from error

    def _settled(self, diff_id: str, descriptor: Descriptor, below: str, layers: Iterable[Layer]) -> Layer:
        """The layer of the chain, completed by those below it if it has to be."""
        while diff_id not in self._open:
            if self._on_shelf(diff_id, below):
                return self._shelf.get(self._held[-1])
            # It comes a second time, on top of more than the first time, and can't stand alone.
            self._numbers[diff_id] = self._records.new_layers([diff_id])[0]
            try:
                self._layer(diff_id, descriptor, below)
            finally:
                self._end_children()
        number, unpacked = self._open.pop(diff_id)
        lower = tuple(self._shelf.path(layer.number) for layer in list(layers)[::-1])
        below_it = tuple(dict.fromkeys(lower))
        limit = self._config.unpacked_limit_bytes
        path, recipe = self._shelf.path(number), self._shelf.recipe(number)
        bytes_used, inodes = settle(path, below_it, unpacked, recipe, limit, self._steps)
        settled = replace(unpacked, bytes_used=bytes_used, inodes=inodes)
        layer = self._shelf.add(self._layer_of(number, diff_id, below, settled))
        self._held.append(layer.number)
        return layer

    def _check(self) -> None:
        if self._stopped:
            raise Cancelled(f"transfer of image {self._content.manifest.config.digest} was cancelled")

    def _report(self, descriptor: Descriptor, state: str, current: int) -> None:
        self._progress(Progress(descriptor.digest, state, current, descriptor.size))

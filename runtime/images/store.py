"""The image store: what cribd knows of images, all of it in memory, and how it changes.

Reading (`list`, `get`) looks at an immutable index and touches no disk. Directories of the store are 0700: they hold
setuid programs and secrets of containers that nobody on the host shall reach.
"""

import logging
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING

from runtime.errors import AlreadyExists, Cancelled, CribError, NotFound, of_disk
from runtime.images import merged
from runtime.images.catalogue import Catalogue
from runtime.images.health import Health
from runtime.images.image import Auth, FsUsage, Image, ImagesConfig, Progress, RootFs
from runtime.images.layers import Unpacker, number_of, short_name, usage_of
from runtime.images.records import ImageRecords, Layer, RootFsRecords, lock
from runtime.images.reference import Reference, parse
from runtime.images.rootfs import Roots, lowers
from runtime.images.shelf import Shelf
from runtime.removal import remove_tree

if TYPE_CHECKING:
    from runtime.images.check import Finding
    from runtime.images.pull import Pull
    from runtime.images.transfer import Content, Source
    from runtime.images.volumes import Copying, Owner

log = logging.getLogger(__name__)

_POLL_S = 0.05


class Images:
    """The store below one directory, which it may share: its own are layers/, recipes/, rootfs/, spool/, images.* and
    rootfs.db*.

    Thread-safe. Opened by one process at a time.
    """

    def __init__(self, root: Path, config: ImagesConfig) -> None:
        self._root = root
        self._config = config
        self._base = root / "layers"
        self._containers = config.containers or root / "rootfs"
        # For files on their way in; what is left there is removed at the next start.
        self.spool = root / "spool"
        self._recipes = root / "recipes"
        self._lock = threading.Lock()
        self._pulls: dict[object, Pull] = {}
        self._threads: set[threading.Thread] = set()
        self._health = Health(config.unhealthy_s)
        self._lock_file = -1

    def open(self) -> None:
        """Read the records and make the disk agree with them. Raises WrongState if another process has the store.

        An image that lacks a layer's directory is forgotten and logged; what no record names is removed in the
        background.
        """
        for directory in (self._root, self._base, self._recipes, self._containers, self.spool):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        with ExitStack() as undo:
            lock_file = lock(self._root / "images.lock")
            undo.callback(os.close, lock_file)
            self._records = ImageRecords(self._root)
            undo.callback(self._records.close)
            self._rootfs_records = RootFsRecords(self._root)
            undo.callback(self._rootfs_records.close)
            self._rootfs_records.checkpoint()
            self._unpacker = Unpacker(self._config, lock_file)
            self._shelf = Shelf(self._base, self._recipes, self._records)
            self._roots = Roots(self._containers, self._shelf, self._rootfs_records)
            self._catalogue = Catalogue(self._shelf, self._config.pinned)
            self._load()
            self._lock_file = lock_file
            undo.pop_all()

    def _load(self) -> None:
        layers = {layer.number: layer for layer in self._records.layers()}
        present = {entry.name for entry in os.scandir(self._base)}
        # images.db was removed: containers may run on what nothing else knows of.
        lost = {number for name in present if (number := number_of(name)) and number not in layers}
        held = self._roots.load(layers.keys() | lost)
        if lost:
            log.error("layers without a record: %d", len(lost))
            used = {number: usage_of(map(str, self._shelf.paths(number))) for number in lost.intersection(chain(*held))}
            adopted = {number: Layer(number, "", "", *used.get(number, (0, 0))) for number in lost}
            self._records.adopt(adopted.values())
            layers |= adopted
        whole = {}
        for stored in self._records.images():
            missing = [n for n in stored.layers if n not in layers or short_name(n) not in present]
            if missing or not stored.layers or not stored.intact:
                what = f"lacks layers {missing}" if stored.intact else "has damaged records"
                log.error("image %s %s and is forgotten", stored.id, what)
                self._records.remove_image(stored.id)
                continue
            self._restore(layers, stored.layers)
            whole[stored.id] = stored
        # After those of images, which are the ones to be shared: a container may have one that was damaged.
        for numbers in held:
            self._restore(layers, numbers)
        names = {name: image for name, image in self._records.names().items() if image in whole}
        self._catalogue.load(whole.values(), names)
        unknown = [number for number in layers if not self._shelf.known(number)]
        known = {short_name(number) for number in layers}
        strays = [self._base / name for name in present - known]
        strays += [Path(entry.path) for entry in os.scandir(self._containers) if not self._roots.image(entry.name)]
        strays += [Path(entry.path) for entry in os.scandir(self.spool)]
        strays += [Path(entry.path) for entry in os.scandir(self._recipes) if Path(entry.name).stem not in known]
        if unknown or strays:
            log.info("removing %d half-made layers and %d directories without a record", len(unknown), len(strays))
            self._in_background(lambda: self._sweep(unknown, strays))

    def _restore(self, layers: dict[int, Layer], numbers: tuple[int, ...]) -> None:
        for number in numbers:
            self._shelf.restore(layers[number])

    def _sweep(self, layers: list[int], strays: list[Path]) -> None:
        for path in strays:
            try:
                remove_tree(path)
            except OSError as error:
                log.warning("%s is left behind: %s", path, error)
        self._shelf.remove(layers)

    def close(self) -> None:
        """End every pull and wait until nothing writes to the store any more. Closing again does nothing."""
        if self._lock_file < 0:
            return
        with self._lock:
            pulls = list(self._pulls.values())
            threads = list(self._threads)
        for pull in pulls:
            pull.cancel()
        for thread in threads:
            thread.join()
        self._unpacker.close()
        self._records.close()
        self._rootfs_records.checkpoint()
        self._rootfs_records.close()
        os.close(self._lock_file)
        self._lock_file = -1

    def get(self, ref: str) -> Image:
        """The image that `ref` names: an id or a unique prefix of one, a tag, a digest, or both (the digest decides).

        Raises NotFound; InvalidSpec for an ambiguous prefix.
        """
        return self._catalogue.get(ref)

    def pull(
        self,
        ref: str,
        *,
        auth: Auth | None = None,
        progress: Callable[[Progress], None] | None = None,
        cancelled: threading.Event | None = None,
        only: str = "",
    ) -> Image:
        """Bring the image that `ref` names, with all that it needs; what is here already isn't fetched again.

        Requests for the same reference with the same credentials are one transfer. `cancelled` ends the wait within a
        tenth of a second, and the transfer when nobody else waits for it. Raises CribError; nothing is left then.
        With `only`, NotFound where the registry has another image than that id by this name.
        """
        reference = parse(ref)
        auth = None if auth is None or auth.empty else auth
        if cancelled is not None and cancelled.is_set():
            raise Cancelled(f"pull of {reference} was cancelled")
        pull = self._join(reference, auth, progress, only)
        while True:
            try:
                return self.get(pull.result.result(timeout=_POLL_S))
            except NotYet:
                if cancelled is not None and cancelled.is_set():
                    pull.leave(progress)
                    raise Cancelled(f"pull of {reference} was cancelled") from None

    def _join(
        self, reference: Reference, auth: Auth | None, progress: Callable[[Progress], None] | None, only: str
    ) -> "Pull":
        from runtime.images.pull import Pull  # urllib3 and ssl are not for those who never pull

        with self._lock:
            pull = self._pulls.get((str(reference), auth, only))
            if pull is not None and pull.join(progress):
                return pull
            pull = Pull(reference, auth, self._config, self.spool, self._health, only, self._catalogue.stored)
            pull.join(progress)
            self._pulls[pull.key] = pull
            self._threads.add(pull.start(self._install, self._ended))
        return pull

    def _ended(self, pull: "Pull") -> None:
        with self._lock:
            self._threads.discard(threading.current_thread())
            if self._pulls.get(pull.key) is pull:
                del self._pulls[pull.key]

    def _install(self, content: "Content", source: "Source", pull: "Pull") -> str:
        id = content.manifest.config.digest
        with self._shelf.turn(id, pull.check):
            self._add(content, source, pull.report, pull.when_cancelled)
        return id

    def _add(
        self,
        content: "Content",
        source: "Source",
        report: Callable[[Progress], None],
        when_cancelled: Callable[[Callable[[], None]], None],
    ) -> None:
        """Install content whose turn it is, or only name it if it is here."""
        from runtime.images.transfer import Transfer

        id = content.manifest.config.digest
        stored = before = self._catalogue.stored(id)
        if stored is not None and not any(map(self._shelf.hidden, stored.layers)):
            if not self._catalogue.called(id, content.names):
                self._records.name(id, content.names)
            for layer in content.manifest.layers:
                report(Progress(layer.digest, "exists", layer.size, layer.size))
        else:
            transfer = Transfer(content, source, self._shelf, self._records, self._unpacker, self._config, report)
            when_cancelled(transfer.cancel)
            stored = transfer.run()
            log.info("image %s of %d layers is in the store", id, len(stored.layers))
        self._catalogue.put(stored, content.names)
        if before is not None and stored is not before:  # damaged layers have been replaced
            self._shelf.remove(self._shelf.release(before.layers))

    def load(self, fileobj: IO[bytes]) -> list[Image]:
        """Add the images of an OCI archive or a docker archive, compressed or not.

        Raises BadImage, Unsupported, Exhausted; images before the one that fails stay.
        """
        from runtime.images.archive import Archive

        loaded = []
        try:
            with Archive(fileobj, self.spool, self._config) as archive:
                for content in archive.contents():
                    id = content.manifest.config.digest
                    with self._shelf.turn(id, lambda: None):
                        self._add(content, archive, lambda progress: None, lambda action: None)
                    loaded.append(self.get(id))
        except OSError as error:
            raise of_disk("load of an image", error) from error
        return loaded

    def remove(self, ref: str) -> None:
        """Remove the image that `ref` names with all its names; unknown is fine.

        Layers that other images or containers need stay until those are gone.
        """
        try:
            id = self.get(ref).id
        except NotFound:
            return
        with self._shelf.turn(id, lambda: None):
            stored = self._catalogue.take(id)
            if stored is None:
                return
            doomed = self._shelf.release(stored.layers)
            try:
                self._records.remove_image(id)
            except CribError:
                # A full disk takes no records: bytes first. Until the record is gone, a restart finds an image
                # without its layers and forgets it.
                self._shelf.delete(doomed)
                self._records.remove_image(id)
        self._shelf.remove(doomed)
        log.info("image %s is removed", id)

    def save(self, refs: Sequence[str]) -> Generator[bytes, None, None]:
        """The images as one archive, see `runtime.images.save`. Raises NotFound and WrongState before it begins.

        The layers stay until the iterator is exhausted or closed.
        """
        from runtime.images.care import save

        return save(self._catalogue, self._shelf, refs)

    def check(self, repair: bool = False) -> Generator["Finding", None, None]:
        """Read every layer and compare it with what was unpacked; with `repair`, pull images with damaged ones again.

        Containers keep the damaged layer that they were started on. Not for the event loop.
        """
        from runtime.images.care import check

        pull = (lambda name, id: self.pull(name, only=id)) if repair else None
        return check(self._catalogue, self._shelf, self._records, pull)

    def layers(self) -> dict[str, tuple[int, int]]:
        """Bytes and inodes of each finished layer, by its short name; of some only a container is left."""
        return {short_name(layer.number): (layer.bytes_used, layer.inodes) for layer in self._shelf.all()}

    def users(self) -> dict[str, str]:
        """The image of each container that has a root file system."""
        return {container: image for container in self._roots.all() if (image := self._roots.image(container))}

    def read_file(self, image_id: str, path: str, limit_bytes: int) -> bytes:
        """A file of the image's merged layers, symlinks resolved inside. Raises NotFound; Exhausted if larger."""
        layers = self._catalogue.hold(image_id).layers
        try:
            return merged.read_file(self._merged(layers), path, limit_bytes)
        finally:
            self._shelf.remove(self._shelf.release(layers))

    def has(self, image_id: str, path: str) -> bool:
        """Whether the image's merged layers have something at `path`, symlinks resolved inside. Raises NotFound."""
        layers = self._catalogue.hold(image_id).layers
        try:
            return self._merged(layers).lookup(path) is not None
        finally:
            self._shelf.remove(self._shelf.release(layers))

    def _merged(self, layers: tuple[int, ...]) -> merged.Merged:
        return merged.Merged(tuple(self._base / name for name in lowers(layers)))

    def prepare(self, container_id: str, image_id: str) -> RootFs:
        """Make a container's upper and work directories on top of an image. The same again returns the same.

        Raises NotFound; AlreadyExists if the container has another image; Exhausted, Unavailable.
        """
        there = self._roots.image(container_id)
        if there is not None:
            if there == image_id or there == self.get(image_id).id:
                return self._roots.get(container_id)
            raise AlreadyExists(f"root file system of {container_id} is prepared from {there}")
        stored = self._catalogue.hold(image_id)
        return self._roots.make(container_id, stored.id, stored.layers)

    def volumes(self, container_id: str) -> str:
        """Where `make_volumes` makes a container's directories."""
        return self._roots.volumes(container_id)

    def make_volumes(self, container_id: str, paths: Sequence[str], owner: "Owner") -> "Copying | None":
        """Make a directory for each of these VOLUMEs, named by its number, for the container that was just prepared.

        Returns what is still to be copied, if the image has anything there. Raises InvalidSpec, Exhausted, Unavailable.
        """
        from runtime.images import volumes

        rootfs = self._roots.get(container_id)
        layers = map(self._shelf.get, self._roots.layers(container_id))
        # VOLUMEs may be parts of one another: that an image's are all the same large directory is no reason.
        limit_bytes = 2 * sum(layer.bytes_used + layer.inodes * volumes.ENTRY_BYTES for layer in layers)
        return volumes.make(rootfs, self.volumes(container_id), paths, owner, limit_bytes, self._lock_file)

    def discard(self, container_id: str) -> None:
        """Remove what `prepare` and `make_volumes` made, with what the container left there; unknown is fine.

        Raises Unavailable.
        """
        self._roots.discard(container_id)

    def prepared(self) -> Sequence[str]:
        """The containers that have a root file system."""
        return self._roots.all()

    def rootfs(self, container_id: str) -> RootFs:
        """What `prepare` returned. Raises NotFound."""
        return self._roots.get(container_id)

    def upper_usage(self, container_id: str) -> tuple[int, int]:
        """Bytes and inodes that a container has written to its root file system. Walks it: not for the event loop."""
        return self._roots.usage(container_id)

    def fs_info(self) -> tuple[list[FsUsage], list[FsUsage]]:
        """What the images occupy, with all that is on its way in or out, and what containers' writable layers do.

        The same where both lie on one file system. Walks what isn't a finished layer: not for the event loop.
        """
        layers = self._shelf.usage()
        others = (*self._root.glob("images.*"), *self._root.glob("rootfs.db*"), self.spool)
        more = usage_of(map(str, others))
        bytes_used, inodes = layers[0] + more[0], layers[1] + more[1]
        images = [FsUsage(str(self._root), bytes_used, inodes)]
        if self._config.containers is None:
            return images, images
        bytes_used = inodes = 0
        for container_id in self._roots.all():
            try:
                used = self._roots.usage(container_id)
            except NotFound:
                continue
            bytes_used, inodes = bytes_used + used[0], inodes + used[1]
        return images, [FsUsage(str(self._containers), bytes_used, inodes)]

    def _in_background(self, action: Callable[[], None]) -> None:
        def run() -> None:
            try:
                action()
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="sweep")
        with self._lock:
            self._threads.add(thread)
        thread.start()

    # The last one, because its name hides the type's.
    def list(self) -> list[Image]:
        """Every image, from memory."""
        return self._catalogue.all()

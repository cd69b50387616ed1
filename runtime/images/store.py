"""The image store: what cribd knows of images, all of it in memory, and how it changes.

Reading (`list`, `get`) looks at an immutable index and touches no disk. Directories of the store are 0700: they hold
setuid programs and secrets of containers that nobody on the host shall reach.
"""

import logging
import os
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, replace
from errno import EDQUOT, ENOSPC
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING

from runtime.errors import (
    AlreadyExists,
    Cancelled,
    CribError,
    Exhausted,
    InvalidSpec,
    NotFound,
    Unavailable,
    WrongState,
)
from runtime.images import merged
from runtime.images.health import Health
from runtime.images.image import Auth, FsUsage, Image, ImagesConfig, Progress, RootFs
from runtime.images.layers import remove_tree, short_name
from runtime.images.manifest import chain_ids, parse_config
from runtime.images.records import ImageRecords, Layer, RootFsRecords, StoredImage, lock
from runtime.images.reference import Reference, parse
from runtime.images.rootfs import Roots, lowers
from runtime.images.shelf import Shelf

if TYPE_CHECKING:
    from runtime.images.check import Finding
    from runtime.images.pull import Pull
    from runtime.images.transfer import Content, Source

log = logging.getLogger(__name__)

_POLL_S = 0.05
_HEX = re.compile(r"[0-9a-f]{1,64}")


@dataclass(frozen=True, slots=True)
class _Index:
    """What `list` and `get` read; replaced as a whole."""

    images: dict[str, Image]
    names: dict[str, str]


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
        self._spool = root / "spool"
        self._recipes = root / "recipes"
        self._lock = threading.Lock()
        self._index = _Index({}, {})
        self._stored: dict[str, StoredImage] = {}
        self._pulls: dict[object, Pull] = {}
        self._threads: set[threading.Thread] = set()
        self._health = Health(config.unhealthy_s)
        self._lock_file = -1

    def open(self) -> None:
        """Read the records and make the disk agree with them. Raises WrongState if another process has the store.

        An image that lacks a layer's directory is forgotten and logged; what no record names is removed in the
        background.
        """
        for directory in (self._root, self._base, self._recipes, self._containers, self._spool):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        self._lock_file = lock(self._root / "images.lock")
        self._records = ImageRecords(self._root)
        self._rootfs_records = RootFsRecords(self._root)
        self._rootfs_records.checkpoint()
        self._shelf = Shelf(self._base, self._recipes, self._records)
        self._roots = Roots(self._containers, self._shelf, self._rootfs_records)
        self._load()

    def _load(self) -> None:
        layers = {layer.number: layer for layer in self._records.layers()}
        present = {entry.name for entry in os.scandir(self._base)}
        for numbers in self._roots.load(layers.keys()):
            self._restore(layers, numbers)
        names = self._records.names()
        for stored in self._records.images():
            missing = [n for n in stored.layers if n not in layers or short_name(n) not in present]
            if missing or not stored.layers:
                log.error("image %s lacks layers %s and is forgotten", stored.id, missing)
                self._records.remove_image(stored.id)
                names = {name: image for name, image in names.items() if image != stored.id}
                continue
            self._restore(layers, stored.layers)
            self._stored[stored.id] = stored
        self._reindex(names)
        unknown = [number for number in layers if not self._shelf.known(number)]
        known = {short_name(number) for number in layers}
        strays = [self._base / name for name in present - known]
        strays += [Path(entry.path) for entry in os.scandir(self._containers) if not self._roots.image(entry.name)]
        strays += [Path(entry.path) for entry in os.scandir(self._spool)]
        strays += [Path(entry.path) for entry in os.scandir(self._recipes) if entry.name not in known]
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
        self._records.close()
        self._rootfs_records.checkpoint()
        self._rootfs_records.close()
        os.close(self._lock_file)
        self._lock_file = -1

    def get(self, ref: str) -> Image:
        """The image that `ref` names: an id or a unique prefix of one, a tag, a digest, or both (the digest decides).

        Raises NotFound; InvalidSpec for an ambiguous prefix.
        """
        index = self._index
        found = index.images.get(ref) or index.images.get(f"sha256:{ref}")
        if found is not None:
            return found
        try:
            named = index.names.get(str(parse(ref)))
        except InvalidSpec:
            named = None
        if named is not None:
            return index.images[named]
        prefix = ref.removeprefix("sha256:")
        if _HEX.fullmatch(prefix):
            matches = [image for id, image in index.images.items() if id.startswith(f"sha256:{prefix}")]
            if len(matches) > 1:
                raise InvalidSpec(f"image id {ref} is ambiguous: {len(matches)} images start with it")
            if matches:
                return matches[0]
        raise NotFound(f"image {ref[:300]!r} is not here")

    def pull(
        self,
        ref: str,
        *,
        auth: Auth | None = None,
        progress: Callable[[Progress], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Image:
        """Bring the image that `ref` names, with all that it needs; what is here already isn't fetched again.

        Requests for the same reference with the same credentials are one transfer. `cancelled` ends the wait within a
        tenth of a second, and the transfer when nobody else waits for it. Raises CribError; nothing is left then.
        """
        reference = parse(ref)
        if cancelled is not None and cancelled.is_set():
            raise Cancelled(f"pull of {reference} was cancelled")
        pull = self._join(reference, auth, progress)
        while True:
            try:
                return self.get(pull.result.result(timeout=_POLL_S))
            except NotYet:
                if cancelled is not None and cancelled.is_set():
                    pull.leave(progress)
                    raise Cancelled(f"pull of {reference} was cancelled") from None

    def _join(self, reference: Reference, auth: Auth | None, progress: Callable[[Progress], None] | None) -> "Pull":
        from runtime.images.pull import Pull  # urllib3 and ssl are not for those who never pull

        with self._lock:
            pull = self._pulls.get((str(reference), auth))
            if pull is not None and pull.join(progress):
                return pull
            pull = Pull(reference, auth, self._config, self._spool, self._health)
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
        before = self._stored.get(id)
        if before is not None and not any(map(self._shelf.hidden, before.layers)):
            if any(self._index.names.get(name) != id for name in content.names):
                self._records.name(id, content.names)
            for layer in content.manifest.layers:
                report(Progress(layer.digest, "exists", layer.size, layer.size))
        else:
            transfer = Transfer(content, source, self._shelf, self._records, self._config, report)
            when_cancelled(transfer.cancel)
            stored = transfer.run()
            with self._lock:
                self._stored[id] = stored
            if before is not None:  # damaged layers have been replaced
                self._shelf.remove(self._shelf.release(before.layers))
            log.info("image %s of %d layers is in the store", id, len(stored.layers))
        with self._lock:
            self._reindex({**self._index.names, **dict.fromkeys(content.names, id)})

    def load(self, fileobj: IO[bytes]) -> list[Image]:
        """Add the images of an OCI archive or a docker archive, compressed or not.

        Raises BadImage, Unsupported, Exhausted; images before the one that fails stay.
        """
        from runtime.images.archive import Archive

        loaded = []
        try:
            with Archive(fileobj, self._spool, self._config) as archive:
                for content in archive.contents():
                    id = content.manifest.config.digest
                    with self._shelf.turn(id, lambda: None):
                        self._add(content, archive, lambda progress: None, lambda action: None)
                    loaded.append(self.get(id))
        except OSError as error:
            kind = Exhausted if error.errno in (ENOSPC, EDQUOT) else Unavailable
            raise kind(f"load of an image: {(error.strerror or str(error)).lower()}") from error
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
            with self._lock:
                stored = self._stored.pop(id, None)
                if stored is None:
                    return
                self._reindex({name: image for name, image in self._index.names.items() if image != id})
            doomed = self._shelf.release(stored.layers)
            try:
                self._records.remove_image(id)
            except CribError:
                # A full disk takes no records: bytes first. Until the record is gone, a restart finds an image
                # without its layers and forgets it.
                self._shelf.remove(doomed)
                self._records.remove_image(id)
        self._shelf.remove(doomed)
        log.info("image %s is removed", id)

    def save(self, refs: Sequence[str]) -> Generator[bytes, None, None]:
        """The images as one archive, see `runtime.images.save`. Raises NotFound and WrongState before it begins.

        The layers stay until the iterator is exhausted or closed.
        """
        from runtime.images.save import archive

        with self._lock:
            images = list({image.id: image for image in map(self.get, refs)}.values())
            for image in images:
                for number in self._stored[image.id].layers:
                    if not self._shelf.recipe(number).exists():
                        raise WrongState(
                            f"image {image.id}: layer {short_name(number)} can't be put together again: "
                            "entries of it replaced each other, or went elsewhere on top of the layers below"
                        )
            held = [number for image in images for number in self._stored[image.id].layers]
            self._shelf.hold(held)
        return self._released(archive(images, self._place), held)

    def _place(self, short: str) -> tuple[Path, Path]:
        return self._base / short, self._recipes / short

    def _released(self, chunks: Iterator[bytes], held: Sequence[int]) -> Generator[bytes, None, None]:
        try:
            yield from chunks
        finally:
            self._shelf.remove(self._shelf.release(held))

    def check(self, repair: bool = False) -> Generator["Finding", None, None]:
        """Read every layer and compare it with what was unpacked; with `repair`, pull images with damaged ones again.

        Containers keep the damaged layer that they were started on. Not for the event loop.
        """
        from runtime.images.check import Finding, problem_of

        with self._lock:
            users: dict[int, list[str]] = {}
            for id, stored in self._stored.items():
                for number in dict.fromkeys(stored.layers):
                    users.setdefault(number, []).append(id)
            self._shelf.hold(list(users))
        try:
            for number, images in sorted(users.items()):
                layer, recipe = self._shelf.get(number), self._shelf.recipe(number)
                verified = recipe.exists()
                present = self._shelf.path(number).is_dir()
                problem = problem_of(self._shelf.path(number), recipe, layer.diff_id) if verified else ""
                problem = problem if present else "its directory is missing"
                finding = Finding(short_name(number), layer.diff_id, tuple(images), verified, problem)
                if problem and repair:
                    finding = replace(finding, repaired=self._repair(number, images))
                yield finding
        finally:
            self._shelf.remove(self._shelf.release(list(users)))

    def _repair(self, number: int, images: Sequence[str]) -> bool:
        self._shelf.hide(number)
        done = True
        for id in images:
            image = self._index.images.get(id)
            for name in image.repo_digests if image else ():
                try:
                    self.pull(name)
                except CribError as error:
                    log.warning("image %s is not repaired from %s: %s", id, name, error)
                    continue
                break
            stored = self._stored.get(id)
            done = done and (stored is None or number not in stored.layers)
        return done

    def layers(self) -> dict[str, tuple[int, int]]:
        """Bytes and inodes of each layer of an image, by its short name."""
        numbers = {number for stored in list(self._stored.values()) for number in stored.layers}
        found = {}
        for number in numbers:
            try:
                layer = self._shelf.get(number)
            except KeyError:
                continue  # removed meanwhile
            found[short_name(number)] = (layer.bytes_used, layer.inodes)
        return found

    def users(self) -> dict[str, str]:
        """The image of each container that has a root file system."""
        return {container: image for container in self._roots.all() if (image := self._roots.image(container))}

    def read_file(self, image_id: str, path: str, limit_bytes: int) -> bytes:
        """A file of the image's merged layers, symlinks resolved inside. Raises NotFound; Exhausted if larger."""
        with self._lock:
            stored = self._stored.get(self.get(image_id).id)
            if stored is None:
                raise NotFound(f"image {image_id} is not here")
            self._shelf.hold(stored.layers)
        try:
            roots = tuple(self._base / name for name in lowers(stored.layers))
            return merged.read_file(merged.Merged(roots), path, limit_bytes)
        finally:
            self._shelf.remove(self._shelf.release(stored.layers))

    def has(self, image_id: str, path: str) -> bool:
        """Whether the image's merged layers have something at `path`, symlinks resolved inside. Raises NotFound."""
        with self._lock:
            layers = self._stored[self.get(image_id).id].layers
            self._shelf.hold(layers)
        try:
            return merged.Merged(tuple(self._base / name for name in lowers(layers))).lookup(path) is not None
        finally:
            self._shelf.remove(self._shelf.release(layers))

    def prepare(self, container_id: str, image_id: str) -> RootFs:
        """Make a container's upper and work directories on top of an image. The same again returns the same.

        Raises NotFound; AlreadyExists if the container has another image; Exhausted, Unavailable.
        """
        with self._lock:
            there = self._roots.image(container_id)
            if there is not None and there in (image_id, self._index.names.get(image_id)):
                return self._roots.get(container_id)
            id = self.get(image_id).id
            if there == id:
                return self._roots.get(container_id)
            if there is not None:
                raise AlreadyExists(f"root file system of {container_id} is prepared from {there}")
            layers = self._stored[id].layers
            self._shelf.hold(layers)
        return self._roots.make(container_id, id, layers)

    def discard(self, container_id: str) -> None:
        """Remove what `prepare` made, whatever the container left in it; unknown is fine. Raises Unavailable."""
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
        """What the images occupy, their layers and the records, and what containers' writable layers do.

        The same where both lie on one file system. Else it walks the writable layers: not for the event loop.
        """
        bytes_used, inodes = self._shelf.usage()
        for path in (*self._root.glob("images.*"), *self._root.glob("rootfs.db*")):
            bytes_used += path.lstat().st_blocks * 512
            inodes += 1
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

    def _reindex(self, names: dict[str, str]) -> None:
        by_image: dict[str, list[str]] = {}
        for name in sorted(names):
            by_image.setdefault(names[name], []).append(name)
        old = self._index.images
        images = {}
        for id, stored in self._stored.items():
            own = by_image.get(id, [])
            image = old.get(id)
            layers = tuple(map(short_name, stored.layers))
            if (
                image is None
                or image.layers != layers
                or [*image.repo_digests, *image.repo_tags] != sorted(own, key=lambda n: "@" not in n)
            ):
                image = self._image(stored, own)
            images[id] = image
        self._index = _Index(images, names)

    def _image(self, stored: StoredImage, names: Sequence[str]) -> Image:
        config = parse_config(stored.config, len(stored.layers))
        unique = {number: self._shelf.get(number) for number in stored.layers}
        return Image(
            id=stored.id,
            repo_tags=tuple(name for name in names if "@" not in name),
            repo_digests=tuple(name for name in names if "@" in name),
            size_bytes=sum(layer.bytes_used for layer in unique.values()) + len(stored.config) + len(stored.manifest),
            config=config.image,
            layers=tuple(map(short_name, stored.layers)),
            chain_id=chain_ids(config.diff_ids)[-1],
            pinned=any(fnmatchcase(name, glob) for name in (stored.id, *names) for glob in self._config.pinned),
            created=config.created,
            manifest_digest=stored.manifest_digest,
            diff_ids=config.diff_ids,
            architecture=config.architecture,
            os=config.os,
            raw_config=stored.config,
        )

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
        return [*self._index.images.values()]

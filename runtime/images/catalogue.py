"""Which images there are and what they are called, in memory."""

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from runtime.errors import InvalidSpec, NotFound
from runtime.images.image import Image
from runtime.images.layers import short_name
from runtime.images.manifest import chain_ids, parse_config
from runtime.images.records import StoredImage
from runtime.images.reference import parse
from runtime.images.shelf import Shelf

_HEX = re.compile(r"[0-9a-f]{1,64}")


@dataclass(frozen=True, slots=True)
class _Index:
    """What `list` and `get` read; replaced as a whole."""

    images: dict[str, Image]
    names: dict[str, str]


class Catalogue:
    """Thread-safe; reading looks at an immutable index, without a lock. `pinned` are globs over names and ids."""

    def __init__(self, shelf: Shelf, pinned: Sequence[str]) -> None:
        self._shelf = shelf
        self._pinned = pinned
        self._lock = threading.Lock()
        self._index = _Index({}, {})
        self._stored: dict[str, StoredImage] = {}

    def load(self, images: Iterable[StoredImage], names: Mapping[str, str]) -> None:
        """Take over what the records say; `names` tell the id of each."""
        with self._lock:
            self._stored = {stored.id: stored for stored in images}
            self._reindex(dict(names))

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

    def all(self) -> list[Image]:
        return [*self._index.images.values()]

    def called(self, id: str, names: Iterable[str]) -> bool:
        """Whether all of `names` are this image's."""
        return all(self._index.names.get(name) == id for name in names)

    def stored(self, id: str) -> StoredImage | None:
        return self._stored.get(id)

    def put(self, stored: StoredImage, names: Iterable[str]) -> None:
        """The image is here, in place of what was known of it, and these names are its from now on."""
        with self._lock:
            self._stored[stored.id] = stored
            self._reindex({**self._index.names, **dict.fromkeys(names, stored.id)})

    def take(self, id: str) -> StoredImage | None:
        """The image is gone for everybody but the caller, who has to let go of its layers."""
        with self._lock:
            stored = self._stored.pop(id, None)
            if stored is not None:
                self._reindex({name: image for name, image in self._index.names.items() if image != id})
            return stored

    def hold(self, ref: str) -> StoredImage:
        """The image with its layers held, which the caller has to let go of. Raises NotFound, InvalidSpec."""
        with self._lock:
            stored = self._stored[self.get(ref).id]
            self._shelf.hold(stored.layers)
            return stored

    def users(self) -> dict[int, list[str]]:
        """The ids of the images that have each layer."""
        users: dict[int, list[str]] = {}
        for id, stored in list(self._stored.items()):
            for number in dict.fromkeys(stored.layers):
                users.setdefault(number, []).append(id)
        return users

    def hold_all(self) -> dict[int, list[str]]:
        """`users`, with every layer of them held once, which the caller has to let go of."""
        with self._lock:
            users = self.users()
            self._shelf.hold(list(users))
            return users

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
            pinned=any(fnmatchcase(name, glob) for name in (stored.id, *names) for glob in self._pinned),
            created=config.created,
            manifest_digest=stored.manifest_digest,
            diff_ids=config.diff_ids,
            architecture=config.architecture,
            os=config.os,
            raw_config=stored.config,
        )

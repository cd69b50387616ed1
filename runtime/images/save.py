"""Images as an archive, which OCI tools and docker take: an OCI image layout with docker's manifest.json beside.

Layers are plain tars, with the very bytes of their diff ids (see `runtime.images.unpack.recipe`); so an image keeps its
id, and its manifest is a new one.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from runtime.errors import Unavailable
from runtime.images.image import Image
from runtime.images.manifest import OCI_INDEX, OCI_MANIFEST, digest_of
from runtime.images.unpack.errors import BadLayer
from runtime.images.unpack.recipe import rebuild, size_of

_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CHUNK = 1 << 20

# A layer's directory and its recipe, by its short name.
Place = Callable[[str], tuple[Path, Path]]


def archive(images: Iterable[Image], place: Place) -> Iterator[bytes]:
    """The archive's bytes. Raises Unavailable when a layer is damaged, by then some of it is out."""
    entries, docker = [], []
    written: set[str] = set()
    for image in images:
        layers = []
        for short, diff_id in zip(image.layers, image.diff_ids, strict=True):
            directory, recipe = place(short)
            try:
                size = size_of(recipe)
                layers.append({"mediaType": _LAYER, "digest": diff_id, "size": size})
                if diff_id not in written:
                    written.add(diff_id)
                    yield from _layer(directory, recipe, diff_id, size)
            except (BadLayer, OSError) as error:
                raise Unavailable(f"layer {diff_id} of {image.id}: {error}: see crib check") from error
        config = {"mediaType": _CONFIG, "digest": image.id, "size": len(image.raw_config)}
        manifest = msgspec.json.encode(
            {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
        )
        for data in (image.raw_config, manifest):
            if (digest := digest_of(data)) not in written:
                written.add(digest)
                yield from _file(_blob(digest), data)
        described = {"mediaType": OCI_MANIFEST, "digest": digest_of(manifest), "size": len(manifest)}
        names = [{"annotations": {"io.containerd.image.name": tag, **_ref(tag)}} for tag in image.repo_tags] or [{}]
        entries += [described | name for name in names]
        docker.append(
            {
                "Config": _blob(image.id),
                "RepoTags": list(image.repo_tags),
                "Layers": [_blob(layer) for layer in image.diff_ids],
            }
        )
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    yield from _file("index.json", msgspec.json.encode(index))
    yield from _file("manifest.json", msgspec.json.encode(docker))
    yield from _file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    yield bytes(2 * tarfile.BLOCKSIZE)


def _ref(tag: str) -> dict[str, str]:
    return {"org.opencontainers.image.ref.name": tag.rpartition(":")[2]}


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _file(name: str, data: bytes) -> Iterator[bytes]:
    yield _header(name, len(data)) + data + _padding(len(data))


def _layer(directory: Path, recipe: Path, diff_id: str, size: int) -> Iterator[bytes]:
    yield _header(_blob(diff_id), size)
    hashed = hashlib.new(diff_id.partition(":")[0])
    gathered = io.BytesIO()
    for data in rebuild(recipe, directory):
        hashed.update(data)
        gathered.write(data)
        if gathered.tell() >= _CHUNK:
            yield gathered.getvalue()
            gathered = io.BytesIO()
    yield gathered.getvalue() + _padding(size)
    if hashed.hexdigest() != diff_id.partition(":")[2]:
        raise BadLayer("its files have changed")

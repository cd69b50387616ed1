"""The documents of an image: index, manifest, configuration. OCI image-spec 1.1 and Docker's schema 2.

They are hostile input whose size was bounded when it was read.
"""

import hashlib
from dataclasses import dataclass

import msgspec

from runtime.errors import NotFound, Unsupported
from runtime.images.errors import BadImage
from runtime.images.image import ImageConfig
from runtime.images.platform import Machine, this_machine
from runtime.images.reference import is_digest

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEXES = (OCI_INDEX, "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = (OCI_MANIFEST, "application/vnd.docker.distribution.manifest.v2+json")
_CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+"
ACCEPT = ", ".join((*_INDEXES, *_MANIFESTS))
# What overlayfs takes (OVL_MAX_STACK).
LAYERS_LIMIT = 500


class Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A reference by content: media type, digest and size in bytes."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None
    artifact_type: str = ""


class _Document(msgspec.Struct, frozen=True, rename="camel"):
    schema_version: int
    media_type: str = ""
    manifests: list[Descriptor] | None = None
    config: Descriptor | None = None
    layers: list[Descriptor] | None = None
    fs_layers: msgspec.Raw | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """Manifests of one image for several platforms."""

    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One platform's configuration and layers, bottom first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Runtime(msgspec.Struct, frozen=True, rename="pascal"):
    user: str | None = None
    env: list[str] | None = None
    entrypoint: list[str] | str | None = None
    cmd: list[str] | str | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    volumes: dict[str, msgspec.Raw] | None = None
    labels: dict[str, str] | None = None
    exposed_ports: dict[str, msgspec.Raw] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    type: str
    diff_ids: list[str]


class _Config(msgspec.Struct, frozen=True):
    rootfs: _RootFs
    architecture: str = ""
    os: str = ""
    created: str | None = None
    config: _Runtime | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """An image's configuration as crib uses it."""

    image: ImageConfig
    diff_ids: tuple[str, ...]
    architecture: str
    os: str
    created: str


def digest_of(data: bytes, like: str = "sha256:") -> str:
    """The digest of `data` by the algorithm that `like` starts with."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def chain_ids(diff_ids: tuple[str, ...]) -> tuple[str, ...]:
    """The chain id of each layer with those below it (OCI image-spec, config.md)."""
    chains: list[str] = []
    for diff_id in diff_ids:
        chains.append(digest_of(f"{chains[-1]} {diff_id}".encode()) if chains else diff_id)
    return tuple(chains)


def parse(data: bytes, content_type: str = "") -> Index | Manifest:
    """The index or manifest in `data`, whose media type must agree with what it holds and with `content_type`.

    Raises BadImage; Unsupported for what can't be run.
    """
    if content_type.startswith(_SCHEMA_1):
        raise Unsupported("the image has a manifest of Docker's schema 1, which is obsolete")
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadImage(f"not a manifest: {error}") from error
    if document.schema_version == 1 or document.fs_layers is not None:
        raise Unsupported("the image has a manifest of Docker's schema 1, which is obsolete")
    if document.schema_version != 2:
        raise BadImage(f"manifest of schema version {document.schema_version}")
    told = {kind for kind in (document.media_type, content_type) if kind in _INDEXES or kind in _MANIFESTS}
    if len(told) > 1:
        raise BadImage(f"manifest is announced as {content_type} and calls itself {document.media_type}")
    if document.media_type and not told:
        raise Unsupported(f"manifest of type {document.media_type[:100]}")
    if document.manifests is not None:
        if document.config is not None or document.layers is not None or told & set(_MANIFESTS):
            raise BadImage("manifest is an index and a manifest at once")
        return Index(tuple(_checked(entry) for entry in document.manifests))
    if document.config is None or document.layers is None or told & set(_INDEXES):
        raise BadImage("manifest has neither manifests nor configuration and layers")
    if document.config.media_type not in _CONFIGS:
        raise Unsupported(f"not an image that can run: its configuration is of type {document.config.media_type[:100]}")
    if len(document.layers) > LAYERS_LIMIT:
        raise Unsupported(f"image has {len(document.layers)} layers, the kernel takes {LAYERS_LIMIT}")
    return Manifest(_checked(document.config), tuple(_layer(layer) for layer in document.layers))


def _checked(descriptor: Descriptor) -> Descriptor:
    if not is_digest(descriptor.digest):
        raise BadImage(f"descriptor with malformed digest {descriptor.digest[:100]!r}")
    if descriptor.size < 0:
        raise BadImage(f"descriptor of {descriptor.digest} with size {descriptor.size}")
    return descriptor


def _layer(descriptor: Descriptor) -> Descriptor:
    kind = descriptor.media_type
    # The compression is told by the content; here only: is it a layer at all.
    if not kind.startswith(("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")):
        raise Unsupported(f"not an image that can run: it has a layer of type {kind[:100]}")
    if "encrypted" in kind:
        raise Unsupported("image has encrypted layers")
    return _checked(descriptor)


def select(index: Index, machine: Machine | None = None) -> Descriptor:
    """The entry that uses most of this machine (or of `machine`). Raises NotFound, which lists what there is."""
    machine = machine or this_machine()
    ranked = [(found, entry) for entry in index.manifests if (found := rank(entry, machine)) is not None]
    if not ranked:
        platforms = [entry.platform for entry in index.manifests if entry.platform]
        # Of an unknown system are attestations.
        offered = ["/".join(filter(None, (p.os, p.architecture, p.variant))) for p in platforms if p.os != "unknown"]
        raise NotFound(f"image has no manifest for {machine}, it has {', '.join(offered[:20]) or 'none'}")
    return max(ranked, key=lambda pair: pair[0])[1]


def rank(entry: Descriptor, machine: Machine) -> int | None:
    """How much of the machine an index's entry uses, -1 if it names no platform; None if it isn't for the machine."""
    platform = entry.platform
    if platform is None:
        # An index without platforms names one image, or several to be tried in order.
        return -1 if entry.media_type in (*_INDEXES, *_MANIFESTS) else None
    return machine.rank(platform.architecture, platform.variant) if platform.os == "linux" else None


def parse_config(data: bytes, layers: int) -> Config:
    """The configuration in `data`, of an image with so many layers. Raises BadImage, Unsupported."""
    try:
        raw = msgspec.json.decode(data, type=_Config)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadImage(f"not an image configuration: {error}") from error
    diff_ids = tuple(raw.rootfs.diff_ids)
    if raw.rootfs.type != "layers" or not all(map(is_digest, diff_ids)):
        raise BadImage("image configuration with malformed rootfs")
    if len(diff_ids) != layers:
        raise BadImage(f"image configuration names {len(diff_ids)} layers, the manifest {layers}")
    if not diff_ids:
        raise Unsupported("image has no layers")
    if raw.os not in ("", "linux"):
        raise Unsupported(f"image is for {raw.os[:50]}")
    config = raw.config or _Runtime()
    return Config(
        image=ImageConfig(
            user=config.user or "",
            env=tuple(config.env or ()),
            entrypoint=_words(config.entrypoint),
            cmd=_words(config.cmd),
            working_dir=config.working_dir or "",
            stop_signal=config.stop_signal or "",
            volumes=tuple(config.volumes or ()),
            labels=dict(config.labels or {}),
            exposed=tuple(config.exposed_ports or ()),
        ),
        diff_ids=diff_ids,
        architecture=raw.architecture,
        os=raw.os or "linux",
        created=raw.created or "",
    )


def _words(value: list[str] | str | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())

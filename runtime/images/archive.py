"""Images in a tar archive: OCI image layout, or what `docker save` writes; compressed or not.

Blobs are read in place: from the archive's own file, or from a decompressed copy in a file without a name.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec

from runtime.errors import Exhausted, InvalidSpec
from runtime.images.errors import BadImage
from runtime.images.image import ImagesConfig
from runtime.images.manifest import Descriptor, Index, Manifest, digest_of, parse, rank, select
from runtime.images.platform import this_machine
from runtime.images.reference import is_tag
from runtime.images.reference import parse as parse_reference
from runtime.images.transfer import Content
from runtime.images.unpack.errors import BadLayer
from runtime.images.unpack.stream import decompressed
from runtime.images.unpack.tar import FILE, SYMLINK, Reader, Stream

_COPY = 1 << 18
_BLOCKS = 1 << 12
_MEMBERS_LIMIT = 20_000
_NAME_KEYS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_NESTED_INDEXES = 3
# What all formats of tar have in the first header.
_MAGIC, _MAGIC_AT = b"ustar", 257


class _DockerEntry(msgspec.Struct, frozen=True, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class Archive:
    """The archive in `fileobj`, which is read once from where it stands; a context manager and a Source of layers.

    Raises BadImage, Exhausted.
    """

    def __init__(self, fileobj: IO[bytes], spool: Path, config: ImagesConfig) -> None:
        self._config = config
        self._file = self._spooled(fileobj, spool)
        self._blobs: dict[str, tuple[int, int]] = {}
        try:
            self._members = self._read_members()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def contents(self) -> Iterator[Content]:
        """The images, for this machine's platform where there are several."""
        if "index.json" in self._members:
            yield from self._oci()
        elif "manifest.json" in self._members:
            yield from self._docker()
        else:
            raise BadImage("archive holds no image: neither index.json nor manifest.json is in it")

    def fetch(self, descriptor: Descriptor, take: Callable[[bytes], None]) -> None:
        offset, size = self._blob(descriptor.digest)
        if size != descriptor.size:
            raise BadImage(f"archive: blob {descriptor.digest} has {size} bytes instead of {descriptor.size}")
        if self._digest(offset, size, descriptor.digest, take) != descriptor.digest:
            raise BadImage(f"archive: blob {descriptor.digest} holds something else")

    def another(self, descriptor: Descriptor) -> bool:
        return False

    def cancel(self) -> None:
        pass  # nothing blocks here for long

    def _spooled(self, fileobj: IO[bytes], spool: Path) -> IO[bytes]:
        if (plain := _in_place(fileobj)) is not None:
            return plain
        copy = tempfile.NamedTemporaryFile(dir=spool, buffering=0)  # noqa: SIM115
        try:
            written = 0
            for chunk in decompressed(fileobj):
                written += len(chunk)
                if written > self._config.unpacked_limit_bytes:
                    raise Exhausted(f"archive of more than {self._config.unpacked_limit_bytes} bytes")
                view = memoryview(chunk)
                while view:
                    view = view[copy.write(view) or 0 :]
        except BadLayer as error:
            copy.close()
            raise BadImage(f"archive: {error}") from error
        except BaseException:
            copy.close()
            raise
        return copy

    def _read_members(self) -> dict[str, tuple[int, int]]:
        """Offset and size of each file, by its name; symbolic links (old docker archives share layers so) resolved."""
        members: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        stream = _Seeking(self._file.fileno())
        try:
            for count, entry in enumerate(Reader(stream)):
                if count > _MEMBERS_LIMIT:
                    raise Exhausted(f"archive with more than {_MEMBERS_LIMIT} members")
                name = os.path.normpath(os.fsdecode(entry.name))
                if entry.kind == FILE and entry.extents in ([], [(0, entry.size)]):
                    members[name] = (stream.position, entry.size)
                elif entry.kind == SYMLINK:
                    links[name] = os.path.normpath(os.path.join(os.path.dirname(name), os.fsdecode(entry.link)))
        except BadLayer as error:
            raise BadImage(f"not a tar archive: {error}") from error
        for name, target in links.items():
            if target in members:
                members.setdefault(name, members[target])
        return members

    def _member(self, name: str) -> tuple[int, int]:
        try:
            return self._members[os.path.normpath(name)]
        except KeyError:
            raise BadImage(f"archive: {name[:200]!r} is missing") from None

    def _blob(self, digest: str) -> tuple[int, int]:
        return self._blobs.get(digest) or self._member("blobs/" + digest.replace(":", "/"))

    def _digest(
        self, offset: int, size: int, like: str = "sha256:", take: Callable[[bytes], None] = lambda data: None
    ) -> str:
        algorithm = like.partition(":")[0]
        hashed = hashlib.new(algorithm)
        while size and (data := os.pread(self._file.fileno(), min(size, _COPY), offset)):
            hashed.update(data)
            take(data)
            offset += len(data)
            size -= len(data)
        return f"{algorithm}:{hashed.hexdigest()}"

    def _small(self, where: tuple[int, int], what: str, limit: int) -> bytes:
        offset, size = where
        if size > limit:
            raise Exhausted(f"archive: {what} of {size} bytes, the limit is {limit}")
        return os.pread(self._file.fileno(), size, offset)

    def _oci(self) -> Iterator[Content]:
        top = parse(self._small(self._member("index.json"), "index.json", self._config.manifest_limit_bytes))
        if not isinstance(top, Index):
            raise BadImage("archive: index.json is not an index")
        machine = this_machine()
        for entry in [e for e in top.manifests if rank(e, machine) is not None] or top.manifests:
            descriptor = entry
            for _ in range(_NESTED_INDEXES):
                raw = self._checked(descriptor, self._config.manifest_limit_bytes)
                document = parse(raw, descriptor.media_type)
                if isinstance(document, Manifest):
                    config = self._checked(document.config, self._config.config_limit_bytes)
                    yield Content(document, descriptor.digest, raw, config, _names(entry))
                    break
                descriptor = select(document)
            else:
                raise BadImage(f"archive: indexes more than {_NESTED_INDEXES} deep")

    def _checked(self, descriptor: Descriptor, limit: int) -> bytes:
        data = self._small(self._blob(descriptor.digest), f"blob {descriptor.digest}", limit)
        if digest_of(data, descriptor.digest) != descriptor.digest:
            raise BadImage(f"archive: blob {descriptor.digest} holds something else")
        return data

    def _docker(self) -> Iterator[Content]:
        raw = self._small(self._member("manifest.json"), "manifest.json", self._config.manifest_limit_bytes)
        try:
            entries = msgspec.json.decode(raw, type=list[_DockerEntry])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise BadImage(f"archive: manifest.json: {error}") from error
        for entry in entries:
            config = self._small(self._member(entry.config), "the configuration", self._config.config_limit_bytes)
            layers = []
            for name in entry.layers:
                where = self._member(name)
                digest = self._digest(*where)
                self._blobs[digest] = where
                layers.append(Descriptor("application/vnd.docker.image.rootfs.diff.tar", digest, where[1]))
            manifest = Manifest(
                Descriptor("application/vnd.docker.container.image.v1+json", digest_of(config), len(config)),
                tuple(layers),
            )
            document = msgspec.json.encode(
                {
                    "schemaVersion": 2,
                    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                    "config": _plain(manifest.config),
                    "layers": [_plain(layer) for layer in layers],
                }
            )
            names = tuple(str(parse_reference(tag)) for tag in entry.repo_tags or ())
            yield Content(manifest, digest_of(document), document, config, names)


class _Seeking(Stream):
    """A file from its start; what is skipped isn't read."""

    def __init__(self, file: int) -> None:
        super().__init__(self._read())
        self._file = file
        self._read_to = 0

    def _read(self) -> Iterator[bytes]:
        while data := os.pread(self._file, _BLOCKS, self._read_to):
            self._read_to += len(data)
            yield data

    def skip_to(self, position: int) -> None:
        if position > os.fstat(self._file).st_size:
            raise BadLayer("archive ends in the middle of an entry")
        self._at += position - self.position
        if self._at > len(self._chunk):
            self._chunk, self._at, self._read_to = b"", 0, position
        self.position = position

    def drain(self) -> None:
        pass


def _in_place(fileobj: IO[bytes]) -> IO[bytes] | None:
    """The same file once more, if it is one that is an archive as it stands."""
    try:
        file, start = fileobj.fileno(), fileobj.tell()
        if start == 0 and os.pread(file, len(_MAGIC), _MAGIC_AT) == _MAGIC:
            return os.fdopen(os.dup(file), "rb", buffering=0)
    except OSError:
        pass  # bytes in memory, or a pipe
    return None


def _plain(descriptor: Descriptor) -> dict[str, str | int]:
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


def _names(entry: Descriptor) -> tuple[str, ...]:
    """The tag and the digest that an index entry's annotations give it; a bare tag names nothing."""
    for key in _NAME_KEYS:
        text = (entry.annotations or {}).get(key, "")
        if text and not is_tag(text):
            try:
                reference = parse_reference(text)
            except InvalidSpec as error:
                raise BadImage(f"archive: {error}") from error
            return str(reference), f"{reference.name}@{entry.digest}"
    return ()

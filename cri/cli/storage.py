"""`crib save`, `image inspect`, `image tree`, `df` and `check`."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from cri.api import cri_pb2, crib_pb2
from cri.cli.client import Client
from cri.cli.failure import Failure
from cri.cli.image import find
from cri.cli.output import short, show, show_json, size


class LayerRow(msgspec.Struct, frozen=True, kw_only=True):
    """`images`: how many have this layer."""

    diff_id: str
    size_bytes: int
    inodes: int
    images: int


class TreeRow(msgspec.Struct, frozen=True, kw_only=True):
    """`own_bytes` is what would be free without the image, as far as no container needs it."""

    id: str
    tags: list[str]
    size_bytes: int
    own_bytes: int
    layers: list[LayerRow]


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    number: int
    in_use: int
    size_bytes: int
    reclaimable_bytes: int


class FindingRow(msgspec.Struct, frozen=True, kw_only=True):
    layer: str
    diff_id: str
    images: list[str]
    problem: str
    repaired: bool


def save(client: Client, options: Namespace) -> int:
    """Write images as an archive, or as a layout."""
    chunks = (news.chunk for news in client.stream("Save", images=options.images))
    if options.layout:
        _lay_out(chunks, Path(options.layout))
        return 0
    if options.file == "-" and sys.stdout.isatty():
        raise Failure("an archive is nothing for a terminal: use --file, or redirect standard output")
    if options.file == "-":
        _write(chunks, sys.stdout.buffer)
        return 0
    try:
        _save(chunks, Path(options.file))
    except OSError as error:
        raise _cannot(options.file, error) from error
    return 0


def _save(chunks: Iterator[bytes], target: Path) -> None:
    """A file is there when it is whole; a pipe or a device is written to."""
    if target.exists() and not target.is_file():
        with open(target, "wb") as file:
            _write(chunks, file)
        return
    part = Path(f"{target}.part")
    try:
        with open(part, "wb") as file:
            _write(chunks, file)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)


def _cannot(name: str | Path, error: OSError | tarfile.TarError) -> Failure:
    cause = error.strerror if isinstance(error, OSError) else None
    return Failure(f"cannot write {name}: {(cause or str(error)).lower()}")


def _write(chunks: Iterator[bytes], file: IO[bytes]) -> None:
    for chunk in chunks:
        file.write(chunk)


class _Reader(io.RawIOBase):
    """Chunks as a file that tarfile reads."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._left:
            self._left = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _lay_out(chunks: Iterator[bytes], directory: Path) -> None:
    """All of the layout, or nothing."""
    if directory.exists():
        raise Failure(f"cannot write {directory}: file exists")
    try:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as aside:
            part = Path(aside, "layout")
            part.mkdir()
            _extract(chunks, part)
            part.rename(directory)
    except (OSError, tarfile.TarError) as error:
        raise _cannot(directory, error) from error


def _extract(chunks: Iterator[bytes], directory: Path) -> None:
    with tarfile.open(fileobj=io.BufferedReader(_Reader(chunks)), mode="r|") as archive:
        for member in archive:
            data = archive.extractfile(member)
            if data is None or member.name == "manifest.json" or ".." in Path(member.name).parts:
                continue
            target = directory / member.name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            with data, open(target, "xb") as file:
                shutil.copyfileobj(data, file, 1 << 20)


def inspect(client: Client, options: Namespace) -> int:
    """Everything that is known of images."""
    told = []
    for given in options.images:
        image = find(client, given)
        answer = client.call("ImageStatus", image=cri_pb2.ImageSpec(image=image.id), verbose=True)
        info = json.loads(answer.info.get("info", "{}"))
        told.append(
            {
                "id": image.id,
                "tags": list(image.repo_tags),
                "digests": list(image.repo_digests),
                "size_bytes": image.size,
                "pinned": image.pinned,
                "user": image.username or (str(image.uid.value) if image.HasField("uid") else ""),
                "chain_id": info.get("chainID", ""),
                "spec": info.get("imageSpec", {}),
            }
        )
    show_json(told)
    return 0


def tree(client: Client, options: Namespace) -> int:
    """Images and their layers, the lowest first."""
    stored = client.call("Storage")
    wanted = {find(client, given).id for given in options.images} or {image.id for image in stored.images}
    rows = [row for row in _trees(stored) if row.id in wanted]
    if options.output == "json":
        show_json(rows)
        return 0
    for row in rows:
        print(f"{' '.join(row.tags) or '<none>'}  {short(row.id)}  {size(row.size_bytes)}, own {size(row.own_bytes)}")
        for number, layer in enumerate(row.layers, 1):
            branch = "└─" if number == len(row.layers) else "├─"
            shared = f"  in {layer.images} images" if layer.images > 1 else ""
            print(f"{branch} {short(layer.diff_id)}  {size(layer.size_bytes)}  {layer.inodes} inodes{shared}")
    return 0


def _trees(stored: crib_pb2.StorageResponse) -> list[TreeRow]:
    layers = {layer.name: layer for layer in stored.layers}
    users = Counter(name for image in stored.images for name in set(image.layers))
    rows = []
    for image in sorted(stored.images, key=lambda image: (list(image.repo_tags), image.id)):
        own = [layers[name] for name in image.layers if name in layers]
        rows.append(
            TreeRow(
                id=image.id,
                tags=list(image.repo_tags),
                size_bytes=image.size_bytes,
                own_bytes=sum(
                    layers[name].size_bytes for name in set(image.layers) & layers.keys() if users[name] == 1
                ),
                layers=[
                    LayerRow(
                        diff_id=layer.diff_id,
                        size_bytes=layer.size_bytes,
                        inodes=layer.inodes,
                        images=users[layer.name],
                    )
                    for layer in own
                ],
            )
        )
    return rows


def df(client: Client, options: Namespace) -> int:
    """What images and containers take; layers that several images have count once, and those of a removed image as long
    as a container or an image volume needs them."""
    stored = client.call("Storage")
    used = {container.image for container in stored.containers}
    containers = [container for container in stored.containers if not container.volume]
    needed = {name for user in stored.containers for name in user.layers}
    needed |= {name for image in stored.images if image.pinned for name in image.layers}
    rows = [
        UsageRow(
            kind="images",
            number=len(stored.images),
            in_use=sum(image.id in used for image in stored.images),
            size_bytes=sum(layer.size_bytes for layer in stored.layers),
            reclaimable_bytes=sum(layer.size_bytes for layer in stored.layers if layer.name not in needed),
        ),
        UsageRow(
            kind="containers",
            number=len(containers),
            in_use=len(containers),
            size_bytes=sum(container.size_bytes for container in stored.containers),
            reclaimable_bytes=0,
        ),
    ]
    columns = {
        "WHAT": lambda row: row.kind,
        "NUMBER": lambda row: str(row.number),
        "IN USE": lambda row: str(row.in_use),
        "SIZE": lambda row: size(row.size_bytes),
        "RECLAIMABLE": lambda row: size(row.reclaimable_bytes),
    }
    show(rows, columns, options.output == "json")
    return 0


def check(client: Client, options: Namespace) -> int:
    """Exit status 1 if something is damaged and stays so."""
    found = []
    for news in client.stream("Check", repair=options.repair):
        row = FindingRow(
            layer=news.layer,
            diff_id=news.diff_id,
            images=list(news.images),
            problem=news.problem,
            repaired=news.repaired,
        )
        found.append(row)
        if row.problem and options.output != "json":
            state = "repaired" if row.repaired else "damaged"
            users = " ".join(short(image) for image in row.images)
            print(f"layer {short(row.diff_id)} ({row.layer}) of {users}: {state}: {row.problem}", flush=True)
    damaged = [row for row in found if row.problem and not row.repaired]
    if options.output == "json":
        show_json(found)
    else:
        print(f"{len(found)} layers checked: {len(damaged) or 'none'} damaged")
    return 1 if damaged else 0

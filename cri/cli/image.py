"""`crib pull`, `load`, `images` and `rmi`."""

from __future__ import annotations

import os
import sys
import tarfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from cri.api import cri_pb2, crib_pb2
from cri.cli import failure, progress
from cri.cli.client import Client
from cri.cli.failure import Failure
from cri.cli.output import short, show, show_json, size

_CHUNK_BYTES = 1 << 20


class ImageRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    tags: list[str]
    digests: list[str]
    size_bytes: int
    pinned: bool


class Pulled(msgspec.Struct, frozen=True, kw_only=True):
    image: str
    id: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    tags: list[str]


def pull(client: Client, options: Namespace) -> int:
    """Fetch an image; its id goes to standard output, the progress to standard error."""
    password = sys.stdin.readline().rstrip("\n") if options.password_stdin else ""
    identifier = fetch(client, options.image, options.quiet, options.username, password)
    if options.output == "json":
        show_json(Pulled(image=options.image, id=identifier))
    else:
        print(identifier)
    return 0


def fetch(client: Client, image: str, quiet: bool = False, username: str = "", password: str = "") -> str:
    """Pull `image` and show how far it is; its id. Raises Failure."""
    identifier = ""
    with progress.of_pull(quiet) as told:
        for news in client.stream("Pull", image=image, username=username, password=password):
            if news.image_ref:
                identifier = news.image_ref
            else:
                told(news)
    if not identifier:
        raise Failure(f"pull of {image}: cribd ended it without an image")
    return identifier


def load(client: Client, options: Namespace) -> int:
    """Store the images of an archive, or of the layout in a directory."""
    if os.path.isdir(options.file):
        images = _store(client, options.file, _layout(Path(options.file)), 0)
    else:
        with _archive(options.file) as file:
            pieces = iter(lambda: file.read(_CHUNK_BYTES), b"")
            images = _store(client, options.file, pieces, os.fstat(file.fileno()).st_size)
    rows = [Loaded(id=image.id, tags=list(image.repo_tags)) for image in images]
    if options.output == "json":
        show_json(rows)
    else:
        for row in rows:
            print(" ".join(row.tags) or row.id)
    return 0


def _archive(name: str) -> IO[bytes]:
    if name == "-":
        return sys.stdin.buffer
    try:
        return open(name, "rb")
    except OSError as error:
        code = failure.NOT_FOUND if isinstance(error, FileNotFoundError) else failure.ERROR
        raise Failure(f"cannot load {name}: {(error.strerror or str(error)).lower()}", code) from error


def _layout(directory: Path) -> Iterator[bytes]:
    """The directory's files as an archive."""
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            member = tarfile.TarInfo(str(path.relative_to(directory)))
            member.size = os.fstat(file.fileno()).st_size
            yield member.tobuf()
            yield from iter(lambda: file.read(_CHUNK_BYTES), b"")
            yield bytes(-member.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _store(client: Client, name: str, pieces: Iterator[bytes], length: int) -> Sequence[crib_pb2.LoadedImage]:
    with progress.of_load(name, length) as told:

        def requests() -> Iterator[crib_pb2.LoadRequest]:
            for piece in pieces:
                yield crib_pb2.LoadRequest(chunk=piece)
                told(len(piece))

        loaded: Sequence[crib_pb2.LoadedImage] = client.send("Load", requests()).images
        return loaded


def images(client: Client, options: Namespace) -> int:
    """The images that are here."""
    listed = sorted(client.call("ListImages").images, key=lambda image: (list(image.repo_tags), image.id))
    if options.quiet:
        for image in listed:
            print(image.id)
        return 0
    rows = [
        ImageRow(
            id=image.id,
            tags=list(image.repo_tags),
            digests=list(image.repo_digests),
            size_bytes=image.size,
            pinned=image.pinned,
        )
        for image in listed
    ]
    if options.output == "json":
        show_json(rows)
        return 0
    names = [(row, name) for row in rows for name in row.tags or row.digests or ["<none>"]]
    columns = {
        "IMAGE": lambda entry: entry[1],
        "ID": lambda entry: short(entry[0].id),
        "SIZE": lambda entry: size(entry[0].size_bytes),
    }
    show(names, columns, as_json=False)
    return 0


def find(client: Client, given: str) -> cri_pb2.Image:
    """The image with this tag, digest, id or prefix of an id. Raises Failure."""
    image: cri_pb2.Image = client.call("ImageStatus", image=cri_pb2.ImageSpec(image=given)).image
    if not image.id:
        raise Failure(f"no image {given!r} here: see crib images, or crib pull it", failure.NOT_FOUND)
    return image


def rmi(client: Client, options: Namespace) -> int:
    """Remove images with all their tags."""
    removed = []
    for given in options.images:
        image = find(client, given)
        users = [c for c in client.call("ListContainers").containers if c.image_id == image.id]
        if users and not options.force:
            raise Failure(
                f"image {given} is what container {users[0].metadata.name} ({short(users[0].id)}) was made from: "
                "remove it first, or crib rmi -f"
            )
        client.call("RemoveImage", image=cri_pb2.ImageSpec(image=image.id))
        removed.append(Loaded(id=image.id, tags=list(image.repo_tags)))
        if options.output != "json":
            print(image.id)
    if options.output == "json":
        show_json(removed)
    return 0

"""Saving, checking and repairing what is in the store."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from runtime.errors import CribError, NotFound, WrongState
from runtime.images.catalogue import Catalogue
from runtime.images.check import Finding, problem_of
from runtime.images.layers import short_name
from runtime.images.save import archive
from runtime.images.shelf import Shelf

log = logging.getLogger(__name__)


def save(catalogue: Catalogue, shelf: Shelf, refs: Sequence[str]) -> Generator[bytes, None, None]:
    """See `Images.save`."""
    held: list[int] = []
    try:
        images = list({image.id: image for image in map(catalogue.get, refs)}.values())
        for image in images:
            stored = catalogue.hold(image.id)
            held += stored.layers
            for number in stored.layers:
                if not shelf.recipe(number).exists():
                    raise WrongState(
                        f"image {image.id}: layer {short_name(number)} can't be put together again: "
                        "entries of it replaced each other, or went elsewhere on top of the layers below"
                    )
    except BaseException:
        shelf.remove(shelf.release(held))
        raise

    def place(short: str) -> tuple[Path, Path]:
        return shelf.base / short, shelf.recipes / short

    chunks = _released(archive(images, place), shelf, held)
    next(chunks)  # from here on closing it lets go
    return chunks


def _released(chunks: Iterator[bytes], shelf: Shelf, held: Sequence[int]) -> Generator[bytes, None, None]:
    try:
        yield b""
        yield from chunks
    finally:
        shelf.remove(shelf.release(held))


def check(catalogue: Catalogue, shelf: Shelf, pull: Callable[[str], object] | None) -> Generator[Finding, None, None]:
    """See `Images.check`; `pull` repairs."""
    users = catalogue.hold_all()
    try:
        for number, images in sorted(users.items()):
            path, recipe, seal = shelf.path(number), shelf.recipe(number), shelf.seal(number)
            layer, verified = shelf.get(number), recipe.exists() or seal.exists()
            problem = problem_of(path, recipe, seal, layer.diff_id) if verified else ""
            problem = problem if path.is_dir() else "its directory is missing"
            finding = Finding(short_name(number), layer.diff_id, tuple(images), verified, problem)
            if problem and pull is not None:
                finding = replace(finding, repaired=_repaired(catalogue, shelf, pull, number, images))
            yield finding
    finally:
        shelf.remove(shelf.release(list(users)))


def _repaired(
    catalogue: Catalogue, shelf: Shelf, pull: Callable[[str], object], number: int, images: Sequence[str]
) -> bool:
    shelf.hide(number)
    done = True
    for id in images:
        for name in _digests(catalogue, id):
            try:
                pull(name)
            except CribError as error:
                log.warning("image %s is not repaired from %s: %s", id, name, error)
                continue
            break
        stored = catalogue.stored(id)
        done = done and (stored is None or number not in stored.layers)
    return done


def _digests(catalogue: Catalogue, id: str) -> tuple[str, ...]:
    try:
        return catalogue.get(id).repo_digests
    except NotFound:
        return ()

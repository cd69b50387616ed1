"""Saving, checking and repairing what is in the store."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from runtime.errors import CribError, NotFound, WrongState
from runtime.images.catalogue import Catalogue
from runtime.images.check import Finding, problem_of
from runtime.images.layers import short_name
from runtime.images.records import ImageRecords
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


def check(
    catalogue: Catalogue, shelf: Shelf, records: ImageRecords, pull: Callable[[str, str], object] | None
) -> Generator[Finding, None, None]:
    """See `Images.check`; `pull` fetches again, by a name, an image that has to have this id."""
    users = catalogue.hold_all()
    try:
        for number, images in sorted(users.items()):
            path, recipe, seal = shelf.paths(number)
            diff_id = shelf.get(number).diff_id
            problem = problem_of(path, recipe, seal, diff_id)
            finding = Finding(short_name(number), diff_id, tuple(images), problem)
            if problem and pull is not None:
                shelf.hide(number)
                repaired = [_repaired(catalogue, shelf, records, pull, number, id) for id in images]
                # What has come for one image serves those that couldn't be fetched.
                repaired = [
                    done or _mended(catalogue, shelf, records, id) for done, id in zip(repaired, images, strict=True)
                ]
                finding = replace(finding, repaired=all(repaired))
                if finding.repaired:
                    records.disown(number)
            yield finding
    finally:
        shelf.remove(shelf.release(list(users)))


def _repaired(
    catalogue: Catalogue,
    shelf: Shelf,
    records: ImageRecords,
    pull: Callable[[str, str], object],
    number: int,
    id: str,
) -> bool:
    """Whether the image has the layer no more."""
    if _mended(catalogue, shelf, records, id):
        return True
    try:
        image = catalogue.get(id)
    except NotFound:
        return True
    for name in (*image.repo_digests, *image.repo_tags):
        try:
            pull(name, id)
        except CribError as error:
            log.warning("image %s is not repaired from %s: %s", id, name, error)
            continue
        break
    stored = catalogue.stored(id)
    return stored is None or number not in stored.layers


def _mended(catalogue: Catalogue, shelf: Shelf, records: ImageRecords, id: str) -> bool:
    """Give the image, for those of its layers that are damaged, equal ones that are here. False if there are none."""
    with shelf.turn(id, lambda: None):
        stored = catalogue.stored(id)
        if stored is None:
            return True
        held: list[int] = []
        for number in stored.layers:
            layer = shelf.get(number)
            equal = shelf.hold_equal(layer.diff_id, layer.below) if shelf.hidden(number) else layer
            if equal is None:
                shelf.remove(shelf.release(held))
                return False
            if equal is layer:
                shelf.hold([number])
            held.append(equal.number)
        mended = replace(stored, layers=tuple(held))
        records.commit(mended, (), ())
        catalogue.put(mended, ())
    shelf.remove(shelf.release(stored.layers))
    return True

"""Runs in the guest until its power is cut: pulls and removes images on a disk that stays; tells what it has done.

Each line is on the host before the next thing is begun: `found` and the names of the images that the store has at the
start (after it has been checked), then `pulled NAME` and `removed NAME` in turns.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from runtime.images import Images, ImagesConfig
from tests.runtime.images.given import Built, Layer, build, serving

NAMES = ("one", "two")


def tell(*words: str) -> None:
    print(*words)  # noqa: T201
    sys.stdout.flush()
    os.fsync(sys.stdout.fileno())


def made() -> dict[str, Built]:
    """Two images with a layer in common; the same at each boot."""
    chance = random.Random(7)

    def layer(name: str, size: int) -> bytes:
        made = Layer().file(name, chance.randbytes(size))
        for number in range(1500):
            made.file(f"{name}.d/{number}", chance.randbytes(100))
        return made.tar()

    common = layer("shared", 3 << 20)
    return {name: build(common, layer(name, 1 << 20)) for name in NAMES}


def whole(images: Images, root: Path, builts: dict[str, Built]) -> list[str]:
    """The names of the images that are there, each of them in full; nothing else is."""
    for finding in images.check():
        if finding.problem:
            tell("damaged", finding.layer, finding.problem)
    found = {image.id: image for image in images.list()}
    names = [name for name in NAMES if builts[name].id in found]
    images.close()  # which waits for the sweep
    layers = {name for image in found.values() for name in image.layers}
    for directory, there in (("layers", layers), ("recipes", layers), ("spool", set()), ("rootfs", set())):
        stray = {path.stem for path in (root / directory).iterdir()} ^ there
        if stray:
            tell("damaged", directory, *stray)
    if len(names) != len(found):
        tell("damaged", *found)
    return names


def main(root: Path) -> None:
    builts = made()
    images = Images(root, ImagesConfig())
    images.open()
    names = whole(images, root, builts)
    images.open()
    tell("found", *names)
    with serving(builts["one"]) as one, serving(builts["two"]) as two:
        refs = {"one": f"{one.host}/one:1", "two": f"{two.host}/two:1"}
        while True:
            for name in NAMES:
                images.pull(refs[name])
                tell("pulled", name)
            for name in NAMES:
                images.remove(builts[name].id)
                tell("removed", name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""cribd dies before any one change that a pull, load, removal, repair or start makes to the disk."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.images import Images
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore, tree_of
from tests.runtime.images.given import Built, Layer, Liar, build, oci_archive, serving
from tests.runtime.images.moments import ended_before

pytestmark = requires("root")

# How many moments of each; with 200 or more every one.
MOMENTS = int(os.environ.get("CRIB_KILLS", "12"))
BEGIN = """
import sys
from pathlib import Path
from runtime.images import Images, ImagesConfig
images = Images(Path(sys.argv[1]), ImagesConfig(max_parallel=2))
images.open()
"""
PULL = BEGIN + "images.pull(sys.argv[2]); images.close()"
LOAD = BEGIN + "images.load(open(sys.argv[2], 'rb')); images.close()"
REMOVE = BEGIN + "images.remove('app:1'); images.close()"
PREPARE = BEGIN + "images.prepare('c', 'app:1'); images.discard('c'); images.close()"
REPAIR = BEGIN + "list(images.check(repair=True)); images.close()"
START = BEGIN + "images.close()"


def shared() -> bytes:
    return Layer().directory("g", mode=0o750, uid=3).file("g/shared", "shared").tar()


@pytest.fixture(scope="module")
def app() -> Built:
    """Of its layers one is another image's too, one implies directories, one has a link into a lower one."""
    linking = Layer().file("g/own", os.urandom(20_000)).hardlink("g/link", "g/shared").tar()
    return build(shared(), Layer().file("g/h/i", "x").tar(), linking)


@pytest.fixture(scope="module")
def server(app: Built) -> Iterator[Liar]:
    with serving(app) as liar:
        yield liar


@pytest.fixture
def kept(open_store: OpenStore, run_dir: Path) -> Images:
    """A store, `run_dir`/given, with another image and a container of it."""
    images = open_store(run_dir / "given")
    images.load(io.BytesIO(oci_archive(build(shared(), Layer().file("b", "2").tar()), "kept:1")))
    images.prepare("other", "kept:1")
    return images


def tags(images: Images) -> set[str]:
    return {tag.rpartition("/")[2] for image in images.list() for tag in image.repo_tags}


def assert_nothing_else(images: Images) -> None:
    """There is what belongs to the images and containers, and nothing else. Closes the store."""
    assert [f.layer for f in images.check() if f.problem] == []
    root = Path(images.fs_info()[0][0].mountpoint)
    layers = {name for image in images.list() for name in image.layers}
    containers = {f"rootfs/{name}" for name in images.prepared()}
    for name in images.prepared():
        assert Path(images.rootfs(name).upper).is_dir(), name
    images.close()
    assert set(tree_of(root)) == {f"layers/{name}" for name in layers} | containers
    assert {path.stem for path in (root / "recipes").iterdir()} == layers


def at_each_moment(
    run_dir: Path, open_store: OpenStore, program: str, what: str, look: Callable[[Images], None]
) -> None:
    """Run `program` on copies of `run_dir`/given, and have a `look` at what the next start makes of it."""
    store = run_dir / "store"
    last = change = step = 0
    while change <= last:
        subprocess.run(["cp", "-a", run_dir / "given", store], check=True)
        with ended_before(change, program, store, what) as made:
            if not change:
                last, step = made, max(1, made // MOMENTS)
            try:
                images = open_store(store)
                look(images)
                assert_nothing_else(images)
            except BaseException as error:
                error.add_note(f"killed before change {change} of {last}")
                raise
        shutil.rmtree(store)
        change += step


@pytest.mark.timeout(scaled(900))
@pytest.mark.parametrize("program", [PULL, LOAD], ids=["pull", "load"])
def test_pull_and_load(
    kept: Images, run_dir: Path, open_store: OpenStore, server: Liar, app: Built, program: str
) -> None:
    kept.close()
    archive = run_dir / "archive"
    archive.write_bytes(oci_archive(app, "app:1"))

    def look(images: Images) -> None:
        assert images.prepared() == ["other"]
        assert "kept:1" in tags(images)
        assert len(images.list()) <= 2

    what = f"{server.host}/app:1" if program is PULL else str(archive)
    at_each_moment(run_dir, open_store, program, what, look)


@pytest.mark.timeout(scaled(900))
@pytest.mark.parametrize("program", [REMOVE, PREPARE], ids=["remove", "prepare"])
def test_removal(kept: Images, run_dir: Path, open_store: OpenStore, app: Built, program: str) -> None:
    kept.load(io.BytesIO(oci_archive(app, "app:1")))
    kept.close()

    def look(images: Images) -> None:
        assert {"other"} <= set(images.prepared()) <= {"other", "c"}
        assert {"kept:1"} <= tags(images) <= {"kept:1", "app:1"}
        assert program is REMOVE or "app:1" in tags(images)

    at_each_moment(run_dir, open_store, program, "", look)


@pytest.mark.timeout(scaled(900))
def test_repair(kept: Images, run_dir: Path, open_store: OpenStore, server: Liar) -> None:
    image = kept.pull(f"{server.host}/app:1")
    kept.close()
    damaged = run_dir / "given/layers" / image.layers[1] / "g/h/i"
    damaged.write_text("y")

    def look(images: Images) -> None:
        assert {i.id for i in images.list()} >= {image.id}
        problems = [f for f in images.check(repair=True) if f.problem]
        assert len(problems) <= 1
        assert all(finding.repaired for finding in problems)
        assert images.read_file(image.id, "g/h/i", 10) == b"x"

    at_each_moment(run_dir, open_store, REPAIR, "", look)


@pytest.mark.timeout(scaled(900))
def test_start(kept: Images, run_dir: Path, open_store: OpenStore) -> None:
    """Of a store that a killed cribd has left."""
    kept.close()
    for path in ("layers/zz/deep/er", "rootfs/gone/upper/x", "spool/half"):
        (run_dir / "given" / path).mkdir(parents=True)
    (run_dir / "given/recipes/zz.seal").touch()

    def look(images: Images) -> None:
        assert tags(images) == {"kept:1"}
        assert images.prepared() == ["other"]

    at_each_moment(run_dir, open_store, START, "", look)

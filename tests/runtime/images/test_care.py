"""Checking, repairing and saving what is in the store."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import NotFound, Unavailable, WrongState
from runtime.images import Images
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore, Served
from tests.runtime.images.given import ARCHITECTURE, Layer, build, digest, docker_archive, index, layer, oci_archive

pytestmark = requires("root")

Left = Callable[[], list[str]]
FOREIGN = {"os": "linux", "architecture": "riscv64"}


def rich() -> list[bytes]:
    """Layers with every kind of entry, the second with a directory that it implies and a link to what it hides."""
    below = Layer().directory("d", mode=0o2755, uid=7).file("d/f", os.urandom(70_000), mode=0o4755, gid=9).file("empty")
    below.symlink("s", "d/f").hardlink("h", "d/f", mode=0o4755, gid=9).add("fifo", tarfile.FIFOTYPE)
    below.add("dev", tarfile.CHRTYPE, devmajor=1, devminor=3).file("n" * 150, "long")
    below.file(
        "x", "x", pax_headers={"SCHILY.xattr.user.k": "v", "SCHILY.xattr.trusted.k": "v", "mtime": "1000000000.5"}
    )
    above = (
        Layer()
        .file("d/new", "new")
        .hardlink("again", "d/f", mode=0o4755, gid=9)
        .file("d/.wh.f")
        .file("gone/.wh..wh..opq")
    )
    return [below.tar(), above.tar()]


def saved(images: Images, *refs: str) -> bytes:
    return b"".join(images.save(refs))


def listing(root: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        names = os.listxattr(path, follow_symlinks=False)
        found.append(
            (
                str(path.relative_to(root)),
                *(status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_nlink),
                {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
                status.st_mtime_ns if path.is_file() or path.is_symlink() else 0,
                path.read_bytes() if path.is_file() else os.readlink(path) if path.is_symlink() else None,
            )
        )
    return found


def test_saved_and_loaded(images: Images, open_store: OpenStore, run_dir: Path) -> None:
    layers = rich()
    built = build(*layers)
    [image] = images.load(io.BytesIO(oci_archive(built, "local/app:1")))
    data = saved(images, "local/app:1")
    files = tarfile.open(fileobj=io.BytesIO(data))  # noqa: SIM115
    for diff_id, plain in zip(built.diff_ids, layers, strict=True):
        member = files.extractfile("blobs/" + diff_id.replace(":", "/"))
        assert member is not None
        assert member.read() == plain, "the very bytes"
    other = open_store(run_dir / "other")
    [again] = other.load(io.BytesIO(data))
    assert (again.id, again.diff_ids, again.config) == (image.id, image.diff_ids, image.config)
    assert again.repo_tags == image.repo_tags
    trees = [
        listing(run_dir / store / "layers" / short)
        for store, found in (("store", image), ("other", again))
        for short in found.layers
    ]
    assert trees[:2] == trees[2:]


def test_several_images_share_their_layers(images: Images) -> None:
    shared = layer(a="shared")
    for number in range(2):
        images.load(io.BytesIO(oci_archive(build(shared, layer(b=str(number))), f"local/{number}:1")))
    names = tarfile.open(fileobj=io.BytesIO(saved(images, "local/0:1", "local/1:1", "local/0:1"))).getnames()  # noqa: SIM115
    assert len(names) == len(set(names)) == 3 + 2 * 2 + 3
    with pytest.raises(NotFound):
        images.save(["local/2:1"])


def test_an_archive_that_nobody_reads_holds_nothing(images: Images, left: Left) -> None:
    [image] = images.load(io.BytesIO(oci_archive(build(layer(a="a")), "local/app:1")))
    unread, half_read = images.save([image.id]), images.save([image.id])
    next(half_read)
    images.remove(image.id)
    assert left() == [f"layers/{image.layers[0]}"], "as long as somebody may read it"
    unread.close()
    half_read.close()
    assert left() == []


def test_what_can_not_be_saved(images: Images, run_dir: Path) -> None:
    twice = Layer().file("a", "1").file("a", "2").file("big", bytes(3 << 20) + b"end").tar()
    images.load(io.BytesIO(oci_archive(build(twice), "local/twice:1")))
    with pytest.raises(WrongState, match="can't be put together again"):
        images.save(["local/twice:1"])
    [finding] = images.check()
    assert finding.problem == "", "there is a seal"
    change(run_dir / "store/layers" / finding.layer / "big")
    assert [finding.problem for finding in images.check()] == ["'big' is not as it was"]


def test_a_whole_store(images: Images) -> None:
    images.load(io.BytesIO(oci_archive(build(*rich()), "local/app:1")))
    assert [finding.problem for finding in images.check()] == ["", ""]


def test_a_layer_that_nothing_tells_of(images: Images, run_dir: Path) -> None:
    images.load(io.BytesIO(oci_archive(build(layer(a="x")), "local/app:1")))
    [recipe] = (run_dir / "store/recipes").iterdir()
    recipe.unlink()
    assert [finding.problem for finding in images.check()] == ["what it is compared with is missing"]


def test_links_that_lead_through_the_layers_own_symlinks(images: Images) -> None:
    layer = Layer().directory("d").file("d/f", "x").symlink("to", "d").symlink("root", "/d").symlink("up", "../../d")
    layer.hardlink("one", "to/f").hardlink("two", "root/f").hardlink("three", "up/f")
    images.load(io.BytesIO(oci_archive(build(layer.tar()), "local/app:1")))
    assert [finding.problem for finding in images.check()] == [""]


def change(path: Path) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def moved(path: Path, change: Callable[[Path], object]) -> None:
    """The change is what is found, not that the directory was written to."""
    status = path.parent.stat()
    change(path)
    os.utime(path.parent, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    def do(path: Path) -> None:
        path.unlink()
        make(path)

    moved(path, do)


@pytest.mark.parametrize(
    ("layer", "damage", "match"),
    [
        (0, lambda top: change(top / "d/f"), "holds something else"),
        (0, lambda top: os.truncate(top / "d/f", 5), "bytes instead of|too short"),
        (0, lambda top: (top / "empty").unlink(), "'empty' is missing"),
        (0, lambda top: (top / "d/f").chmod(0o755), "has mode 755 instead of 4755"),
        (0, lambda top: os.chown(top / "d", 0, 0), "another owner"),
        (0, lambda top: replaced(top / "s", lambda path: path.symlink_to("x")), "leads elsewhere"),
        (0, lambda top: os.utime(top / "x", (1, 1)), "'x' was modified"),
        (0, lambda top: os.utime(top / "d", (1, 1)), "'d' was modified"),
        (0, lambda top: os.setxattr(top / "x", "trusted.k", b"w"), "'x' has lost its attribute trusted.k"),
        (0, lambda top: os.removexattr(top / "x", "trusted.k"), "'x' has lost its attribute trusted.k"),
        (0, lambda top: os.setxattr(top / "x", "trusted.n", b""), "'x' has an attribute trusted.n"),
        (0, lambda top: os.setxattr(top / "d", "trusted.overlay.opaque", b"y"), "'d' hides what is below"),
        (0, lambda top: moved(top / "d/n", lambda path: path.touch()), "'d/n' does not belong to it"),
        (0, lambda top: replaced(top / "h", lambda path: shutil.copy2(top / "d/f", path)), "'h' is no link to 'd/f'"),
        (0, lambda top: replaced(top / "dev", lambda path: os.mknod(path, 0o20644, 5)), "'dev' is another device"),
        # What came from the layer below, and what hides it.
        (1, lambda top: os.chown(top / "d", 0, 0), "'d' is not as it was"),
        (1, lambda top: change(top / "again"), "'again' is not as it was"),
        (1, lambda top: moved(top / "d/f", lambda path: path.unlink()), "'d/f' is missing"),
        (1, lambda top: os.removexattr(top / "gone", "trusted.overlay.opaque"), "'gone' is not as it was"),
    ],
)
def test_damage(
    images: Images,
    registry: Served,
    run_dir: Path,
    left: Left,
    layer: int,
    damage: Callable[[Path], object],
    match: str,
) -> None:
    built = build(*rich())
    repository = f"care/{digest(built.manifest)[7:27]}"
    registry.pusher.push(repository, "1", built)
    image = images.pull(f"{registry.host}/{repository}:1")
    rootfs = images.prepare("running", image.id)
    damage(run_dir / "store/layers" / image.layers[layer])
    found = list(images.check())
    assert [bool(finding.problem) for finding in found] == [layer == 0, layer == 1]
    assert re.search(match, found[layer].problem), found
    assert found[layer].images == (image.id,)
    assert [finding.repaired for finding in images.check(repair=True)] == [layer == 0, layer == 1]
    assert [finding.problem for finding in images.check()] == ["", ""]
    after = images.get(image.id)
    assert after.layers[layer] != image.layers[layer]
    assert after.layers[1 - layer] == image.layers[1 - layer], "only what is damaged is fetched again"
    assert images.rootfs("running") == rootfs, "a container keeps what it was started on"
    images.discard("running")
    assert left() == sorted(f"layers/{name}" for name in after.layers)


def test_a_damaged_layer_that_a_container_keeps_is_not_shared_after_a_restart(
    open_store: OpenStore, registry: Served
) -> None:
    below = layer(a="good")
    registry.pusher.push("kept", "1", build(below))
    registry.pusher.push("kept", "2", build(below, layer(b="other")))
    images = open_store()
    image = images.pull(f"{registry.host}/kept:1")
    rootfs = images.prepare("c", image.id)
    Path(rootfs.base, *rootfs.lowers, "a").write_text("evil")
    assert [finding.repaired for finding in images.check(repair=True)] == [True]
    images.close()
    images = open_store()
    again = images.pull(f"{registry.host}/kept:2")
    assert images.read_file(again.id, "a", 10) == b"good"
    assert again.layers[0] == images.get(image.id).layers[0] != image.layers[0]
    for one in (image, again):
        images.remove(one.id)
    assert images.read_file(images.pull(f"{registry.host}/kept:1").id, "a", 10) == b"good"


def test_an_archive_for_several_platforms(images: Images) -> None:
    """Only what is for this machine is loaded, and gets the name."""
    mine, other = build(layer(a="mine")), build(layer(a="other"))
    entries = json.loads(index((mine, {"os": "linux", "architecture": ARCHITECTURE}), (other, FOREIGN)))
    for entry in entries["manifests"]:
        entry["annotations"] = {"org.opencontainers.image.ref.name": "local/app:1"}
    files = Layer().file("index.json", json.dumps(entries))
    for key, data in {**mine.blobs, **other.blobs}.items():
        files.file("blobs/" + key.replace(":", "/"), data)
    assert [image.id for image in images.load(io.BytesIO(files.tar()))] == [mine.id]
    assert images.get("local/app:1").id == mine.id


def test_what_no_registry_has_stays_damaged(images: Images, run_dir: Path) -> None:
    [image] = images.load(io.BytesIO(oci_archive(build(layer(abc="abc")), "local/app:1")))
    change(run_dir / "store/layers" / image.layers[0] / "abc")
    [finding] = images.check(repair=True)
    assert finding.problem and not finding.repaired
    with pytest.raises(Unavailable, match="see crib check"):
        saved(images, "local/app:1")


def test_what_was_loaded_is_repaired_by_its_tag_if_that_is_the_same(
    images: Images, registry: Served, run_dir: Path
) -> None:
    """Images that share the layer need it once, and one that no registry has gets it as well."""
    shared = layer(a="shared")
    here, moved, alone = (build(shared, layer(b=name)) for name in ("here", "moved", "alone"))
    registry.pusher.push("care/here", "1", here)
    registry.pusher.push("care/moved", "1", build(layer(b="another")))
    for built, name in ((alone, "local/alone"), (moved, f"{registry.host}/care/moved"), (here, "")):
        name = name or f"{registry.host}/care/here"
        images.load(io.BytesIO(docker_archive(built, [shared, layer(b=name.rpartition("/")[2])], f"{name}:1")))
    damaged = images.get("local/alone:1").layers[0]
    change(run_dir / "store/layers" / damaged / "a")
    assert [finding.repaired for finding in images.check(repair=True) if finding.problem] == [True]
    assert [finding.problem for finding in images.check()] == [""] * 4
    assert images.get(f"{registry.host}/care/moved:1").id == moved.id, "its name is its own"
    assert not (run_dir / "store/layers" / damaged).exists()
    images.remove("local/alone:1")
    images.remove(f"{registry.host}/care/here:1")
    change(run_dir / "store/layers" / images.get(moved.id).layers[0] / "a")
    assert [finding.repaired for finding in images.check(repair=True) if finding.problem] == [False]


def test_recipes_go_with_their_layers(images: Images, open_store: OpenStore, run_dir: Path) -> None:
    [image] = images.load(io.BytesIO(oci_archive(build(*rich()), "local/app:1")))
    recipes = run_dir / "store/recipes"
    assert {path.stem for path in recipes.iterdir()} == set(image.layers)
    images.remove(image.id)
    assert list(recipes.iterdir()) == []
    (recipes / "stray").touch()
    images.close()
    open_store().close()
    assert list(recipes.iterdir()) == []

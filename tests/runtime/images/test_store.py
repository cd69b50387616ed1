"""The store: archives, containers' root file systems, removal, restarts, a full disk."""

from __future__ import annotations

import io
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.errors import (
    AlreadyExists,
    CribError,
    Exhausted,
    InvalidSpec,
    NotFound,
    Unavailable,
    Unsupported,
    WrongState,
)
from runtime.images import Image, Images
from runtime.images.errors import BadImage
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore, Served, tree_of
from tests.runtime.images.given import (
    Built,
    Layer,
    Request,
    build,
    compressed,
    digest,
    docker_archive,
    layer,
    oci_archive,
    serving,
)

pytestmark = requires("root")

ROOT = Path(__file__).parent.parent.parent.parent
Left = Callable[[], list[str]]


def load(images: Images, *layers: bytes, name: str = "local/app:1", how: str = "gzip") -> Image:
    [image] = images.load(io.BytesIO(oci_archive(build(*layers, how=how), name)))
    return image


def test_an_oci_archive(images: Images) -> None:
    built = build(layer(a="1"), layer(b="2"), how="zstd", Cmd=["run"])
    for compress in (False, True):
        [image] = images.load(io.BytesIO(oci_archive(built, "local/app:1", compress)))
        assert image.id == built.id
        assert image.repo_tags == ("docker.io/local/app:1",)
        assert image.repo_digests == (f"docker.io/local/app@{built.digest}",)
        assert images.list() == [image]
        assert images.read_file(image.id, "b", 10) == b"2"
    [untagged] = images.load(io.BytesIO(oci_archive(build(layer(a="untagged")), "latest")))
    assert untagged.repo_tags == untagged.repo_digests == ()


def test_a_docker_archive(images: Images) -> None:
    layers = [layer(a="1"), layer(b="2")]
    built = build(*layers, Env=["A=1"])
    [image] = images.load(io.BytesIO(docker_archive(built, layers, "app:1", "app:2")))
    assert image.id == built.id
    assert image.repo_tags == ("docker.io/library/app:1", "docker.io/library/app:2")
    assert image.repo_digests == ()
    assert image.config.env == ("A=1",)


def test_bad_archives(images: Images, left: Left) -> None:
    built = build(layer(a="1"))
    good = oci_archive(built, "a:1")
    key = next(iter(built.blobs)).replace(":", "/")
    for data, error, match in (
        (b"", BadImage, "neither index.json nor manifest.json"),
        (b"x" * 5000, BadImage, "not a tar archive"),
        (oci_archive(build(layer(a="1" * 70_000), how="plain"), "a:1")[:50_000], BadImage, "archive ends"),
        (Layer().file("a", pax_headers={"comment": "x" * (2 << 20)}).tar(), BadImage, "extended headers of more than"),
        (compressed(good, "gzip")[:-50], BadImage, "ends early"),
        (layer(a="1"), BadImage, "neither index.json nor manifest.json"),
        (Layer().file("index.json", "{}").tar(), BadImage, "manifest"),
        (Layer().file("index.json", built.manifest).tar(), BadImage, "is not an index"),
        (Layer().file("manifest.json", "{}").tar(), BadImage, "manifest.json"),
        (good.replace(key.encode(), b"blobs/gone".ljust(len(key), b"x")), BadImage, "not a tar|missing"),
        (oci_archive(built, "local/UPPER"), BadImage, "malformed"),
        (docker_archive(build(layer(a="1")), [], "a"), BadImage, "names 1 layers, the manifest 0"),
    ):
        with pytest.raises(error, match=match):
            images.load(io.BytesIO(data))
        assert left() == []
    built.blobs[built.id] += b" "
    with pytest.raises(BadImage, match="holds something else"):
        images.load(io.BytesIO(oci_archive(built, "a:1")))
    with pytest.raises(Unsupported, match="no layers"):
        images.load(io.BytesIO(oci_archive(build(), "a:1")))
    assert images.list() == []
    assert left() == []


@requires("busybox")
def test_the_busybox_image(images: Images, tmp_path: Path, run_dir: Path) -> None:
    archives = [tmp_path / "1.tar", tmp_path / "2.tar"]
    for path in archives:
        subprocess.run([ROOT / "hack/busybox-image", path], check=True)
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with open(archives[0], "rb") as file:
        [image] = images.load(file)
    assert image.repo_tags == ("localhost/crib/busybox:latest",)
    assert images.get("localhost/crib/busybox") == image
    assert image.config.cmd == ("sh",)
    assert images.read_file(image.id, "/etc/passwd", 1000).startswith(b"root:x:0:0")
    root = run_dir / "store/layers" / image.layers[0]
    shown = subprocess.run(["chroot", root, "sh", "-c", "echo $0 && id -u"], capture_output=True, text=True, check=True)
    assert shown.stdout == "sh\n0\n"
    done = subprocess.run(
        [ROOT / "hack/busybox-image", "--busybox", "/nonexistent", tmp_path / "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "busybox-static" in done.stderr


def test_root_file_systems(images: Images, left: Left, run_dir: Path) -> None:
    image = load(images, layer(a="1"), Layer().directory("./", mode=0o711, uid=5, gid=6).file("b").tar())
    rootfs = images.prepare("c1", image.id)
    assert images.prepare("c1", image.repo_tags[0]) == rootfs
    assert images.rootfs("c1") == rootfs
    assert images.prepared() == ["c1"]
    assert rootfs.base == str(run_dir / "store/layers")
    assert rootfs.lowers == image.layers[::-1]
    upper = os.stat(rootfs.upper)
    assert (stat.S_IMODE(upper.st_mode), upper.st_uid, upper.st_gid) == (0o711, 5, 6), "as the topmost layer's root"
    assert stat.S_IMODE(os.stat(os.path.dirname(rootfs.upper)).st_mode) == 0o700
    other = load(images, layer(a="other"), name="local/other:1")
    with pytest.raises(AlreadyExists, match="c1 is prepared from"):
        images.prepare("c1", other.id)
    with pytest.raises(NotFound):
        images.prepare("c2", "sha256:" + "0" * 64)
    for bad in ("", "..", "a/b", "x" * 200):
        with pytest.raises(InvalidSpec, match="container id"):
            images.prepare(bad, image.id)
    written, directory = Path(rootfs.upper, "written"), Path(rootfs.upper, "directory")
    written.write_bytes(bytes(10_000))
    directory.mkdir()
    blocks = sum(path.lstat().st_blocks for path in (written, directory))
    assert images.upper_usage("c1") == (blocks * 512, 2)
    images.discard("c1")
    images.discard("c1")
    assert images.prepared() == []
    with pytest.raises(NotFound):
        images.upper_usage("c1")
    images.remove(other.id)
    images.remove(image.id)
    assert left() == []


def test_layers_stay_while_a_container_has_them(open_store: OpenStore, images: Images, left: Left) -> None:
    image = load(images, layer(a="1"))
    rootfs = images.prepare("c", image.id)
    images.remove(image.repo_tags[0])
    images.remove(image.repo_tags[0])
    assert images.list() == []
    assert images.layers().keys() == set(image.layers), "they take what they take"
    with pytest.raises(NotFound):
        images.get(image.id)
    with pytest.raises(NotFound):
        images.prepare("d", image.id)
    assert Path(rootfs.base, rootfs.lowers[0], "a").read_text() == "1"
    assert images.prepare("c", image.id) == rootfs
    images.close()
    images = open_store()
    assert images.prepared() == ["c"]
    assert images.rootfs("c") == rootfs
    assert Path(rootfs.base, rootfs.lowers[0], "a").read_text() == "1"
    again = load(images, layer(a="1"))
    assert again.layers == image.layers, "what is there is used again"
    images.remove(again.id)
    images.discard("c")
    assert left() == []


def test_files_of_an_image(images: Images) -> None:
    below = Layer().directory("etc").file("etc/passwd", "below").file("etc/group", "group").directory("usr/lib")
    below.file("usr/lib/os-release", "os").file("hidden").directory("opaque").file("opaque/old")
    above = Layer().directory("etc").file("etc/passwd", "above").file(".wh.hidden").file("opaque/.wh..wh..opq")
    above.symlink("etc/os-release", "../usr/lib/os-release").symlink("up", "../../../../etc/group")
    above.symlink("loop", "loop").symlink("abs", "/etc/group").symlink("dir", "etc").file("big", "x" * 1000)
    above.add("null", b"3", devmajor=1, devminor=3).add("pipe", b"6")
    image = load(images, below.tar(), above.tar())
    for path, text in {
        "/etc/passwd": b"above",
        "etc/group": b"group",
        "//etc/../etc/./group": b"group",
        "/etc/os-release": b"os",
        "../../etc/group": b"group",
        "up": b"group",
        "abs": b"group",
        "dir/group": b"group",
    }.items():
        assert images.read_file(image.id, path, 100) == text, path
    for path in ("hidden", "opaque/old", "loop", "etc", "", "etc/passwd/x", "null", "pipe", "none", "a\0b", "x" * 5000):
        with pytest.raises(NotFound):
            images.read_file(image.id, path, 100)
    with pytest.raises(Exhausted, match="larger than 999 bytes"):
        images.read_file(image.id, "big", 999)
    assert len(images.read_file(image.id, "big", 1000)) == 1000


def test_directories_that_a_layer_implies_are_as_below(images: Images, run_dir: Path) -> None:
    below = Layer().directory("tmp", mode=0o1777).directory("srv", mode=0o700, uid=7, gid=8, mtime=5)
    below.directory("srv/www", mode=0o2750, gid=9).file("other")
    implying = Layer().file("tmp/t", "1").file("srv/www/index", "2").file("new/x").file("srv/www/new/er/x").tar()
    image = load(images, below.tar(), implying)
    top = run_dir / "store/layers" / image.layers[1]

    def look(name: str) -> tuple[str, int, int]:
        status = (top / name).lstat()
        return stat.filemode(status.st_mode), status.st_uid, status.st_gid

    assert look("tmp") == ("drwxrwxrwt", 0, 0)
    assert look("srv") == ("drwx------", 7, 8)
    assert (top / "srv").lstat().st_mtime == 5
    assert look("srv/www") == ("drwxr-s---", 0, 9)
    assert look("new") == ("drwxr-xr-x", 0, 0)
    assert look("srv/www/new") == look("srv/www/new/er") == ("drwxr-sr-x", 0, 9), "as mkdir(2) makes them there"
    alone = load(images, layer(x="1"), implying, name="local/alone:1")
    assert alone.layers[1] != image.layers[1], "on top of others it is another layer"
    assert load(images, below.tar(), implying, layer(z="1"), name="local/longer:1").layers[:2] == image.layers


def test_directories_that_the_layers_own_symlink_leads_to_are_as_below(images: Images) -> None:
    below = Layer().directory("d", mode=0o711, uid=3).directory("d/e", mode=0o2700, uid=7)
    above = Layer().symlink("to", "/d/e").file("to/f", "x").symlink("x/up", "../d/new/er").file("x/up/f", "y")
    image = load(images, below.tar(), above.tar())
    rootfs = images.prepare("c", image.id)
    top = Path(rootfs.base, rootfs.lowers[0])
    found = {name: (top / name).stat() for name in ("d", "d/e", "d/new", "d/new/er")}
    assert {name: (stat.S_IMODE(status.st_mode), status.st_uid) for name, status in found.items()} == {
        "d": (0o711, 3),
        "d/e": (0o2700, 7),
        "d/new": (0o755, 0),
        "d/new/er": (0o755, 0),
    }
    assert ((top / "d/e/f").read_text(), (top / "d/new/er/f").read_text()) == ("x", "y")
    assert [finding.problem for finding in images.check() if finding.problem] == []


def test_a_new_directory_takes_its_parents_group_wherever_it_is_listed(images: Images) -> None:
    below = Layer().directory("c", mode=0o2755, gid=5).symlink("b", "c")
    image = load(images, below.tar(), Layer().file("b/e/f", "x").file("c/g", "x").tar())
    rootfs = images.prepare("c", image.id)
    status = Path(rootfs.base, rootfs.lowers[0], "c/e").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o2755, 5)


def test_a_hard_link_is_to_what_was_there_before(images: Images) -> None:
    """The layer has something else there later; what the link before it made is there."""
    above = Layer().hardlink("b", "a").file("a", "new").hardlink("c", "b")
    image = load(images, layer(a="old", b="other"), above.tar())
    assert [images.read_file(image.id, name, 10) for name in "abc"] == [b"new", b"old", b"old"]
    below = Layer().file("d/f", "old").symlink("to", "d")
    image = load(images, below.tar(), Layer().file("to/f", "new").hardlink("b", "d/f").tar())
    assert images.read_file(image.id, "b", 10) == b"new"


def test_entries_below_a_symlink_of_a_lower_layer_go_where_it_leads(images: Images) -> None:
    """A layer that lists bin/tool alone, on top of one where bin leads to usr/bin, doesn't hide all of bin."""
    below = Layer().directory("usr").directory("usr/bin", mode=0o711, uid=4).file("usr/bin/sh", "sh")
    below.directory("usr/bin/d", mode=0o700).symlink("bin", "usr/bin").symlink("dangling", "nowhere").symlink(
        "f", "usr/bin/sh"
    )
    above = Layer().file("bin/tool", "tool").file("bin/d/e", "e").file("usr/bin/own", "own").file("bin/own", "wins")
    above.file("dangling/x", "x").file("f/y", "y").file("bin/.wh.gone").hardlink("bin/alias", "usr/bin/sh")
    image = load(images, below.tar(), above.tar())
    for path, text in {
        "bin/tool": "tool",
        "usr/bin/tool": "tool",
        "bin/sh": "sh",
        "bin/alias": "sh",
        "bin/d/e": "e",
        "usr/bin/own": "wins",
        "dangling/x": "x",
        "f/y": "y",
    }.items():
        assert images.read_file(image.id, path, 10) == text.encode(), path
    top = Path(images.prepare("c", image.id).base, image.layers[1])
    assert sorted(path.name for path in top.iterdir()) == ["dangling", "f", "usr"]
    assert (stat.S_IMODE((top / "usr/bin").lstat().st_mode), (top / "usr/bin").lstat().st_uid) == (0o711, 4)
    assert stat.S_IMODE((top / "usr/bin/d").lstat().st_mode) == 0o700
    assert stat.S_ISCHR((top / "usr/bin/gone").lstat().st_mode)
    images.discard("c")


def test_deep_entries_below_a_symlink(images: Images) -> None:
    """Where each directory is there already."""
    deep = "x/" * 1500
    below = Layer().directory("d").symlink("l", "d").tar()
    above = Layer().file(f"d/{deep}one", "1").file(f"l/{deep}two", "2").file(f"l/{deep}one", "wins").tar()
    image = load(images, below, above)
    assert images.read_file(image.id, f"d/{deep}one", 10) == b"wins"
    assert images.read_file(image.id, f"l/{deep}two", 10) == b"2"
    assert [finding.problem for finding in images.check()] == ["", ""]
    images.remove(image.id)


def test_the_longest_name(images: Images, left: Left) -> None:
    name = "p/" * 1791 + "ff"
    image = load(images, Layer().file(name, "x").tar(), Layer().hardlink("p/l", name).tar())
    assert images.read_file(image.id, "p/l", 10) == b"x"
    assert [finding.problem for finding in images.check()] == ["", ""]
    for path in ("n" * 300, "p/" * 3000):
        assert not images.has(image.id, path)
    images.remove(image.id)
    assert left() == []


def test_hard_links_into_lower_layers(images: Images, run_dir: Path) -> None:
    below = Layer().directory("bin").file("bin/tool", "tool", mode=0o4755, uid=9, mtime=5)
    above = Layer().directory("bin").hardlink("bin/alias", "bin/tool").hardlink("bin/again", "bin/alias")
    image = load(images, below.tar(), above.tar())
    alias = run_dir / "store/layers" / image.layers[1] / "bin/alias"
    assert alias.read_text() == "tool"
    assert (alias.lstat().st_mode & 0o7777, alias.lstat().st_uid, alias.lstat().st_mtime) == (0o4755, 9, 5)
    assert images.read_file(image.id, "bin/again", 10) == b"tool"
    assert alias.samefile(alias.with_name("again"))
    with pytest.raises(BadImage, match="hard link 'x' to 'nowhere'"):
        load(images, below.tar(), Layer().hardlink("x", "nowhere").tar(), name="local/bad:1")
    assert [found.repo_tags for found in images.list()] == [image.repo_tags]


def test_links_to_a_lower_layers_big_file_are_one_copy(images: Images, open_store: OpenStore, run_dir: Path) -> None:
    """Neither holes nor numbers of links make a small layer a large one."""
    below = Layer().file("big", bytes(1 << 20)).tar()
    above = Layer()
    for number in range(500):
        above.hardlink(f"l{number}", "big")
    image = load(images, below, above.tar())
    top = run_dir / "store/layers" / image.layers[1]
    assert {entry.stat().st_ino for entry in os.scandir(top)} == {(top / "l0").stat().st_ino}
    assert image.size_bytes < 3 << 20
    sparse = run_dir / "sparse.tar"
    (run_dir / "holes").touch()
    os.truncate(run_dir / "holes", 1 << 40)
    subprocess.run(["tar", "-cSf", sparse, "-C", run_dir, "holes"], check=True)
    image = load(images, sparse.read_bytes(), Layer().hardlink("l", "holes").tar(), name="local/holes:1")
    copy = run_dir / "store/layers" / image.layers[1] / "l"
    assert (copy.stat().st_size, copy.stat().st_blocks) == (1 << 40, 0)
    images.close()
    limited = open_store(run_dir / "limited", unpacked_limit_bytes=3 << 20)
    links = Layer().hardlink("a", "a1").hardlink("b", "b1").tar()
    two = [Layer().file(name, b"x" * (2 << 20)).tar() for name in ("a1", "b1")]
    with pytest.raises(Exhausted, match="links to files of lower layers take more than"):
        load(limited, *two, links)


def test_what_names_an_image(images: Images) -> None:
    one, two = load(images, layer(a="1"), name="local/one:1"), load(images, layer(a="2"), name="cafe:latest")
    assert images.get("cafe") == two, "a name before a prefix"
    assert images.get(one.id) == images.get(one.id[7:]) == images.get("local/one:1") == one
    prefix = _shared_prefix(images)
    for text in (prefix, f"sha256:{prefix}"):
        with pytest.raises(InvalidSpec, match=r"ambiguous: \d images"):
            images.get(text)
    for ref in ("nothing", "Bad Name", "", "sha256:", "0" * 64, "f" * 63):
        with pytest.raises(NotFound):
            images.get(ref)


def _shared_prefix(images: Images) -> str:
    """Loads images until two begin alike; gives what they begin with."""
    seen: set[str] = set()
    while True:
        image = load(images, layer(a=f"number {len(seen)}"), name=f"local/n{len(seen)}:1")
        if any(id[7] == image.id[7] for id in seen):
            return image.id[7]
        seen.add(image.id)


def test_pinned(open_store: OpenStore) -> None:
    images = open_store(pinned=("docker.io/local/*:1",))
    assert load(images, layer(a="1")).pinned
    assert not load(images, layer(a="2"), name="local/app:2").pinned


def test_usage(images: Images, run_dir: Path) -> None:
    [before], _ = images.fs_info()
    image = load(images, Layer().file("a", bytes(100_000)).file("b", "1").directory("c").tar())
    [after], _ = images.fs_info()
    own = directory_bytes(run_dir) * 2 + 4096
    assert image.size_bytes == pytest.approx(102400 + 4096 + own, abs=2000), "the last is how its tar was"
    grown = after.used_bytes - before.used_bytes
    assert image.size_bytes - 2000 <= grown, "configuration and manifest have room in the records as they are"
    assert after.inodes_used - before.inodes_used == 5
    assert os.path.isdir(after.mountpoint)


def directory_bytes(run_dir: Path) -> int:
    """What an empty directory takes here."""
    (run_dir / "empty").mkdir()
    return (run_dir / "empty").stat().st_blocks * 512


def occupied(root: Path) -> tuple[int, int]:
    """Bytes and inodes, as du(1) counts them; without containers'."""
    seen = {}
    for top in (*root.glob("images.*"), *root.glob("rootfs.db*"), *(root / d for d in ("layers", "recipes", "spool"))):
        for path in (top, *top.rglob("*")):
            status = path.lstat()
            seen[status.st_ino] = status.st_blocks * 512
    return sum(seen.values()), len(seen)


def test_every_byte_is_accounted_for(images: Images, run_dir: Path) -> None:
    """Hard links, holes, large directories and attributes, what was taken from layers below or went where they lead,
    replaced and removed entries."""
    below = Layer().directory("d", mode=0o755, uid=3).file("d/big", os.urandom(300_000)).hardlink("d/again", "d/big")
    for number in range(3000):
        below.file(f"many/a name of some length {number}", "x" if number % 2 else "")
    below.symlink("short", "x").symlink("long", "y" * 200).add("pipe", b"6").symlink("to", "d")
    below.file("attributes", "x", pax_headers={"SCHILY.xattr.trusted.k": "v" * 2000})
    above = Layer().file("d/new", "n").hardlink("copy", "d/big").hardlink("d/copy", "d/big").file("d/.wh.big")
    above.file("to/e/f", "f")
    twice = Layer().file("a", os.urandom(50_000)).file("a", "small").directory("t").file("t/u/v", "x").file("t", "y")
    for number, layers in enumerate(([below.tar(), above.tar()], [below.tar()], [twice.tar()])):
        load(images, *layers, name=f"local/n{number}:1")
        with pytest.raises(CribError):
            load(images, *layers, Layer().file("../escape").tar(), name="local/bad:1")
    os.sync()
    for left in range(3, -1, -1):
        [usage], _ = images.fs_info()
        assert (usage.used_bytes, usage.inodes_used) == occupied(run_dir / "store"), f"{left} images"
        for image in images.list()[:1]:
            images.remove(image.id)


def test_the_bytes_of_a_pull_under_way_are_accounted_for(images: Images, run_dir: Path) -> None:
    load(images, layer(a="1"))
    built = build(Layer().file("d/big", os.urandom(3 << 20)).tar(), layer(b="2"))
    big = max(built.blobs.values(), key=len)

    def half(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(big)))
        request.end_headers()
        request.wfile.write(big[: len(big) // 2])
        server.release.wait(scaled(30))
        request.wfile.write(big[len(big) // 2 :])

    with serving(built) as server, ThreadPoolExecutor() as pool:
        server.lies[digest(big)] = half
        pulled = pool.submit(images.pull, f"{server.host}/half:1")
        try:
            deadline_s = time.monotonic() + scaled(20)
            before, found = (0, 0), (-1, -1)
            while before != found or before[0] < len(big) // 2:
                assert time.monotonic() < deadline_s
                before, [usage], found = occupied(run_dir / "store"), images.fs_info()[0], occupied(run_dir / "store")
            assert (usage.used_bytes, usage.inodes_used) == found
        finally:
            server.release.set()
        pulled.result()
    [usage], _ = images.fs_info()
    os.sync()
    assert (usage.used_bytes, usage.inodes_used) == occupied(run_dir / "store")


def test_writable_layers_on_another_file_system(open_store: OpenStore, small_disk: Path, run_dir: Path) -> None:
    images = open_store(containers=small_disk / "containers")
    image = load(images, layer(a="x"))
    rootfs = images.prepare("c", image.id)
    assert rootfs.upper == str(small_disk / "containers/c/upper")
    Path(rootfs.upper, "written").write_bytes(bytes(1 << 20))
    [of_images], [of_containers] = images.fs_info()
    assert of_images.mountpoint == str(run_dir / "store")
    assert of_containers.mountpoint == str(small_disk / "containers")
    assert of_containers.used_bytes >= 1 << 20
    images.discard("c")
    assert list((small_disk / "containers").iterdir()) == []


def test_the_index_needs_no_disk(images: Images, run_dir: Path) -> None:
    image = load(images, layer(a="1"))
    os.rename(run_dir / "store", run_dir / "away")
    try:
        assert images.list() == [image]
        assert images.get(image.id) == image
    finally:
        os.rename(run_dir / "away", run_dir / "store")


def test_a_container_is_prepared_quickly(images: Images, run_dir: Path) -> None:
    """A row and three directories, and nothing is waited for: a synchronised write alone would cost more."""
    image = load(images, *(layer(**{f"f{number}": "1"}) for number in range(5)))
    took_ns, bare_ns = [], []
    for number in range(50):
        began_ns = time.perf_counter_ns()
        images.prepare(f"c{number}", image.id)
        took_ns.append(time.perf_counter_ns() - began_ns)
        began_ns = time.perf_counter_ns()
        for path in ("bare", "bare/upper", "bare/work"):
            os.mkdir(run_dir / path)
        bare_ns.append(time.perf_counter_ns() - began_ns)
        subprocess.run(["rm", "-r", run_dir / "bare"], check=True)
    for number in range(50):
        images.discard(f"c{number}")
    assert sorted(took_ns)[25] < 12 * sorted(bare_ns)[25]


def test_modes(images: Images, run_dir: Path) -> None:
    for name in ("", "layers", "rootfs", "spool"):
        assert stat.S_IMODE((run_dir / "store" / name).stat().st_mode) == 0o700


def test_one_process_at_a_time(images: Images, open_store: OpenStore) -> None:
    with pytest.raises(WrongState, match="in use by another process"):
        open_store()


def test_a_restart(images: Images, open_store: OpenStore) -> None:
    image = load(images, layer(a="1"), layer(b="2"))
    images.prepare("c", image.id)
    usage = images.fs_info()[0][0].inodes_used
    images.close()
    again = open_store()
    assert again.list() == [image]
    assert again.get("local/app:1") == image
    assert again.prepared() == ["c"]
    assert again.fs_info()[0][0].inodes_used == pytest.approx(usage, abs=4)
    again.discard("c")


def test_what_no_record_names_is_swept(images: Images, open_store: OpenStore, run_dir: Path) -> None:
    store = run_dir / "store"
    image = load(images, layer(a="1"))
    images.close()
    for path in ("layers/zz/deep/er", "rootfs/gone/upper/x", "spool/half"):
        (store / path).mkdir(parents=True)
    with sqlite3.connect(store / "images.db") as db:
        db.execute("INSERT INTO layers VALUES (77, 'sha256:x', '', 0, 0)")
    db.close()
    (store / "layers/25").mkdir()
    images = open_store()
    images.close()
    assert tree_of(store) == [f"layers/{image.layers[0]}"]
    images = open_store()
    assert images.list() == [image]
    assert load(images, layer(a="2"), name="local/b:1").layers[0] not in ("1", "25", image.layers[0])


def test_an_image_that_lost_a_layer_is_forgotten(images: Images, open_store: OpenStore, run_dir: Path) -> None:
    whole = load(images, layer(a="1"), name="local/whole:1")
    lost = load(images, layer(a="1"), layer(b="2"), name="local/lost:1")
    images.close()
    subprocess.run(["rm", "-rf", run_dir / "store/layers" / lost.layers[1]], check=True)
    images = open_store()
    assert images.list() == [whole]
    images.close()
    assert tree_of(run_dir / "store") == [f"layers/{whole.layers[0]}"]


def test_damaged_records_of_containers(images: Images, open_store: OpenStore, run_dir: Path) -> None:
    """They aren't synchronised: after power loss anything may be in the file."""
    image = load(images, layer(a="1"))
    images.prepare("c", image.id)
    images.close()
    (run_dir / "store/rootfs.db").write_bytes(b"\xff" * 8192)
    images = open_store()
    assert images.list() == [image]
    assert images.prepared() == []
    images.close()
    assert tree_of(run_dir / "store") == [f"layers/{image.layers[0]}"]


def test_containers_keep_their_layers_when_the_records_of_images_are_gone(
    images: Images, open_store: OpenStore, run_dir: Path
) -> None:
    image = load(images, layer(a="1"), layer(b="2"))
    load(images, layer(c="3"), name="local/other:1")
    images.prepare("c", image.id)
    images.close()
    for path in (run_dir / "store").glob("images.db*"):
        path.unlink()
    for _ in range(2):
        images = open_store()
        assert images.list() == []
        assert images.prepared() == ["c"]
        images.close()
        assert tree_of(run_dir / "store") == [*(f"layers/{name}" for name in sorted(image.layers)), "rootfs/c"]
        assert (run_dir / "store/layers" / image.layers[1] / "b").read_text() == "2"
    images = open_store()
    again = load(images, layer(a="1"), layer(b="2"))
    assert not set(again.layers) & set(image.layers)
    with_lost = images.fs_info()[0][0].used_bytes
    images.discard("c")
    assert with_lost - images.fs_info()[0][0].used_bytes >= 2 * 4096
    images.close()
    assert tree_of(run_dir / "store") == [f"layers/{name}" for name in sorted(again.layers)]


@pytest.mark.parametrize("damage", ["front", "back"])
def test_readable_records_of_containers_are_kept(
    images: Images, open_store: OpenStore, run_dir: Path, damage: str
) -> None:
    image = load(images, layer(a="1"))
    names = sorted(f"c{number}" for number in range(200))
    for name in names:
        images.prepare(name, image.id)
    images.close()
    at = folded_in(run_dir / "store/rootfs.db").index((names[0] if damage == "front" else names[-1]).encode())
    overwrite(run_dir / "store/rootfs.db", at // 4096 * 4096, bytes(8))
    images = open_store()
    kept = sorted(images.prepared())
    assert kept == (names[-len(kept) :] if damage == "front" else names[: len(kept)])
    assert 50 < len(kept) < 200
    for name in kept:
        images.discard(name)
    images.close()
    assert tree_of(run_dir / "store") == [f"layers/{image.layers[0]}"]


def folded_in(path: Path) -> bytes:
    """All of the database, which then has no log."""
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    db.close()
    return path.read_bytes()


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_damaged_pages_of_records(images: Images, open_store: OpenStore, run_dir: Path) -> None:
    """Whichever it is, the store isn't opened: it would give out numbers twice, or know half of the images."""
    load(images, layer(a="1"))
    images.close()
    path = run_dir / "store/images.db"
    good = folded_in(path)
    with sqlite3.connect(path) as db:
        pages = [number for (number,) in db.execute("SELECT rootpage FROM sqlite_schema")]
    db.close()
    assert len(pages) == 5
    for page in pages:
        overwrite(path, (page - 1) * 4096, bytes(4096))
        with pytest.raises(Unavailable, match=r"images\.db: .*malformed"):
            open_store()
        path.write_bytes(good)
    assert len(open_store().list()) == 1


@pytest.mark.parametrize("what", ["config", "manifest", "name"])
def test_damage_that_no_database_sees(images: Images, open_store: OpenStore, run_dir: Path, what: str) -> None:
    """An image whose documents are not those of their digests is forgotten; a name of none names none."""
    good = load(images, layer(a="1"), name="local/good:1")
    bad = load(images, layer(b="2"), name="local/bad:1")
    images.close()
    path = run_dir / "store/images.db"
    data = folded_in(path)
    with sqlite3.connect(path) as db:
        if what == "name":
            db.execute("UPDATE names SET image = ? WHERE image = ?", (f"sha256:{0:064}", bad.id))
        else:
            row = f"SELECT {what} FROM images WHERE id = ?"
            [(document,)] = db.execute(row, (bad.id,))
    db.close()
    if what != "name":
        overwrite(path, data.index(document) + 20, b"~")
    images = open_store()
    assert {image.id for image in images.list()} == ({good.id, bad.id} if what == "name" else {good.id})
    with pytest.raises(NotFound):
        images.get("local/bad:1")
    load(images, layer(b="2"), name="local/bad:1")
    assert images.get("local/bad:1").id == bad.id
    whole(images)


def test_records_of_a_later_version(images: Images, open_store: OpenStore, run_dir: Path) -> None:
    images.close()
    with sqlite3.connect(run_dir / "store/images.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Unavailable, match="made by another version of crib"):
        open_store()


@pytest.fixture
def small_disk(run_dir: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = run_dir / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk(small_disk: Path, open_store: OpenStore) -> None:
    images = open_store(small_disk / "store")
    kept = load(images, layer(a="kept"), name="local/kept:1")
    unpacked_too_big = Layer().file("zeros", bytes(20 << 20)).tar()
    with pytest.raises(Exhausted, match="no space left on device"):
        load(images, layer(a="small"), unpacked_too_big, name="local/big:1")
    with pytest.raises(Exhausted, match="no space left on device"):
        images.load(io.BytesIO(oci_archive(build(unpacked_too_big, how="plain"), "local/big:1")))
    assert images.list() == [kept]
    assert tree_of(small_disk / "store") == [f"layers/{kept.layers[0]}"]
    free = os.statvfs(small_disk)
    assert free.f_bavail * free.f_frsize > 5 << 20, "what was written is gone"


def test_an_archive_is_not_there_twice(small_disk: Path, open_store: OpenStore) -> None:
    """It and what it holds fit; a copy of it wouldn't."""
    images = open_store(small_disk / "store")
    built = build(Layer().file("random", os.urandom(5 << 19)).tar(), how="plain")
    with open(small_disk / "archive", "w+b", buffering=0) as file:
        file.write(oci_archive(built, "local/app:1"))
        file.seek(0)
        assert [image.id for image in images.load(file)] == [built.id]


def test_no_inode_is_left(small_disk: Path, open_store: OpenStore) -> None:
    """A full disk, of another kind."""
    images = open_store(small_disk / "store")
    image = load(images, layer(a="x"))
    used = os.statvfs(small_disk)
    subprocess.run(["mount", "-o", f"remount,nr_inodes={used.f_files - used.f_ffree}", small_disk], check=True)
    with pytest.raises(Exhausted, match="root file system of c: no space left on device"):
        images.prepare("c", image.id)
    with pytest.raises(Exhausted, match="load of an image: no space left on device"):
        load(images, layer(a="y"))
    images.remove(image.id)
    assert tree_of(small_disk / "store") == []


def test_removal_on_a_full_disk(small_disk: Path, open_store: OpenStore, caplog: pytest.LogCaptureFixture) -> None:
    images = open_store(small_disk / "store")
    image = load(images, Layer().file("a", os.urandom(1 << 20)).tar())
    images.prepare("c", image.id)
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass
    images.discard("c")
    assert images.prepared() == []
    caplog.clear()
    images.remove(image.id)
    assert images.list() == []
    assert tree_of(small_disk / "store") == []
    assert "left behind" not in caplog.text
    images.close()
    assert open_store(small_disk / "store").prepared() == []


KILLED = """
import io, sys, time
from pathlib import Path
from runtime.images import Images, ImagesConfig
images = Images(Path(sys.argv[1]), ImagesConfig())
images.open()
print("open", flush=True)
if sys.argv[2].startswith("/"):
    with open(sys.argv[2], "rb") as archive:
        image, = images.load(archive)
else:
    image = images.pull(sys.argv[2])
images.prepare("c", image.id)
images.discard("c")
images.remove(image.id)
print("done", flush=True)
time.sleep(60)
"""
# How often the two tests below kill; CRIB_KILLS=200 is what a release wants.
KILLS = int(os.environ.get("CRIB_KILLS", "12"))
KILLS_LIMIT_S = scaled(60 + 6 * KILLS)


def whole(images: Images) -> None:
    """What is there is there in full: every byte, every record, and nothing else."""
    assert [finding.problem for finding in images.check() if finding.problem] == []
    found = images.list()
    root = Path(images.fs_info()[0][0].mountpoint)
    images.close()
    expected = {f"layers/{name}" for image in found for name in image.layers}
    expected |= {f"rootfs/{name}" for name in images.prepared()}
    assert set(tree_of(root)) == expected
    assert {path.stem for path in (root / "recipes").iterdir()} == {name for image in found for name in image.layers}


@pytest.mark.timeout(KILLS_LIMIT_S)
def test_a_kill_at_any_moment_of_load_and_removal(open_store: OpenStore, run_dir: Path) -> None:
    built = killable()
    archive = run_dir / "archive.tar"
    archive.write_bytes(oci_archive(built, "local/app:1"))
    kill_and_look(open_store, run_dir, str(archive))


@pytest.mark.timeout(KILLS_LIMIT_S)
def test_a_kill_at_any_moment_of_pull_and_removal(open_store: OpenStore, run_dir: Path, registry: Served) -> None:
    registry.pusher.push("store/killed", "1", killable())
    kill_and_look(open_store, run_dir, f"{registry.host}/store/killed:1")


def killable() -> Built:
    return build(*(Layer().file("f", os.urandom(200_000)).file(f"g/h/{number}", "x").tar() for number in range(4)))


def kill_and_look(open_store: OpenStore, run_dir: Path, what: str) -> None:
    """The old state or the new one, and nothing half-made after the next start."""
    seen = set()
    # How long all of it takes here and now; the moments are spread over that.
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, run_dir / "first", what], stdout=subprocess.PIPE, cwd=ROOT
    ) as all:
        assert all.stdout
        assert all.stdout.readline() == b"open\n"
        began_s = time.monotonic()
        assert all.stdout.readline() == b"done\n"
        took_s = time.monotonic() - began_s
        all.kill()
    chance = random.Random(5)
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, run_dir / "store", what], stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        with process:
            assert process.stdout
            assert process.stdout.readline() == "open\n"
            time.sleep(chance.random() * took_s * 1.1)  # noqa: TID251 - any moment is as good
            process.send_signal(signal.SIGKILL)
        images = open_store()
        found = images.list()
        seen.add(len(found))
        assert len(found) <= 1
        for image in found:
            assert images.read_file(image.id, "g/h/3", 10) == b"x"
            assert len(image.layers) == 4
        whole(images)
    assert 0 in seen

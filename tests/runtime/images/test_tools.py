"""Images that others make and move: umoci builds, skopeo pushes and copies, Debian's docker-registry keeps them."""

from __future__ import annotations

import ast
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.images import Auth, Images
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore, Served
from tests.runtime.images.given import Layer, build, oci_archive
from tests.runtime.images.test_care import listing, rich, saved

pytestmark = requires("root", "registry", "skopeo", "umoci")

ROOT = Path(__file__).resolve().parents[3]


def run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An OCI layout with one image of two layers, the second changing what is in the first."""
    layout, bundle = tmp_path / "layout", tmp_path / "bundle"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:built")
    run("umoci", "unpack", "--image", f"{layout}:built", bundle)
    root = bundle / "rootfs"
    for name in ("bin", "etc", "gone", "old"):
        (root / name).mkdir()
    (root / "bin/tool").write_bytes(os.urandom(300_000))
    (root / "bin/tool").chmod(0o4755)
    os.link(root / "bin/tool", root / "bin/other")
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/tool\n")
    (root / "etc/link").symlink_to("../bin/tool")
    os.chown(root / "etc", 5, 6)
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.setxattr(root / "bin/tool", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    (root / "gone/x").write_text("x")
    (root / "old/x").write_text("x")
    run("umoci", "repack", "--image", f"{layout}:built", bundle)
    second = tmp_path / "second"
    run("umoci", "unpack", "--image", f"{layout}:built", second)
    root = second / "rootfs"
    run("rm", "-r", root / "gone", root / "old/x")
    (root / "etc/new").write_text("new\n")
    run("umoci", "repack", "--image", f"{layout}:built", second)
    run("umoci", "config", "--image", f"{layout}:built", "--config.user", "5:6", "--config.entrypoint", "/bin/tool")
    return layout


def look(images: Images, ref: str) -> None:
    """The image as `layout` made it."""
    image = images.get(ref)
    assert (image.config.user, image.config.entrypoint) == ("5:6", ("/bin/tool",))
    assert len(image.layers) == 2
    assert images.read_file(image.id, "etc/new", 100) == b"new\n"
    assert images.read_file(image.id, "etc/passwd", 100).startswith(b"root:")
    assert images.has(image.id, "old") and not images.has(image.id, "old/x") and not images.has(image.id, "gone")
    below = images.prepare("c", image.id)
    tool = Path(below.base, below.lowers[-1], "bin/tool")
    assert tool.stat().st_mode & 0o7777 == 0o4755
    assert tool.samefile(tool.with_name("other"))
    assert os.getxattr(tool, "security.capability")[:4] == bytes.fromhex("01000002")
    etc = Path(below.base, below.lowers[0], "etc").stat()
    assert (etc.st_uid, etc.st_gid) == (5, 6)
    assert [finding for finding in images.check() if finding.problem] == []


@pytest.mark.parametrize("kind", ["oci", "v2s2"])
def test_pushed_by_skopeo(images: Images, registry: Served, layout: Path, kind: str) -> None:
    ref = f"{registry.host}/tools/{kind}:1"
    run("skopeo", "copy", "--dest-tls-verify=false", "--format", kind, f"oci:{layout}:built", f"docker://{ref}")
    image = images.pull(ref)
    told = json.loads(run("skopeo", "inspect", "--tls-verify=false", f"docker://{ref}"))
    assert image.repo_digests == (f"{registry.host}/tools/{kind}@{told['Digest']}",)
    look(images, ref)


def test_pushed_over_tls_with_a_password(
    open_store: OpenStore, tls_registry: Served, layout: Path, tmp_path: Path
) -> None:
    ref = f"{tls_registry.host}/tools/secret:1"
    copy = ["skopeo", "copy", "--dest-creds", "user:secret", "--dest-tls-verify=false"]
    run(*copy, f"oci:{layout}:built", f"docker://{ref}")
    directory = tmp_path / "certs" / tls_registry.host
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(f'server = "https://{tls_registry.host}"\nca = "{tls_registry.ca}"\n')
    images = open_store(hosts_dir=tmp_path / "certs")
    images.pull(ref, auth=Auth(username="user", password="secret"))
    look(images, ref)


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_archives_of_skopeo(images: Images, layout: Path, tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "archive.tar"
    run("skopeo", "copy", f"oci:{layout}:built", f"{kind}:{archive}:local/app:1")
    with open(archive, "rb") as file:
        [image] = images.load(file)
    assert image.repo_tags == ("docker.io/local/app:1",)
    look(images, image.id)


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_saved_for_skopeo(images: Images, open_store: OpenStore, layout: Path, tmp_path: Path, kind: str) -> None:
    """What crib saves is an archive of both kinds to others; the image keeps its id and its layers."""
    archive = tmp_path / "archive.tar"
    run("skopeo", "copy", f"oci:{layout}:built", f"oci-archive:{archive}:local/app:1")
    with open(archive, "rb") as file:
        [image] = images.load(file)
    ours, copied = tmp_path / "ours.tar", tmp_path / "copied"
    ours.write_bytes(saved(images, "local/app:1"))
    run("skopeo", "copy", f"{kind}:{ours}", f"oci:{copied}:again")
    told = json.loads(run("skopeo", "inspect", "--config", f"oci:{copied}:again"))
    assert told["rootfs"]["diff_ids"] == [*image.diff_ids]
    run("umoci", "unpack", "--image", f"{copied}:again", tmp_path / "unpacked")
    assert (tmp_path / "unpacked/rootfs/etc/new").read_text() == "new\n"
    other = open_store(tmp_path / "other")
    [again] = other.load(io.BytesIO(ours.read_bytes()))
    assert again.id == image.id


OVERLAY = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from runtime.plan.mounts import MountOverlay
from tests.runtime.images.test_care import listing
base, upper, work, at, *lowers = sys.argv[1:]
MountOverlay(base, tuple(lowers), upper, work, at, "").run(SimpleNamespace())
print(listing(Path(at)))
"""


@requires("overlay")
@pytest.mark.parametrize("parallel", [1, 8])
def test_the_tree_is_as_umoci_unpacks_it(open_store: OpenStore, tmp_path: Path, parallel: int) -> None:
    """Which does it layer by layer, each on top of the one before."""
    middle = (
        Layer()
        .directory("o", mode=0o700, uid=4, gid=5)
        .file("o/old")
        .directory("e", mode=0o710, gid=3)
        .file("e/below/deep", "x")
        .file("gone")
    )
    middle.symlink("lib", "d")
    top = Layer().file("d/new", "new").hardlink("d/again", "d/f", mode=0o4755, gid=9).file("d/.wh.f").file(".wh.gone")
    top.file("o/.wh..wh..opq").file("o/new", "n").file("e/f", "x").file("e/below/other", "x")
    archive = oci_archive(build(rich()[0], middle.tar(), top.tar()), "local/app:1")
    images = open_store(max_parallel=parallel)
    [image] = images.load(io.BytesIO(archive))
    rootfs = images.prepare("c", image.id)
    (tmp_path / "merged").mkdir()
    command = ["unshare", "--mount", sys.executable, "-c", OVERLAY, rootfs.base, rootfs.upper, rootfs.work]
    done = subprocess.run(
        [*command, tmp_path / "merged", *rootfs.lowers], cwd=ROOT, check=True, capture_output=True, text=True
    )
    layout = tmp_path / "layout"
    layout.mkdir()
    subprocess.run(["tar", "-x", "-C", layout], input=archive, check=True)
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0]["annotations"] = {"org.opencontainers.image.ref.name": "it"}
    (layout / "index.json").write_text(json.dumps(index))
    run("umoci", "unpack", "--image", f"{layout}:it", tmp_path / "umoci")
    for ours, theirs in zip(ast.literal_eval(done.stdout), listing(tmp_path / "umoci/rootfs"), strict=True):
        assert (*ours[:5], *ours[6:]) == (*theirs[:5], *theirs[6:]), "all but the number of links, some of them hidden"

"""`crib save`, `image`, `df` and `check`, against a cribd."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri.api import cri_pb2
from cri.cli.client import Client
from tests.cri.cli.conftest import Crib, loaded
from tests.cri.cli.fake import IMAGE
from tests.cri.real.daemon import Daemon
from tests.limits import scaled
from tests.requires import requires

pytestmark = requires("root", "bridge", "busybox", "overlay", "seccomp")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with loaded("storage", tmp_path_factory.mktemp("image")) as daemon:
        yield daemon


@pytest.fixture
def crib(daemon: Daemon, tmp_path: Path) -> Crib:
    return Crib(daemon.listen, tmp_path / "logs")


def test_save_and_load(crib: Crib, tmp_path: Path) -> None:
    [image] = crib.json("images")
    archive = tmp_path / "a.tar"
    crib("save", "-f", str(archive), IMAGE)
    assert crib.full("save", IMAGE).stdout == archive.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".part"] == []
    crib("rmi", IMAGE)
    assert crib("load", str(archive)) == f"{IMAGE}\n"
    assert crib.json("images")[0]["id"] == image["id"]


def test_save_to_a_pipe(crib: Crib, tmp_path: Path) -> None:
    """As `-f /dev/null` would be, it is written to, and not replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with open(tmp_path / "read", "wb") as read, subprocess.Popen(["cat", pipe], stdout=read) as reader:
        try:
            crib("save", "-f", str(pipe), IMAGE)
            assert reader.wait(scaled(30)) == 0
        finally:
            reader.kill()
    assert (tmp_path / "read").read_bytes() == crib.full("save", IMAGE).stdout
    assert pipe.is_fifo()


def test_a_layout(crib: Crib, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    crib("save", "--layout", str(layout), IMAGE)
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    blobs = layout / "blobs/sha256"
    manifest = json.loads((blobs / entry["digest"][7:]).read_text())
    for blob in blobs.iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    assert {layer["digest"][7:] for layer in manifest["layers"]} < {blob.name for blob in blobs.iterdir()}
    assert "file exists" in crib.error("save", "--layout", str(layout), IMAGE, code=1)
    crib.error("save", "--layout", str(tmp_path / "other"), "local/none:1", code=3)
    assert list(tmp_path.iterdir()) == [layout]
    [image] = crib.json("images")
    crib("rmi", IMAGE)
    assert crib("load", str(layout)) == f"{IMAGE}\n"
    assert crib.json("images") == [image]
    (layout / "index.json").unlink()
    assert "archive holds no image" in crib.error("load", str(layout), code=1)


def test_what_is_not_there(crib: Crib, tmp_path: Path) -> None:
    assert "'local/none:1' is not here" in crib.error("save", "-f", str(tmp_path / "x"), "local/none:1", code=3)
    assert list(tmp_path.iterdir()) == []
    assert "no image" in crib.error("image", "inspect", "local/none:1", code=3)


def test_inspect_tree_df(crib: Crib) -> None:
    [image] = crib.json("images")
    [told] = crib.json("image", "inspect", IMAGE)
    assert (told["id"], told["tags"]) == (image["id"], [IMAGE])
    assert told["spec"]["rootfs"]["diff_ids"]
    [row] = crib.json("image", "tree")
    assert [layer["diff_id"] for layer in row["layers"]] == told["spec"]["rootfs"]["diff_ids"]
    assert 0 < row["own_bytes"] <= row["size_bytes"]
    assert crib("image", "tree", IMAGE).splitlines()[-1].startswith("└─ ")
    used, containers = crib.json("df")
    assert (used["number"], used["in_use"], containers["number"]) == (1, 0, 0)
    assert used["reclaimable_bytes"] == used["size_bytes"] == row["own_bytes"]
    assert crib("df").splitlines()[0].split() == ["WHAT", "NUMBER", "IN", "USE", "SIZE", "RECLAIMABLE"]


def test_df_of_a_container_without_its_image(crib: Crib, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    crib("save", "-f", str(archive), IMAGE)
    [before, _] = crib.json("df")
    crib("run", "-d", "--name", "df", IMAGE, "sleep", "1000")
    try:
        [used, containers] = crib.json("df")
        assert (used["number"], used["in_use"], used["reclaimable_bytes"], containers["number"]) == (1, 1, 0, 1)
        crib("rmi", "-f", IMAGE)
        [used, _] = crib.json("df")
        assert (used["number"], used["in_use"], used["reclaimable_bytes"]) == (0, 0, 0)
        assert used["size_bytes"] == before["size_bytes"], "its layers are still there"
    finally:
        crib("rm", "-f", "df")
        crib("load", str(archive))


def test_lists_of_images(daemon: Daemon) -> None:
    client = Client(daemon.listen)
    try:
        for given, number in ((IMAGE, 1), ("", 1), ("local/none:1", 0)):
            wanted = cri_pb2.ImageFilter(image=cri_pb2.ImageSpec(image=given))
            listed = [image.id for image in client.call("ListImages", filter=wanted).images]
            streamed = [image.id for part in client.stream("StreamImages", filter=wanted) for image in part.images]
            assert listed == streamed
            assert len(listed) == number
        usage = client.call("ImageFsInfo")
        assert usage.image_filesystems[0].used_bytes.value > 0
        assert usage.container_filesystems[0].fs_id.mountpoint == usage.image_filesystems[0].fs_id.mountpoint
    finally:
        client.close()


def test_check(crib: Crib, daemon: Daemon) -> None:
    assert crib("check") == "1 layers checked: none damaged\n"
    [layer] = (daemon.root / "layers").iterdir()
    before = (layer / "bin/busybox").stat().st_mode
    (layer / "bin/busybox").chmod(0o700)
    [finding] = crib.json("check", "--repair", code=1)
    assert "bin/busybox' has mode 700" in finding["problem"]
    assert not finding["repaired"], "no registry has it"
    assert "damaged" in crib("check", code=1)
    (layer / "bin/busybox").chmod(before & 0o7777)

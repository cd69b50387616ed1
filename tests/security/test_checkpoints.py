"""Checkpoint archives, from which other runtimes restore a container when a request names one as its image."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import IMAGE, load_image
from tests.requires import requires
from tests.runtime.images.given import Layer, build, digest, oci_archive
from tests.security.defects import attack

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]

NAME = "localhost/crib/checkpoint:latest"
ANNOTATIONS = {  # by which CRI-O, Podman and containerd know such an image
    "io.kubernetes.cri-o.annotations.checkpoint.name": "c",
    "io.podman.annotations.checkpoint.name": "c",
    "org.criu.checkpoint.container.name": "c",
    "org.criu.checkpoint.rootfsImageName": IMAGE,
}


class Outside:
    """A directory of the host's that a restore shall change or give away."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        directory.mkdir()
        (directory / "kept").write_text("a secret\n")

    def found(self) -> dict[str, str]:
        return {path.name: path.read_text() if path.is_file() else "" for path in self.path.iterdir()}


def restored_files(outside: Path) -> bytes:
    """`rootfs-diff.tar`, with names and links that lead out of the root file system."""
    up = "../" * 30
    return (
        Layer()
        .file(f"{up}{outside}/by-dots", "x")
        .symlink("link", str(outside))
        .file("link/by-a-link", "x")
        .file("restored", "x")
        .tar()
    )


def checkpoint(outside: Path, stolen: str = "/stolen") -> Layer:
    """What CRI-O writes for a container, with every part of it hostile."""
    spec = {
        "ociVersion": "1.0.0",
        "process": {"args": ["/bin/busybox", "touch", "/restored"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "annotations": {"cdi.k8s.io/smuggled": "vendor.com/device=all", "io.kubernetes.container.name": "smuggled"},
        "mounts": [{"destination": stolen, "type": "bind", "source": str(outside), "options": ["rbind", "rw"]}],
        "hooks": {"createRuntime": [{"path": "/bin/touch", "args": ["touch", f"{outside}/by-a-hook"]}]},
    }
    config = {"id": "f" * 64, "name": "smuggled", "rootfsImage": NAME, "rootfsImageName": IMAGE, "runtime": "runc"}
    mounts = [{"source": f"{outside}/bind-source", "destination": "/made", "file_type": "directory"}]
    made = Layer().directory("bin").file("bin/busybox", Path(shutil.which("busybox") or "").read_bytes(), mode=0o755)
    made.file("config.dump", json.dumps(config)).file("spec.dump", json.dumps(spec))
    made.file("status.dump", "{}").file("bind.mounts", json.dumps(mounts))
    made.file("deleted.files", json.dumps([f"{'../' * 30}{outside}/kept"]))
    made.file("rootfs-diff.tar", restored_files(outside))
    made.symlink("container.log", f"{outside}/kept").symlink("dump.log", f"{outside}/dump.log")
    return made.symlink("checkpoint", str(outside))


def as_image(layer: bytes) -> bytes:
    """An OCI archive of an image whose annotations say that its layer is a checkpoint."""
    built = build(layer, Labels=ANNOTATIONS)
    manifest = json.dumps(json.loads(built.manifest) | {"annotations": ANNOTATIONS}).encode()
    blobs = {key: data for key, data in built.blobs.items() if key != built.digest} | {digest(manifest): manifest}
    return oci_archive(replace(built, manifest=manifest, blobs=blobs), NAME)


async def tags(real: Real) -> dict[str, str]:
    images = (await real.client.ListImages(pb.ListImagesRequest())).images
    return {tag: image.id for image in images for tag in image.repo_tags}


@attack(
    "CVE-2024-8676", "CVE-2026-53489", "CVE-2026-53492", "CVE-2026-50195",
    sentence="A request names a checkpoint as its image, a file of the host's or an image with a checkpoint's "
    "annotations: what it says shall be mounted, run, deleted, made on the host by way of links, read through its log, "
    "given devices (CDI) and an image's name",
    guard="crib restores no checkpoint: a path names no image, and an image that is one is files like any other's",
    control="test_8676_control_restored",
)  # fmt: skip
async def test_checkpoints(real: Real, tmp_path: Path) -> None:
    outside = Outside(tmp_path / "outside")
    before = outside.found()
    layer = checkpoint(outside.path).tar()
    archive = as_image(layer)
    pod = await real.pod(real.pod_config(network=False))
    for name, data in (("checkpoint.tar", layer), ("image.tar", archive)):
        (tmp_path / name).write_bytes(data)
        for reference in (str(tmp_path / name), f"file://{tmp_path / name}", f"oci-archive:{tmp_path / name}"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await real.create(pod, image=pb.ImageSpec(image=reference))
            assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    had = await tags(real)
    await load_image(real.client, archive)
    look = "cd /; for each in * stolen/* made/*; do [ -e $each -o -L $each ] && echo $each; done; cat container.log"
    command = ("/bin/busybox", "sh", "-c", f"{look}; exec /bin/busybox cat /proc/self/mountinfo")
    running = await real.run(pod, *command, image=pb.ImageSpec(image=NAME))
    status = await real.ended(running)
    said = (real.logs / "c.log").read_text()
    assert " rootfs-diff.tar\n" in said and " spec.dump\n" in said  # files like any other's
    for gone in (" restored\n", " stolen\n", " made\n", "a secret", str(outside.path)):
        assert gone not in said
    assert (status.metadata.name, dict(status.annotations), dict(status.labels)) == ("c", {}, {})
    now = await tags(real)
    assert {tag: id for tag, id in now.items() if tag != NAME} == had
    assert outside.found() == before


async def test_checkpoints_are_not_made_or_restored(real: Real, tmp_path: Path) -> None:
    pod = await real.pod(real.pod_config(network=False))
    running = await real.run(pod, "sleep", "1000")
    container = pb.CheckpointContainerRequest(container_id=running, location=str(tmp_path / "a"))
    for call, request in (
        (real.client.CheckpointContainer, container),
        (real.client.CheckpointPod, pb.CheckpointPodRequest(pod_sandbox_id=pod)),
        (real.client.RestorePod, pb.RestorePodRequest(checkpoint_path=str(tmp_path))),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert not (tmp_path / "a").exists()


async def test_8676_control_restored(tmp_path: Path) -> None:
    """The same archive does all that to who restores it without distrust, path by path, as the defects' code did."""
    outside = Outside(tmp_path / "outside")
    image, root = tmp_path / "image", tmp_path / "root"
    stolen = root / "stolen"
    put(checkpoint(outside.path, str(stolen)).tar(), image)
    put((image / "rootfs-diff.tar").read_bytes(), root)
    log = (image / "container.log").read_text()
    for mount in json.loads((image / "bind.mounts").read_text()):
        os.makedirs(mount["source"])
    for name in json.loads((image / "deleted.files").read_text()):
        os.unlink(os.path.join(root, name))
    spec = json.loads((image / "spec.dump").read_text())
    for mount in spec["mounts"]:
        os.symlink(mount["source"], mount["destination"])  # stands for the bind mount
    for hook in spec["hooks"]["createRuntime"]:
        assert os.spawnv(os.P_WAIT, hook["path"], hook["args"]) == 0
    assert log == "a secret\n"
    assert set(outside.found()) == {"by-dots", "by-a-link", "by-a-hook", "bind-source"}
    assert set(os.listdir(stolen)) == set(outside.found())


def put(data: bytes, root: Path) -> None:
    """Unpack an archive by joining strings."""
    import io
    import tarfile

    root.mkdir()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            path = Path(os.path.join(root, member.name))
            if member.isdir():
                path.mkdir()
            elif member.issym():
                path.symlink_to(member.linkname)
            elif (content := archive.extractfile(member)) is not None:
                path.write_bytes(content.read())

"""What an image says of itself, in a container."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import load_image
from tests.requires import requires
from tests.runtime.images.given import Layer, build, oci_archive, serving

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]

APPLETS = ("sh", "cat", "stat", "mkdir", "touch", "ls", "grep", "sleep")


def busybox() -> Layer:
    program = shutil.which("busybox")
    assert program
    layer = Layer().directory("bin").file("bin/busybox", Path(program).read_bytes(), mode=0o755).directory("etc")
    for name in APPLETS:
        layer.hardlink(f"bin/{name}", "bin/busybox")
    return layer


async def load(real: Real, *layers: Layer, **config: Any) -> pb.ImageSpec:
    await load_image(real.client, oci_archive(build(*(layer.tar() for layer in layers), **config), "local/app:1"))
    return pb.ImageSpec(image="local/app:1")


@pytest.mark.parametrize("mapped", [False, pytest.param(True, marks=requires("userns"))])
async def test_volumes(real: Real, tmp_path: Path, mapped: bool) -> None:
    """Directories of the image's own, writable where the root is not; a volume of the pod goes before them."""
    top = Layer().directory("data", mode=0o2770, uid=7, gid=9).file("data/there", "from the image").directory("pods")
    top.file("pods/hidden", "x").symlink("link", "/etc").directory("pods/below")
    volumes: dict[str, dict[str, str]] = {
        name: {} for name in ("/data", "/missing/deep", "/link", "/pods", "/pods/below", "/", "/proc/x", "rel")
    }
    image = await load(real, busybox(), top, Volumes=volumes)
    (tmp_path / "host").mkdir(mode=0o777)
    (tmp_path / "host").chmod(0o777)
    config = real.pod_config(mapped=mapped)
    pod = await real.pod(config)
    linux = pb.LinuxContainerConfig()
    linux.security_context.readonly_rootfs = True
    if mapped:
        linux.security_context.namespace_options.CopyFrom(config.linux.security_context.namespace_options)
    mount = pb.Mount(container_path="/pods", host_path=str(tmp_path / "host"))
    container = await real.run(pod, "sleep", "1000", image=image, linux=linux, mounts=[mount])

    async def sh(script: str) -> tuple[int, str]:
        done = await real.sh(container, script)
        return done.exit_code, (done.stdout + done.stderr).decode()

    assert await sh("cat /data/there; stat -c ' %a %u %g' /data") == (0, "from the image 2770 7 9\n")
    assert (await sh("touch /data/new /missing/deep/new /rel/new /etc/new"))[0] == 0, "/link leads to /etc"
    code, said = await sh("touch /new")
    assert code and "Read-only file system" in said
    assert (await sh("touch /missing/new"))[0]
    assert await sh("ls /pods") == (0, ""), "the pod's is there, alone"
    assert (tmp_path / "host").exists() and not list((tmp_path / "host").iterdir())
    again = await real.run(pod, "sleep", "1000", name="again", image=image, linux=linux)
    assert (await real.sh(again, "ls /data /pods")).stdout == b"/data:\nthere\n\n/pods:\nbelow\nhidden\n", "its own"


async def test_one_id_for_one_image(real: Real) -> None:
    """The same image through two registries: one id, whoever names it, and all its names."""
    built = build(busybox().tar(), Cmd=["sleep", "1000"])
    client = real.client
    with serving(built) as one, serving(built) as other:
        pulled = []
        for server in (one, other):
            request = pb.PullImageRequest(image=pb.ImageSpec(image=f"{server.host}/app:1"))
            pulled.append((await client.PullImage(request)).image_ref)
            asked = len(server.seen)
            assert (await client.PullImage(request)).image_ref == built.id
            assert [path for path, _ in server.seen[asked:]] == ["/v2/app/manifests/1"], "nothing is fetched again"
    assert pulled == [built.id, built.id]
    [image] = (await client.ListImages(pb.ListImagesRequest(filter=_named(built.id[7:19])))).images
    assert image.id == built.id
    assert set(image.repo_tags) == {f"{server.host}/app:1" for server in (one, other)}
    assert set(image.repo_digests) == {f"{server.host}/app@{built.digest}" for server in (one, other)}
    stream = client.StreamImages(pb.StreamImagesRequest(filter=_named(f"{other.host}/app@{built.digest}")))
    assert [found.id async for part in stream for found in part.images] == [built.id]
    pod = await real.pod()
    for name in (f"{one.host}/app:1", f"{other.host}/app@{built.digest}", built.id, built.id[7:19]):
        container = await real.create(pod, image=pb.ImageSpec(image=name), name=f"c{len(name)}")
        listed = await client.ListContainers(pb.ListContainersRequest(filter=pb.ContainerFilter(id=container)))
        assert listed.containers[0].image_id == built.id
        assert (await real.status(container)).image_id == built.id
    await client.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=f"{one.host}/app:1")))
    assert not (
        await client.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=f"{other.host}/app:1")))
    ).image.id


def _named(name: str) -> pb.ImageFilter:
    return pb.ImageFilter(image=pb.ImageSpec(image=name))

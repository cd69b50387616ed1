"""Disks without room: what runs goes on and can be ended, what is new is refused, and cribd starts."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import IMAGE, RUNTIME, Daemon, load_image
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]


@pytest_asyncio.fixture
async def small(run_dir: Path, archive: bytes, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Real]:
    """A cribd whose two directories are small file systems of their own; the first of the kind that is asked for."""
    kind = getattr(request, "param", "tmpfs")
    with ExitStack() as stack:
        for name, size in (("root", "32m"), ("state", "2m")):
            (run_dir / name).mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
            if kind == "ext4" and name == "root":
                disk = tmp_path / "disk"
                subprocess.run(["truncate", "-s", size, disk], check=True)
                subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk], check=True)
                command = ["mount", "-o", "loop", str(disk)]
            subprocess.run([*command, str(run_dir / name)], check=True)
            stack.callback(subprocess.run, ["umount", str(run_dir / name)], check=True)
        daemon = Daemon(run_dir)
        daemon.start()
        real = Real(daemon, daemon.client(), tmp_path / "logs")
        await load_image(real.client, archive)
        yield real
        for item in (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items:
            await real.remove(item.id)
        await real.client.close()
        assert daemon.stop() == 0, daemon.log()


def fill(directory: Path) -> Path:
    """All that is left of a file system, down to the last page."""
    path = directory / "fill"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(fd, bytes(4096)):
            pass
    except OSError:
        os.close(fd)
    return path


@contextmanager
def eaten(directory: Path) -> Iterator[None]:
    """Somebody takes every byte of a file system, and every one that is given back, at once."""
    path = directory / "eaten"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    full, enough = threading.Event(), threading.Event()

    def eat() -> None:
        while not enough.wait(0.001):
            try:
                while os.write(fd, bytes(4096)):
                    pass
            except OSError:
                full.set()

    eater = threading.Thread(target=eat)
    eater.start()
    try:
        assert full.wait(20)
        yield
    finally:
        enough.set()
        eater.join()
        os.close(fd)
        path.unlink()


async def again(real: Real, *, killed: bool = True) -> None:
    if killed:
        real.daemon.kill()
    else:
        assert real.daemon.stop() == 0, real.daemon.log()
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()


async def test_the_disk_of_records_and_images(small: Real) -> None:
    pod = await small.pod()
    running = await small.run(pod, "sleep", "1000", name="running")
    created = await small.create(pod, "sleep", "1000", name="created")
    full = fill(small.daemon.root)
    for refused in (small.pod(small.pod_config("other")), small.create(pod, "true", name="c"), small.start(created)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await small.sh(running, "echo goes on")).stdout == b"goes on\n"
    await small.client.StopContainer(pb.StopContainerRequest(container_id=running, timeout=0))
    assert (await small.status(running)).state == pb.CONTAINER_EXITED
    await again(small)
    assert (await small.status(running)).exit_code == 137
    await small.remove(pod)
    full.unlink()
    assert await small.pod()


@pytest.mark.parametrize("small", ["tmpfs", pytest.param("ext4", marks=requires("loop"))], indirect=True)
async def test_a_disk_that_somebody_else_keeps_full(small: Real, archive: bytes) -> None:
    """All that is there can be ended and removed without a free byte, by the next cribd too."""
    pods = [await small.pod(), await small.pod(small.pod_config("two"))]
    running = await small.run(pods[0], "sleep", "1000")
    ended = await small.run(pods[1], "sh", "-c", "while [ ! -e /go ]; do sleep 0.02; done; exit 9")
    with eaten(small.daemon.root):
        for refused in (small.pod(small.pod_config("other")), small.create(pods[0], "true", name="d")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await small.client.StopContainer(pb.StopContainerRequest(container_id=running, timeout=0))
        await again(small)
        assert (await small.status(running)).exit_code == 137
        await small.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pods[0]))
        await small.client.RemoveContainer(pb.RemoveContainerRequest(container_id=running))
        await again(small, killed=False)
        assert (await small.status(ended)).state == pb.CONTAINER_RUNNING
        for pod in pods:
            await small.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
        await small.client.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=IMAGE)))
        await again(small)
        assert not (await small.client.ListImages(pb.ListImagesRequest())).images
        assert not (await small.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
    await load_image(small.client, archive)
    assert await small.run(await small.pod(), "sleep", "1000")


async def test_the_disk_of_running_things(small: Real) -> None:
    pod = await small.pod()
    container = await small.run(pod, "sh", "-c", "while [ ! -e /go ]; do sleep 0.02; done; exit 9")
    full = fill(small.daemon.state)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await small.pod(small.pod_config("other"))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(small.daemon.state / "pods") in str(caught.value.details()), "it says where"
    if RUNTIME:  # its commands take files in there
        Path(f"/proc/{await small.pid(container)}/root/go").touch()
    else:
        await small.sh(container, "touch /go")
    found = await small.ended(container)
    assert (found.exit_code, found.reason) == (9, "Error")
    await again(small)
    found = await small.status(container)
    assert (found.exit_code, found.reason) == (9, "Error")
    other = await small.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert other.status.state == pb.SANDBOX_READY
    full.unlink()

"""Disks without room: what runs goes on and can be ended, what is new is refused, and cribd starts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import RUNTIME, Daemon, load_image
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]


@pytest_asyncio.fixture
async def small(run_dir: Path, archive: bytes, tmp_path: Path) -> AsyncIterator[Real]:
    """A cribd whose two directories are small file systems of their own."""
    with ExitStack() as stack:
        for name, size in (("root", "24m"), ("state", "2m")):
            (run_dir / name).mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run_dir / name)], check=True)
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


async def again(real: Real) -> None:
    real.daemon.kill()
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

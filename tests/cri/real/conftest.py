"""A real cribd, real rooms, one image."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from tests.cri.client import Client
from tests.cri.real.daemon import BUILTIN, IMAGE, REPOSITORY, Daemon, load_image
from tests.limits import scaled
from tests.requires import need

FIRST_ID = 1 << 20
MAPPED = [pb.IDMapping(container_id=0, host_id=FIRST_ID, length=1 << 16)]


@dataclass
class Real:
    """A cribd and a client of it. `logs` is a directory for containers' logs."""

    daemon: Daemon
    client: Client
    logs: Path

    def pod_config(
        self, name: str = "pod", *, network: bool = True, mapped: bool = False, **fields: object
    ) -> pb.PodSandboxConfig:
        """A pod whose containers have pid namespaces of their own, as the kubelet's have; `mapped`: in a user
        namespace, which the caller has made sure there can be."""
        modes = pb.NamespaceOption(pid=pb.CONTAINER, network=pb.POD if network else pb.NODE)
        if mapped:
            modes.userns_options.CopyFrom(pb.UserNamespace(mode=pb.POD, uids=MAPPED, gids=MAPPED))
        linux = pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=modes))
        metadata = pb.PodSandboxMetadata(name=name, namespace="tests", uid=f"uid-{name}")
        config = pb.PodSandboxConfig(
            metadata=metadata, hostname=name if network else "", log_directory=str(self.logs), linux=linux
        )
        config.MergeFrom(pb.PodSandboxConfig(**fields))  # type: ignore[arg-type]
        return config

    async def pod(self, config: pb.PodSandboxConfig | None = None) -> str:
        request = pb.RunPodSandboxRequest(config=config or self.pod_config())
        return str((await self.client.RunPodSandbox(request)).pod_sandbox_id)

    async def create(self, pod: str, *command: str, name: str = "c", **fields: Any) -> str:
        base: dict[str, object] = {
            "metadata": pb.ContainerMetadata(name=name),
            "image": pb.ImageSpec(image=IMAGE),
            "log_path": f"{name}.log",
            "linux": pb.LinuxContainerConfig(),
        }
        config = pb.ContainerConfig(command=command, **(base | fields))  # type: ignore[arg-type]
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)
        return str((await self.client.CreateContainer(request)).container_id)

    async def start(self, container: str) -> None:
        await self.client.StartContainer(pb.StartContainerRequest(container_id=container))

    async def run(self, pod: str, *command: str, name: str = "c", **fields: Any) -> str:
        container = await self.create(pod, *command, name=name, **fields)
        await self.start(container)
        return container

    async def sh(self, container: str, script: str, limit_s: int = 20) -> pb.ExecSyncResponse:
        request = pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", script], timeout=limit_s)
        answer: pb.ExecSyncResponse = await self.client.ExecSync(request)
        return answer

    async def status(self, container: str) -> pb.ContainerStatus:
        answer = await self.client.ContainerStatus(pb.ContainerStatusRequest(container_id=container))
        found: pb.ContainerStatus = answer.status
        return found

    async def pid(self, container: str) -> int:
        """Its first process, as the host numbers it."""
        request = pb.ContainerStatusRequest(container_id=container, verbose=True)
        return int(json.loads((await self.client.ContainerStatus(request)).info["info"])["pid"])

    async def ended(self, container: str) -> pb.ContainerStatus:
        """The status once the container has ended by itself."""
        async with asyncio.timeout(scaled(30)):
            while (found := await self.status(container)).state != pb.CONTAINER_EXITED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return found

    async def remove(self, *pods: str) -> None:
        for pod in pods:
            await self.client.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    need("busybox")
    path = tmp_path_factory.mktemp("image") / "busybox.tar"
    command = [sys.executable, str(REPOSITORY / "hack/busybox-image"), str(path)]
    subprocess.run([*command, "--busybox", str(shutil.which("busybox"))], check=True)
    return path.read_bytes()


@pytest.fixture
def settings() -> str:
    """cribd's configuration: a module that needs another has a fixture of this name."""
    return BUILTIN


@pytest.fixture
def daemon(run_dir: Path, settings: str) -> Iterator[Daemon]:
    """A cribd that a test may end and start again; whatever pods are left at the end are its failure.

    Its images are on a disk, as a node's are: before Linux 6.3 memory has no idmapped mounts.
    """
    with tempfile.TemporaryDirectory(prefix="crib-test-") as disk:
        made = Daemon(run_dir, settings, root=Path(disk, "root"))
        made.start()
        yield made
        if made.process is not None:
            assert made.stop() == 0, made.log()


@pytest_asyncio.fixture
async def real(daemon: Daemon, archive: bytes, tmp_path: Path) -> AsyncIterator[Real]:
    client = daemon.client()
    await load_image(client, archive)
    made = Real(daemon, client, tmp_path / "logs")
    yield made
    if daemon.process is None:  # a test failed while cribd was dead: pods need one to go
        await made.client.close()
        daemon.start()
        made.client = daemon.client()
    try:
        for item in (await made.client.ListPodSandbox(pb.ListPodSandboxRequest())).items:
            await made.remove(item.id)
    finally:
        await made.client.close()

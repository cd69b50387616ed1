"""A small root file system, and an engine with a zygote of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from runtime.cgroup import Cgroups, detect
from runtime.engine import Cgroup, ContainerExit, ContainerStart, Engine, LogFile, Pod, PodStart, Started
from runtime.images import RootFs
from runtime.linux.probe import probe
from runtime.spec import Capabilities, IDMapping, Linux, Mount, Namespace, Process, Resources, Root, Spec, User
from runtime.zygote.launch import launch
from runtime.zygote.log import open_log
from tests.limits import scaled

POD_ID = "a" * 64
_APPLETS = (
    "sh cat echo env false grep hostname id ls mkdir mknod mount ps readlink setsid sleep stat touch true tty wc yes"
)
_CAPABILITIES = ("CAP_CHOWN", "CAP_KILL", "CAP_MKNOD", "CAP_SETGID", "CAP_SETUID")
TIMEOUT_S = scaled(30)
FIRST_ID, COUNT_IDS = 1 << 20, 1 << 16
MAPS = ((0, FIRST_ID, COUNT_IDS),)


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose only entry, `1`, is a root file system with busybox."""
    base = tmp_path_factory.mktemp("layers")
    root = base / "1"
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, root / "bin/busybox")
    for name in _APPLETS.split():
        (root / "bin" / name).symlink_to("busybox")
    return base


@dataclass
class Bench:
    """One engine and what the tests run in it."""

    engine: Engine
    layer: Path
    directory: Path
    cgroups: Cgroups
    cgroup: str
    exits: dict[str, asyncio.Future[ContainerExit]] = field(default_factory=dict)
    count: int = 0

    async def pod(self, request: PodStart | None = None) -> Pod:
        pod = await self.engine.start_pod(request or PodStart(id=POD_ID, hostname="pod"))
        pod.release_network()
        self.watch(pod)
        return pod

    def watch(self, pod: Pod) -> None:
        pod.on_exit = lambda exited: self.exited(exited.id).set_result(exited)

    def exited(self, container_id: str) -> asyncio.Future[ContainerExit]:
        return self.exits.setdefault(container_id, asyncio.get_running_loop().create_future())

    def cgroup_of(self, container_id: str, resources: Resources | None = None) -> Cgroup:
        path = f"{self.cgroup}/{container_id}"
        self.cgroups.create(path, resources)
        return Cgroup.of(self.cgroups, path)

    def request(
        self, container_id: str, spec: Spec, cgroup: Cgroup | None = None, *, pid_target: str = ""
    ) -> ContainerStart:
        """A container's start, with a root file system of its own."""
        self.count += 1
        upper, work = self.directory / f"upper{self.count}", self.directory / f"work{self.count}"
        upper.mkdir()
        work.mkdir()
        rootfs = RootFs(base=str(self.layer), lowers=("1",), upper=str(upper), work=str(work))
        return ContainerStart(container_id, spec, rootfs, cgroup or self.cgroup_of(container_id), pid_target=pid_target)

    async def start(
        self, pod: Pod, container_id: str, spec: Spec, cgroup: Cgroup | None = None, *, pid_target: str = ""
    ) -> Started:
        return await self.begin(pod, self.request(container_id, spec, cgroup, pid_target=pid_target))

    async def begin(self, pod: Pod, request: ContainerStart) -> Started:
        """Start it, with a log."""
        path = str(self.directory / f"{request.id}.log")
        fd = open_log(path)
        try:
            return await pod.start(dataclasses.replace(request, log=LogFile(path, fd)))
        finally:
            os.close(fd)

    async def run(self, pod: Pod, container_id: str, spec: Spec, *, pid_target: str = "") -> tuple[ContainerExit, str]:
        """Start a container and wait for its end; how it ended, and what it wrote."""
        await self.start(pod, container_id, spec, pid_target=pid_target)
        exited = await asyncio.wait_for(self.exited(container_id), TIMEOUT_S)
        return exited, self.log(container_id)

    async def remove_cgroups(self) -> None:
        """The kernel lets go of a killed process's cgroup a moment after its parent has reaped it."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.cgroups.exists(self.cgroup) and not self.cgroups.remove(self.cgroup):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def log(self, container_id: str) -> str:
        """What the container wrote so far, without the log's own columns."""
        lines = (self.directory / f"{container_id}.log").read_text().splitlines()
        return "".join(line.split(" ", 3)[3] + "\n" for line in lines)


def container(
    pod: Pod,
    *args: str,
    mounts: tuple[Mount, ...] = (),
    namespaces: dict[str, str | None] | None = None,
    process: Callable[[Process], Process] = lambda process: process,
    linux: Callable[[Linux], Linux] = lambda linux: linux,
    readonly: bool = False,
) -> Spec:
    """A usual container; a namespace that is None in `namespaces` is the host's."""
    wanted = {"pid": "", "mount": "", "network": pod.namespaces.network, "ipc": pod.namespaces.ipc}
    wanted |= {"uts": pod.namespaces.uts}
    mapping: tuple[IDMapping, ...] = ()
    if pod.namespaces.user:
        wanted["user"] = pod.namespaces.user
        mapping = (IDMapping(container_id=0, host_id=FIRST_ID, size=COUNT_IDS),)
    merged = {**wanted, **(namespaces or {})}
    usual = (
        Mount(destination="/proc", type="proc", options=("nosuid", "nodev", "noexec")),
        Mount(destination="/dev", type="tmpfs", options=("nosuid", "mode=755", "size=65536k")),
        Mount(destination="/dev/pts", type="devpts", options=("newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
        Mount(destination="/dev/shm", type="bind", source=pod.shm_path, options=("rbind",)),
    )
    sets = Capabilities(bounding=_CAPABILITIES, effective=_CAPABILITIES, permitted=_CAPABILITIES)
    base = Process(
        cwd="/", user=User(uid=0, gid=0), args=args, env=("PATH=/bin",), capabilities=sets, no_new_privileges=True
    )
    return Spec(
        process=process(base),
        root=Root(path="rootfs", readonly=readonly),
        mounts=usual + mounts,
        linux=linux(
            Linux(
                namespaces=tuple(Namespace(type=k, path=v) for k, v in merged.items() if v is not None),
                uid_mappings=mapping,
                gid_mappings=mapping,
            )
        ),
    )


@pytest.fixture
def state_dir(run_dir: Path) -> Path:
    return run_dir / "state"


@pytest_asyncio.fixture
async def bench(layer: Path, state_dir: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    state_dir.mkdir()
    made = Bench(
        Engine(state_dir, launch(), probe()),
        layer,
        tmp_path,
        detect(driver="cgroupfs"),
        f"/crib-test-{os.getpid()}-engine",
    )
    yield made
    made.cgroups.kill(made.cgroup)
    for pod_id in os.listdir(state_dir / "pods") if (state_dir / "pods").exists() else ():
        await made.engine.stop_pod(pod_id)
    made.engine.close()
    await made.remove_cgroups()


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)

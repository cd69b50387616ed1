"""The rooms below the API room, without a kernel: they keep their contracts, and what they hold can be looked at.

A `World` is the machine: it outlives a `FakeEngine` as pods outlive cribd. A container's command decides what its
process does: `true` and `false` end at once, `exit N` too; `stubborn` ignores every signal but SIGKILL, `undead` that
one too; `missing` can't be executed, `stuck` hangs in its start until it is killed; anything else runs on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from net import Attachment, NetNs, NetworkStatus, PodIdentity, Wants
from net.network import NOTHING, Finding, Inventory
from runtime.cgroup import Mount
from runtime.engine import (
    ContainerExit,
    ContainerFact,
    ContainerStart,
    ExecExit,
    ExecStart,
    Namespaces,
    PodStart,
    Started,
    StepTiming,
)
from runtime.errors import InvalidSpec, NotFound, StepFailed, Unavailable, WrongState
from runtime.images import Auth, FsUsage, Image, ImageConfig, Owner, Progress, RootFs
from runtime.spec import Resources, Spec
from tests.limits import scaled

FIRST_PID = 1000


@dataclass
class FakeProcess:
    """A container's first process."""

    id: str
    pid: int
    cgroup: str
    command: tuple[str, ...]
    started_ns: int = 0
    exit: ContainerExit | None = None
    signals: list[int] = field(default_factory=list)
    oom: bool = False


@dataclass
class FakeMonitor:
    """What a pod has in the world."""

    start: PodStart
    pid: int
    processes: dict[str, FakeProcess] = field(default_factory=dict)
    pod: FakePod | None = None
    hangs: bool = False


class World:
    """The machine. `failures` maps the name of an operation to the exceptions that its next calls raise."""

    def __init__(self) -> None:
        self.monitors: dict[str, FakeMonitor] = {}
        self.cgroups: dict[str, Resources | None] = {}
        self.own_cgroups: set[str] = set()
        self.addresses: dict[str, str] = {}
        self.pins: set[str] = set()
        self.rootfs: dict[str, str] = {}
        self.failures: dict[str, list[Exception]] = {}
        self.gates: dict[str, threading.Event] = {}
        self.calls: list[str] = []
        self.exec_pids: dict[str, str] = {}
        self._next_pid = FIRST_PID
        self._loop: asyncio.AbstractEventLoop | None = None

    def enter(self, operation: str) -> None:
        """Every operation begins here: it is noted, may have to wait for a gate, and may fail."""
        self.calls.append(operation)
        if operation in self.gates:
            assert self.gates[operation].wait(scaled(10)), f"gate {operation} never opened"
        if failures := self.failures.get(operation):
            raise failures.pop(0)

    def fail(self, operation: str, *errors: Exception) -> None:
        self.failures.setdefault(operation, []).extend(errors)

    def attach_loop(self) -> None:
        self._loop = asyncio.get_running_loop()

    def pid(self) -> int:
        self._next_pid += 1
        return self._next_pid

    def processes(self) -> list[FakeProcess]:
        return [one for monitor in self.monitors.values() for one in monitor.processes.values()]

    def living(self) -> list[FakeProcess]:
        return [one for one in self.processes() if one.exit is None]

    def end(self, process: FakeProcess, code: int) -> None:
        """The process ends, and its monitor tells."""
        if process.exit is not None:
            return
        process.exit = ContainerExit(process.id, process.pid, code, process.started_ns, time.time_ns(), process.oom)
        monitor = next(one for one in self.monitors.values() if process.id in one.processes)
        if self._loop is not None and monitor.pod is not None and not monitor.hangs:
            self._loop.call_soon_threadsafe(self._tell, monitor, process.exit)

    @staticmethod
    def _tell(monitor: FakeMonitor, exit: ContainerExit) -> None:
        if monitor.pod is not None and monitor.pod.on_exit is not None:
            monitor.pod.on_exit(exit)

    def lose_monitor(self, pod_id: str) -> None:
        """The monitor is killed from outside."""
        monitor = self.monitors.pop(pod_id)
        if monitor.pod is not None and monitor.pod.on_lost is not None:
            monitor.pod.on_lost()

    def remains(self) -> dict[str, object]:
        """What is there beside the machine itself; empty after all pods are removed."""
        found = {
            "monitors": sorted(self.monitors),
            "cgroups": sorted(self.cgroups.keys() - self.own_cgroups),
            "addresses": sorted(self.addresses),
            "pins": sorted(self.pins),
            "rootfs": sorted(self.rootfs),
        }
        return {kind: what for kind, what in found.items() if what}


class FakeExec:
    """See runtime.execs.Exec. `echo TEXT` writes, `sleep` runs until killed, `daemon` leaves a child with the pipes."""

    def __init__(self, exited: asyncio.Future[ExecExit], leftover: list[int]) -> None:
        self._exited = exited
        self.leftover = leftover

    async def wait(self) -> ExecExit:
        return await asyncio.shield(self._exited)

    async def kill(self) -> None:
        if not self._exited.done():
            self._exited.set_result(ExecExit(137, time.time_ns()))


class FakePod:
    """See runtime.pod.Pod."""

    def __init__(self, world: World, monitor: FakeMonitor) -> None:
        self._world = world
        self._monitor = monitor
        monitor.pod = self
        self.id = monitor.start.id
        self.monitor_pid = monitor.pid
        self.init_pid = monitor.pid + 1 if monitor.start.pid else 0
        self.netns_fd = 5 if monitor.start.net else -1
        self.rtnl = None
        self.shm_path = f"/run/fake/{self.id}/shm" if monitor.start.shm_bytes else ""
        self.on_exit: Callable[[ContainerExit], None] | None = None
        self.on_lost: Callable[[], None] | None = None
        self.execs: list[FakeExec] = []
        self.prepared: set[str] = set()
        ns = f"/proc/{monitor.pid}/ns"
        start = monitor.start
        self.namespaces = Namespaces(
            network=f"{ns}/net" if start.net else "",
            ipc=f"{ns}/ipc" if start.ipc else "",
            uts=f"{ns}/uts" if start.hostname is not None else "",
            pid=f"{ns}/pid" if start.pid else "",
        )

    def release_network(self) -> None:
        self.netns_fd = -1

    def _answers(self) -> None:
        if self._monitor.hangs or self.id not in self._world.monitors:
            raise Unavailable(f"pod {self.id}: its monitor does not answer")

    def prepare(self, request: ContainerStart) -> bool:
        self._answers()
        self.prepared.add(request.id)
        return True

    async def start(self, request: ContainerStart) -> Started:
        self._world.enter("start")
        self._answers()
        self.prepared.discard(request.id)
        command = request.spec.process.args
        process = FakeProcess(request.id, self._world.pid(), request.cgroup.path, command)
        if command[0] == "missing":
            raise StepFailed(f"execve {command[0]}", 3, 3, 2, "no such file or directory")
        self._monitor.processes[request.id] = process
        if command[0] == "stuck":
            while process.exit is None:  # noqa: ASYNC110
                await asyncio.sleep(0)
            del self._monitor.processes[request.id]
            raise StepFailed("open the volume", 1, 3, 0, "the process died before it could start")
        await asyncio.sleep(0)
        process.started_ns = time.time_ns()
        if command[0] in ("true", "false"):
            self._world.end(process, int(command[0] == "false"))
        elif command[0] == "exit":
            self._world.end(process, int(command[1]))
        elif command[0] == "oom":
            process.oom = True
            self._world.end(process, 137)
        return Started(process.pid, process.started_ns, (StepTiming("exec", "execve", 1000),), ())

    def exec(self, request: ExecStart, stdin: int, stdout: int, stderr: int) -> FakeExec:
        self._world.enter("exec")
        self._answers()
        exited: asyncio.Future[ExecExit] = asyncio.get_running_loop().create_future()
        leftover: list[int] = []
        command, *rest = request.process.args
        code: int | None = 0
        if command == "echo":
            os.write(stdout, " ".join(rest).encode())
        elif command == "both":
            os.write(stdout, b"out")
            os.write(stderr, b"err")
            code = 3
        elif command == "daemon":
            os.write(stdout, b"started")
            leftover.append(os.dup(stdout))
        elif command == "flood":
            leftover.append(os.dup(stdout))
            threading.Thread(target=_flood, args=(leftover[0], int(rest[0])), daemon=True).start()
            leftover.clear()
        elif command == "missing":
            exited.set_exception(StepFailed("execve missing", 2, 2, 2, "no such file or directory"))
            code = None
        elif command == "sleep":
            code = None
        if code is not None:
            exited.set_result(ExecExit(code, time.time_ns()))
        made = FakeExec(exited, leftover)
        self.execs.append(made)
        return made

    async def signal(self, container_id: str, number: int) -> None:
        self._world.enter("signal")
        self._answers()
        process = self._monitor.processes.get(container_id)
        if process is None or process.exit is not None:
            raise WrongState(f"container {container_id} does not run")
        process.signals.append(number)
        if process.command[0] not in ("stubborn", "undead"):
            self._world.end(process, 128 + number)

    async def kill(self, container_id: str) -> None:
        self._answers()
        process = self._monitor.processes.get(container_id)
        if process is not None:
            self._world.end(process, 137)

    async def forget(self, container_id: str) -> None:
        self._world.enter("forget")
        self._answers()
        self.prepared.discard(container_id)
        self._monitor.processes.pop(container_id, None)

    async def containers(self) -> list[ContainerFact]:
        self._answers()
        return [ContainerFact(one.id, one.pid, one.started_ns, one.exit) for one in self._monitor.processes.values()]


def _flood(fd: int, size: int) -> None:
    try:
        while size > 0:
            size -= os.write(fd, bytes(min(size, 65536)))
    except OSError:
        pass
    finally:
        os.close(fd)


class FakeVolumes:
    """See runtime.volumes.Volumes: a pod here has none."""

    def holds(self, pod_id: str) -> bool:
        return False

    def remove(self, pod_id: str) -> None:
        pass


class FakeEngine:
    """See runtime.engine.Engine."""

    ready = True
    volumes = FakeVolumes()

    def __init__(self, world: World) -> None:
        self.world = world
        world.attach_loop()

    async def start_pod(self, request: PodStart) -> FakePod:
        self.world.enter("start_pod")
        await asyncio.sleep(0)
        monitor = FakeMonitor(request, self.world.pid())
        self.world.monitors[request.id] = monitor
        return FakePod(self.world, monitor)

    async def connect(self, pod_id: str) -> FakePod | None:
        self.world.enter("connect")
        monitor = self.world.monitors.get(pod_id)
        return None if monitor is None else FakePod(self.world, monitor)

    async def stop_pod(self, pod_id: str) -> None:
        self.world.enter("stop_pod")
        await asyncio.sleep(0)
        self.world.monitors.pop(pod_id, None)

    async def stopped(self, pod_id: str, container_id: str, spec: Spec, runtime: object = None) -> None:
        pass

    def drop(self, pod_id: str) -> None:
        pass

    def exits_on_disk(self, pod_id: str) -> list[ContainerExit]:
        return []

    def close(self) -> None:
        for monitor in self.world.monitors.values():
            monitor.pod = None


class FakeCgroups:
    """See runtime.cgroup.Cgroups, version 1."""

    version = 1
    driver = "cgroupfs"
    controllers = frozenset(("memory", "cpu"))

    def __init__(self, world: World) -> None:
        self.world = world

    def join_path(self, parent: str, *names: str) -> str:
        if not parent.startswith("/"):
            raise InvalidSpec(f"cgroup parent {parent}: not a path")
        return "/".join((parent.rstrip("/"), *names))

    def default_parent(self, instance: str) -> str:
        return f"/{instance}"

    def create(self, path: str, resources: Resources | None) -> tuple[str, ...]:
        self.world.enter("cgroup_create")
        made: list[str] = []
        parts = path.strip("/").split("/")
        for end in range(1, len(parts) + 1):
            one = "/" + "/".join(parts[:end])
            if one not in self.world.cgroups:
                self.world.cgroups[one] = None
                made.append(one)
        self.world.cgroups[path] = resources
        return tuple(made)

    def join_files(self, path: str) -> tuple[str, ...]:
        return (f"/sys/fs/cgroup/fake{path}/tasks",)

    def clone_dir(self, path: str) -> str | None:
        return None

    def memory_events(self, path: str) -> str | None:
        return f"/sys/fs/cgroup/fake{path}/memory.oom_control"

    def _inside(self, path: str) -> list[FakeProcess]:
        return [one for one in self.world.living() if one.cgroup == path or one.cgroup.startswith(f"{path}/")]

    def kill(self, path: str) -> None:
        self.world.enter("cgroup_kill")
        for process in self._inside(path):
            if process.command[0] != "undead":
                self.world.end(process, 137)

    def procs(self, path: str) -> tuple[int, ...]:
        return tuple(one.pid for one in self._inside(path))

    def exists(self, path: str) -> bool:
        return path in self.world.cgroups

    def remove(self, path: str) -> bool:
        self.world.enter("cgroup_remove")
        if self._inside(path):
            return False
        for one in list(self.world.cgroups):
            if one == path or one.startswith(f"{path}/"):
                del self.world.cgroups[one]
        return True

    def mounts_in_container(self, path: str) -> tuple[Mount, ...]:
        return ()


class FakeNetwork:
    """See net.Network."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ready = NetworkStatus(ready=True)
        self.pod_sysctls: dict[str, str] = {}

    def setup(self) -> None:
        pass

    def attach(self, pod: PodIdentity, netns: NetNs, wants: Wants = NOTHING) -> Attachment:
        self.world.enter("attach")
        if netns.path not in self.world.pins:
            raise Unavailable(f"no namespace {netns.path}")
        address = self.world.addresses.setdefault(pod.sandbox_id, f"10.88.0.{len(self.world.addresses) + 2}")
        return Attachment(
            interface="eth0",
            addresses=(f"{address}/16",),
            gateway="10.88.0.1",
            mac="02:00:00:00:00:01",
            host_interface="veth0",
        )

    def detach(self, sandbox_id: str, netns_path: str | None) -> None:
        self.world.enter("detach")
        self.world.addresses.pop(sandbox_id, None)

    def status(self) -> NetworkStatus:
        return self.ready

    def changes(self) -> None:
        return None

    def restore(self) -> None:
        pass

    def inventory(self) -> Inventory:
        return Inventory()

    def check_host(self) -> list[Finding]:
        return []

    def reconcile(self, known: set[str]) -> None:
        for sandbox_id in self.world.addresses.keys() - known:
            del self.world.addresses[sandbox_id]

    def collect(self) -> None:
        pass

    def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        pass

    def teardown(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakePins:
    """See net.netns.Pins."""

    def __init__(self, world: World) -> None:
        self.world = world

    def pin(self, fd: int, name: str) -> str:
        self.world.enter("pin")
        path = f"/run/netns/{name}"
        self.world.pins.add(path)
        return path

    def unpin(self, path: str) -> None:
        self.world.enter("unpin")
        self.world.pins.discard(path)


def image(name: str, **config: Any) -> Image:
    """An image of the store, with `name` as its only tag."""
    digest = f"{abs(hash(name)):016x}".ljust(64, "0")
    return Image(
        id=f"sha256:{digest}",
        repo_tags=(f"{name}:latest",),
        repo_digests=(f"{name}@sha256:{digest[::-1]}",),
        size_bytes=1000,
        config=_config(**config),
        layers=("1",),
        chain_id=f"sha256:{digest}",
        pinned=False,
        created="2026-01-01T00:00:00Z",
        manifest_digest=f"sha256:{digest[::-1]}",
        diff_ids=(f"sha256:{digest}",),
        architecture="amd64",
        os="linux",
        raw_config=b'{"architecture":"amd64","os":"linux"}',
    )


def _config(**changes: Any) -> ImageConfig:
    empty: dict[str, Any] = {
        "user": "",
        "env": (),
        "entrypoint": (),
        "cmd": ("sleep", "inf"),
        "working_dir": "",
        "stop_signal": "",
        "volumes": (),
        "labels": {},
    }
    fields = ImageConfig.__dataclass_fields__
    return ImageConfig(**{name: value for name, value in (empty | changes).items() if name in fields})


class FakeImages:
    """See runtime.images.Images. `remote` is what can be pulled."""

    def __init__(self, world: World, *held: Image) -> None:
        self.world = world
        self.held = {one.id: one for one in held}
        self.remote: dict[str, Image] = {}
        self.files: dict[str, bytes] = {"/etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n"}
        self.cancelled = threading.Event()
        self.spool = Path(tempfile.gettempdir())

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def list(self) -> list[Image]:
        return list(self.held.values())

    def get(self, ref: str) -> Image:
        for one in self.held.values():
            if ref in (one.id, *one.repo_tags, *one.repo_digests) or f"{ref}:latest" in one.repo_tags:
                return one
        raise NotFound(f"image {ref} is not here")

    def pull(
        self,
        ref: str,
        *,
        auth: Auth | None,
        progress: Callable[[Progress], None] | None,
        cancelled: threading.Event,
    ) -> Image:
        self.world.enter("pull")
        if ref == "endless":
            cancelled.wait(scaled(10))
            self.cancelled.set()
            raise Unavailable("cancelled")
        if ref not in self.remote:
            raise NotFound(f"{ref}: manifest unknown")
        if progress is not None:
            progress(Progress("sha256:00", "downloading", 1, 2))
            progress(Progress("sha256:00", "done", 2, 2))
        found = self.remote[ref]
        self.held[found.id] = found
        return found

    def load(self, fileobj: IO[bytes]) -> list[Image]:  # type: ignore[valid-type]
        found = image(fileobj.read().decode())
        self.held[found.id] = found
        return [found]

    def remove(self, ref: str) -> None:
        try:
            del self.held[self.get(ref).id]
        except NotFound:
            pass

    def read_file(self, image_id: str, path: str, limit_bytes: int) -> bytes:
        if path not in self.files:
            raise NotFound(f"{path} is not in the image")
        return self.files[path]

    def prepare(self, container_id: str, image_id: str) -> RootFs:
        self.world.enter("prepare")
        self.world.rootfs[container_id] = image_id
        return RootFs(base="/layers", lowers=("1",), upper=f"/up/{container_id}", work=f"/work/{container_id}")

    def volumes(self, container_id: str) -> str:
        return f"/fake/{container_id}/volumes"

    def make_volumes(self, container_id: str, paths: Sequence[str], owner: Owner) -> None:
        self.world.enter("make_volumes")

    def discard(self, container_id: str) -> None:
        self.world.enter("discard")
        self.world.rootfs.pop(container_id, None)

    def prepared(self) -> list[str]:  # type: ignore[valid-type]
        return list(self.world.rootfs)

    def fs_info(self) -> tuple[list[FsUsage], list[FsUsage]]:  # type: ignore[valid-type]
        return [FsUsage("/var/lib/fake", 4096, 7)], [FsUsage("/var/lib/fake", 4096, 7)]


def socket_path(directory: Path) -> str:
    return f"unix://{directory}/crib.sock"


SIGTERM = int(signal.SIGTERM)

"""cribd on hosts whose cgroups look otherwise: parts of the hierarchies hidden, or a container around it all."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from runtime.cgroup import detect
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN, Daemon, load_image
from tests.cri.real.test_resources import MIB, V2, cgroup_path, held, limits, update
from tests.limits import scaled
from tests.requires import requires

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]
CGROUPFS = BUILTIN + '[cgroup]\ndriver = "cgroupfs"\n'

# A container's view of cgroups, as others make it. $1 is the container's cgroup, which cribd is in by then.
# Without a namespace its part of each hierarchy is bound:
BOUND = """
mkdir $2
mount --rbind /sys/fs/cgroup $2
if [ -e $2/cgroup.controllers ]; then
  mount --bind $2/$1 /sys/fs/cgroup
else
  mount -t tmpfs tmpfs /sys/fs/cgroup
  for name in $(ls $2); do
    if [ -d $2/$name/$1 ]; then mkdir /sys/fs/cgroup/$name; mount --bind $2/$name/$1 /sys/fs/cgroup/$name; fi
  done
fi
umount -l $2
"""
# With one the hierarchies are mounted anew:
NAMESPACE = """
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
  names=$(cd /sys/fs/cgroup; ls -d */tasks)
  mount -t tmpfs tmpfs /sys/fs/cgroup
  for name in $names; do
    name=${name%/tasks}
    case $name in systemd) options=none,name=systemd;; *) options=$name;; esac
    mkdir /sys/fs/cgroup/$name
    mount -t cgroup -o $options cgroup /sys/fs/cgroup/$name
  done
fi
"""
# On v2 the root of a container passes on no controllers while it holds processes itself: kind and dind make room.
ROOM = """
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
  mkdir /sys/fs/cgroup/init
  echo 0 >/sys/fs/cgroup/init/cgroup.procs
fi
"""

Start = Callable[..., Awaitable[Real]]


@pytest.fixture
def within() -> Iterator[str]:
    """The cgroup of a container that cribd is going to be in."""
    cgroups = detect(driver="cgroupfs")
    path = f"/cribtest{secrets.token_hex(4)}"
    cgroups.create(path, None)
    yield path
    assert cgroups.remove(path)


@pytest_asyncio.fixture
async def start(within: str, run_dir: Path, archive: bytes, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts cribd after a shell script in a mount namespace of its own, perhaps `inside` a cgroup.

    It ends before `within` is removed.
    """
    started: list[Real] = []

    async def make(script: str, *flags: str, inside: str = "", config: str = CGROUPFS) -> Real:
        joins = detect(driver="cgroupfs").join_files(inside) if inside else ()
        enter = "".join(f"echo 0 >{file}\n" for file in joins) + 'exec "$@"'
        unshare = ("unshare", "--mount", "--propagation", "private", *flags)
        view = ("sh", "-euc", f'{script}\nshift 2; exec "$@"', "sh", inside.lstrip("/"), str(run_dir / "outer"))
        daemon = Daemon(run_dir, config, ("sh", "-euc", enter, "sh", *unshare, *view))
        daemon.start()
        real = Real(daemon, daemon.client(), tmp_path / "logs")
        started.append(real)
        await load_image(real.client, archive)
        return real

    yield make
    for real in started:
        for item in (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items:
            await real.remove(item.id)
        await real.client.close()
        assert real.daemon.stop() == 0, real.daemon.log()


def _parent(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


async def _works(real: Real, top: str) -> None:
    """A pod with limits: in force, seen inside, changed, killed by and told; some of it by a cribd that came later."""
    pod = await real.pod(real.pod_config(network=False))
    container = await real.run(pod, "sleep", "1000", linux=limits(memory_limit_in_bytes=64 * MIB, cpu_shares=512))
    path = cgroup_path(await real.pid(container))
    assert path.startswith(f"{top}/crib-")
    assert held(path, "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    file = "/sys/fs/cgroup/memory.max" if V2 else "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    assert (await real.sh(container, f"cat {file}")).stdout == b"%d\n" % (64 * MIB)
    again = f"exec nsenter --target {_parent(await real.pid(container))} --mount --cgroup"
    if V2 and top:
        again = f"echo 0 >/sys/fs/cgroup{top}/init/cgroup.procs; {again}"
    real.daemon.prefix = ("sh", "-euc", f'{again} "$@"', "sh")
    real.daemon.kill()
    real.daemon.start()
    assert (await real.status(container)).state == pb.CONTAINER_RUNNING
    wanted = pb.LinuxContainerResources(memory_limit_in_bytes=32 * MIB)
    assert await update(real, container, wanted) == grpc.StatusCode.OK
    assert held(path, "memory.limit_in_bytes", "memory.max") == str(32 * MIB)
    hog = await real.run(pod, "tail", "/dev/zero", name="hog", linux=limits(memory_limit_in_bytes=16 * MIB))
    found = await real.ended(hog)
    assert (found.exit_code, found.reason) == (137, "OOMKilled")
    answer = await real.client.ContainerStats(pb.ContainerStatsRequest(container_id=container))
    assert answer.stats.memory.usage_bytes.value > 0
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
    await until(lambda: not detect(driver="cgroupfs").exists(path))


@requires("cgroup1")
@pytest.mark.parametrize("hidden", ["systemd", "unified", "systemd unified"])
async def test_without_a_hierarchy_that_limits_nothing(start: Start, hidden: str) -> None:
    unmount = "".join(
        f"mountpoint -q /sys/fs/cgroup/{name} && umount /sys/fs/cgroup/{name}\n" for name in hidden.split()
    )
    await _works(await start(unmount), "")


@pytest.mark.parametrize("view", [BOUND, NAMESPACE])
async def test_in_a_container(within: str, start: Start, view: str) -> None:
    flags = ("--cgroup",) if view is NAMESPACE else ()
    await _works(await start(view + ROOM, *flags, inside=within), within)


@requires("cgroup2")
async def test_in_a_container_without_room(within: str, start: Start) -> None:
    """Its processes are in its root, which can pass on no controllers then: limits are refused, and why is said."""
    real = await start(NAMESPACE, "--cgroup", inside=within)
    pod = await real.pod(real.pod_config(network=False))
    await real.run(pod, "sleep", "1000", name="free")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.create(pod, "true", linux=limits(memory_limit_in_bytes=64 * MIB))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "cgroup / holds processes itself" in (caught.value.details() or "")


async def test_without_a_controller(within: str, start: Start) -> None:
    """A limit that needs it is refused, and what needs none of it runs."""
    if V2:
        inner = Path(f"/sys/fs/cgroup{within}/inner")
        inner.mkdir()
        Path(f"/sys/fs/cgroup{within}/cgroup.subtree_control").write_text("+cpu +pids")
        real = await start(BOUND + ROOM, inside=f"{within}/inner")
    else:
        real = await start("umount /sys/fs/cgroup/memory")
    pod = await real.pod(real.pod_config(network=False))
    container = await real.run(pod, "sleep", "1000", linux=limits(cpu_shares=512))
    wanted = limits(memory_limit_in_bytes=64 * MIB)
    for call in (real.create(pod, "true", name="refused", linux=wanted), _update(real, container, wanted)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "this host has no memory controller" in (caught.value.details() or "")
    assert (await real.sh(container, "echo fine")).stdout == b"fine\n"
    answer = await real.client.ContainerStats(pb.ContainerStatsRequest(container_id=container))
    assert answer.stats.cpu.usage_core_nano_seconds.value > 0
    assert not answer.stats.HasField("memory")


async def _update(real: Real, container: str, wanted: pb.LinuxContainerConfig) -> None:
    request = pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted.resources)
    await real.client.UpdateContainerResources(request)


DELEGATED = """
mkdir /sys/fs/cgroup/init /sys/fs/cgroup/own
echo 1 >/sys/fs/cgroup/init/cgroup.procs
echo +memory +pids >/sys/fs/cgroup/cgroup.subtree_control
echo 33554432 >/sys/fs/cgroup/own/memory.max
echo 7 >/sys/fs/cgroup/own/pids.max
echo done
exec sleep 1000
"""


@requires("cgroup2")
@pytest.mark.parametrize("privileged", [False, True])
async def test_a_container_that_owns_its_cgroup(start: Start, privileged: bool) -> None:
    """It makes cgroups and limits them, systemd or not; its own limit is out of its reach; and commands still run."""
    real = await start("true", config=f"{BUILTIN}[handlers.own]\nwritable_cgroup = true\n")
    config = real.pod_config(network=False)
    config.linux.security_context.privileged = privileged
    request = pb.RunPodSandboxRequest(config=config, runtime_handler="" if privileged else "own")
    pod = (await real.client.RunPodSandbox(request)).pod_sandbox_id
    linux = limits(memory_limit_in_bytes=64 * MIB)
    linux.security_context.privileged = privileged
    container = await real.run(pod, "sh", "-euc", DELEGATED, linux=linux)
    log = real.logs / "c.log"
    await until(lambda: log.exists() and log.read_text().endswith(" done\n"))
    path = cgroup_path(await real.pid(container)).removesuffix("/init")
    assert path.endswith(container)
    if detect().driver == "systemd":
        subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=scaled(60))
    assert held(f"{path}/own", "", "memory.max") == str(32 * MIB)
    wanted = pb.LinuxContainerResources(memory_limit_in_bytes=80 * MIB, cpu_shares=700)
    assert await update(real, container, wanted) == grpc.StatusCode.OK
    said = await real.sh(container, "cat /sys/fs/cgroup/own/*.max; cat /proc/self/cgroup")
    # One that is privileged keeps the host's cgroup namespace.
    assert said.stdout.split()[-1].decode() == f"0::{path if privileged else ''}/init", said
    if not privileged and "nsdelegate" in Path("/proc/self/mountinfo").read_text():
        said = await real.sh(container, "echo max >/sys/fs/cgroup/memory.max")
        assert b"Operation not permitted" in said.stderr
    hog = "echo 0 >/sys/fs/cgroup/own/cgroup.procs; exec tail /dev/zero"
    assert (await real.sh(container, hog)).exit_code == 137
    await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
    await until(lambda: not detect().exists(path))

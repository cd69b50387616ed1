"""A node in a container, as kind makes them: systemd is its first process, and a cribd in it runs pods."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from tests.cri.client import Client, until
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN, REPOSITORY, load_image
from tests.cri.real.test_resources import MIB, V2, cgroup_path, limits
from tests.limits import scaled
from tests.requires import requires

pytestmark = [
    requires("root", "overlay", "busybox", "bridge", "nft", "systemd-program"),
    pytest.mark.asyncio,
    pytest.mark.timeout(scaled(120)),
]

# What the image's entrypoint of such a node does: the machine's own root file system, lent by an overlay at /node,
# becomes the root, and systemd starts nothing but cribd.
ENTRY = """
cd /node
for name in proc sys dev; do mount -o rbind /$name $name; done
for name in run tmp mnt; do mount -t tmpfs tmpfs $name; done
mkdir -p run/systemd/system
cat >run/systemd/system/cribd.service <<END
[Unit]
DefaultDependencies=no
[Service]
Type=notify
Delegate=yes
KillMode=process
WorkingDirectory={repository}
ExecStart={repository}/.venv/bin/python -m cri.daemon --config {inner}/config.toml \\\\
  --root {inner}/root --state /run/node --listen unix://{inner}/s
StandardError=append:{inner}/log
END
mkdir run/{run} && mount -o rbind /inner run/{run}
pivot_root . mnt
exec chroot . /bin/sh -euc '
export PATH=/usr/sbin:/usr/bin:/sbin:/bin container=crib  # with which systemd heeds its arguments
umount -l /mnt
v1=
if [ ! -e /sys/fs/cgroup/cgroup.controllers ]; then
  # systemd would mount what the machine has mounted nowhere, and keep that for it.
  v1="systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1"
  grep -vP "\\t0\\t\\d+\\t1$" /proc/cgroups >/run/cgroups
  mount --bind /run/cgroups /proc/cgroups
fi
{cgroups}'
"""
# With a cgroup namespace, as kind has on cgroup v2:
NAMESPACE = """
exec unshare --cgroup /bin/sh -euc "
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
  umount /sys/fs/cgroup
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
  cd /sys/fs/cgroup
  for name in */tasks; do
    name=\\${name%/tasks}
    case \\$name in systemd) options=none,name=systemd;; *) options=\\$name;; esac
    umount \\$name
    mount -t cgroup -o \\$options cgroup \\$name
  done
fi
exec /lib/systemd/systemd systemd.unit=cribd.service $v1"
"""
# And without one: each hierarchy is where /proc/self/cgroup says, too. systemd can't do that on cgroup v2.
BOUND = """
while IFS=: read -r _ names path; do
  at=/sys/fs/cgroup/${names#name=}
  [ -e $at/tasks ] || continue
  mkdir -p $at$path
  mount --bind $at $at$path
done </proc/self/cgroup
exec /lib/systemd/systemd systemd.unit=cribd.service $v1
"""


@dataclass
class Node:
    """A container that is a node: the outer cribd and container, and a client of the cribd inside."""

    outer: Real
    container: str
    path: str
    inner: Real

    async def systemctl(self, *words: str) -> str:
        done = await self.outer.sh(self.container, f"systemctl {' '.join(words)}", limit_s=int(scaled(60)))
        assert done.exit_code == 0, done
        return done.stdout.decode().strip()

    def held(self, container: str, v1: str, v2: str) -> str:
        """What the kernel holds for a container inside, seen from the host."""
        top = Path(f"/sys/fs/cgroup{'' if V2 else '/memory'}{self.path}")
        (directory,) = top.rglob(container)
        return (directory / (v2 if V2 else v1)).read_text().strip()


@pytest.fixture
def root_copy(tmp_path: Path) -> Iterator[Path]:
    """The machine's root file system, to be written to."""
    for name in ("upper", "work", "node"):
        (tmp_path / name).mkdir()
    options = f"lowerdir=/,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", tmp_path / "node"], check=True)
    yield tmp_path / "node"
    subprocess.run(["umount", tmp_path / "node"], check=True)


@pytest_asyncio.fixture
async def node(
    request: pytest.FixtureRequest, real: Real, root_copy: Path, run_dir: Path, tmp_path: Path, archive: bytes
) -> AsyncIterator[Node]:
    lent = run_dir / "lent"
    lent.mkdir()
    (lent / "config.toml").write_text(BUILTIN)
    inner_dir = Path("/run", lent.name)
    config = real.pod_config("node")
    config.linux.security_context.privileged = True
    pod = await real.pod(config)
    mounts = [
        pb.Mount(container_path="/node", host_path=str(root_copy)),
        pb.Mount(container_path=f"/node{REPOSITORY}", host_path=str(REPOSITORY)),
        pb.Mount(container_path="/inner", host_path=str(lent)),
    ]
    linux = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(privileged=True))
    script = ENTRY.format(repository=REPOSITORY, inner=inner_dir, run=lent.name, cgroups=request.param)
    container = await real.run(pod, "sh", "-euc", script, linux=linux, mounts=mounts)
    path = cgroup_path(await real.pid(container)).partition(container)[0] + container
    client = Client(f"unix://{lent}/s")
    made = Node(real, container, path, Real(real.daemon, client, tmp_path / "logs"))
    try:
        await until(lambda: (lent / "s").exists(), scaled(60))
        await load_image(client, archive)
        yield made
    finally:
        await client.close()
        for file in (real.logs / "c.log", lent / "log"):
            sys.stderr.write(file.read_text() if file.exists() else f"no {file}\n")
        await real.remove(pod)
        shutil.rmtree(lent)


@pytest.mark.parametrize(
    "node", [NAMESPACE, pytest.param(BOUND, marks=requires("cgroup1"))], ids=["namespace", "bound"], indirect=True
)
async def test_a_node_in_a_container(node: Node) -> None:
    """Pods with limits run in it, through a reload of systemd and a kill of cribd; and all goes with the container."""
    inner = node.inner
    driver = (await inner.client.RuntimeConfig(pb.RuntimeConfigRequest())).linux.cgroup_driver
    assert driver == (pb.SYSTEMD if V2 else pb.CGROUPFS)
    pod = await inner.pod()
    container = await inner.run(pod, "sleep", "1000", linux=limits(memory_limit_in_bytes=64 * MIB, cpu_shares=512))
    assert node.held(container, "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    file = "/sys/fs/cgroup/memory.max" if V2 else "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    assert (await inner.sh(container, f"cat {file}; ip -o -4 addr show dev eth0")).stdout.startswith(b"67108864\n")
    await node.systemctl("daemon-reload")
    wanted = pb.LinuxContainerResources(memory_limit_in_bytes=32 * MIB)
    await inner.client.UpdateContainerResources(
        pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
    )
    await node.systemctl("daemon-reload")
    assert node.held(container, "memory.limit_in_bytes", "memory.max") == str(32 * MIB)
    hog = await inner.run(pod, "tail", "/dev/zero", name="hog", linux=limits(memory_limit_in_bytes=16 * MIB))
    found = await inner.ended(hog)
    assert (found.exit_code, found.reason) == (137, "OOMKilled")
    await node.systemctl("kill", "--signal=KILL", "--kill-whom=main", "cribd")
    await node.systemctl("restart", "cribd")
    assert (await inner.status(container)).state == pb.CONTAINER_RUNNING
    assert (await inner.sh(container, "echo fine")).stdout == b"fine\n"
    await inner.remove(pod)
    left = await inner.pod(inner.pod_config("left"))
    await inner.run(left, "sleep", "1000")

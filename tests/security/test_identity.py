"""Who a container's processes are: capabilities, groups, and users that an image names."""

from __future__ import annotations

import asyncio
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cri.api import cri_pb2 as pb
from cri.translate import resolve_user
from cri.translate.capabilities import DEFAULT, capabilities
from cri.translate.sandbox import sandbox_to_pod
from cri.translate.seccomp import default_profile
from cri.translate.user import FILE_LIMIT_BYTES
from runtime.errors import Exhausted, InvalidSpec
from runtime.images.merged import Merged, read_file
from runtime.linux import caps
from runtime.plan.identity import Execute
from runtime.plan.plan import Plan
from runtime.spec import Capabilities, Mount, Process, User
from tests.cri.translate import given
from tests.requires import requires
from tests.runtime.conftest import TIMEOUT_S, Bench, container
from tests.security.conftest import Image, Plans, capable, execute, python, replaced, with_image
from tests.security.defects import attack

real_kernel = requires("root", "overlay", "busybox")


def last_steps(**fields: object) -> Callable[[Plan], Plan]:
    """Edits a plan's last step, unless it is root's."""

    def edit(plan: Plan) -> Plan:
        assert isinstance(plan[-1], Execute)
        return (*plan[:-1], replaced(plan[-1], **fields) if plan[-1].uid else plan[-1])

    return edit


# Inheritable capabilities: -2022-29162, -2022-27652


async def gained(bench: Bench, image: Image, null: int) -> list[int]:
    """What user 1000 gets by a program with inheritable file capabilities, in a container and by an exec."""
    program = image.root / "gain/grep"
    program.parent.mkdir()
    program.write_bytes((image.root / "bin/busybox").read_bytes())
    program.chmod(0o755)
    bit = caps.mask(("CAP_KILL",))
    # struct vfs_cap_data, revision 2: nothing permitted, CAP_KILL inheritable
    os.setxattr(program, "security.capability", struct.pack("<5I", 0x02000000, 0, bit, 0, 0))
    pod = await with_image(bench, image).pod()

    def user(process: Process) -> Process:
        sets = Capabilities(bounding=("CAP_KILL",))
        return msgspec.structs.replace(
            process, user=User(uid=1000, gid=1000), capabilities=sets, no_new_privileges=False
        )

    (image.root / "bin/gain.sh").write_text("#!/bin/sh\nexec /gain/grep CapPrm /proc/self/status\n")
    (image.root / "bin/gain.sh").chmod(0o755)
    _, log = await bench.run(pod, "first", container(pod, "/bin/gain.sh", process=user))
    await bench.start(pod, "c", container(pod, "sleep", "1000"))
    read, write = os.pipe()
    running = execute(bench, pod, 1, (null, write, write), "/bin/gain.sh", process=user)
    await asyncio.wait_for(running.wait(), TIMEOUT_S)
    os.close(write)
    said = log + os.read(read, 999).decode()
    os.close(read)
    return [int(line.split()[1], 16) for line in said.splitlines()]


@attack(
    "CVE-2022-29162",
    "CVE-2022-27652",
    sentence="A program with inheritable file capabilities gives them to a user without any, in a container and by "
    "exec",
    guard="the inheritable set is empty, but for ambient capabilities that were asked for",
    control="test_29162_control_inheritable_as_the_bounding_set",
)
@real_kernel
@pytest.mark.asyncio
async def test_cve_2022_29162_and_2022_27652(bench: Bench, image: Image, null: int) -> None:
    assert await gained(bench, image, null) == [0, 0]


@real_kernel
@pytest.mark.asyncio
async def test_29162_control_inheritable_as_the_bounding_set(
    bench: Bench, image: Image, null: int, plans: Plans
) -> None:
    plans.both(last_steps(inheritable=caps.mask(("CAP_KILL",))))
    assert await gained(bench, image, null) == [caps.mask(("CAP_KILL",))] * 2


# Groups: -2023-25173


async def denied_group(bench: Bench, tmp_path: Path) -> str:
    """What user 1000 of group 2000 reads of a file that everybody may read but this group."""
    volume = tmp_path / "volume"
    volume.mkdir()
    secret = volume / "file"
    secret.write_text("secret\n")
    os.chown(secret, 0, 2000)
    secret.chmod(0o604)
    security = pb.LinuxContainerSecurityContext(run_as_user=pb.Int64Value(value=1000))
    found = resolve_user(security, "", b"app:x:1000:1000::/:/bin/sh\n", b"staff:x:2000:app\n")
    user = User(uid=found.uid, gid=found.gid, additional_gids=found.additional_gids)
    pod = await bench.pod()
    mount = Mount(destination="/volume", type="bind", source=str(volume), options=("rbind", "ro"))
    spec = container(
        pod, "cat", "/volume/file", mounts=(mount,),
        process=lambda process: msgspec.structs.replace(process, user=user, capabilities=Capabilities()),
    )  # fmt: skip
    _, log = await bench.run(pod, "c", spec)
    return log


@attack(
    "CVE-2023-25173",
    sentence="A process lacks a group that the image's /etc/group gives it, and reads what that group may not",
    guard="supplementary groups of the image and the request are set before execve",
    control="test_25173_control_without_groups",
)
@real_kernel
@pytest.mark.asyncio
async def test_cve_2023_25173(bench: Bench, tmp_path: Path) -> None:
    assert "secret" not in await denied_group(bench, tmp_path)


@real_kernel
@pytest.mark.asyncio
async def test_25173_control_without_groups(bench: Bench, tmp_path: Path, plans: Plans) -> None:
    plans.starts(last_steps(groups=()))
    assert await denied_group(bench, tmp_path) == "secret\n"


# Users of the image: -2024-40635, -2026-47262, -2025-4437


async def runs_as(bench: Bench, image_user: str) -> str:
    """What `id -u` says in a container whose image has this USER."""
    found = resolve_user(pb.LinuxContainerSecurityContext(), image_user, None, None)
    pod = await bench.pod()
    user = User(uid=found.uid, gid=found.gid)
    spec = container(pod, "id", "-u", process=lambda process: msgspec.structs.replace(process, user=user))
    return (await bench.run(pod, "c", spec))[1].strip()


@attack(
    "CVE-2024-40635",
    sentence="The image's USER is a number that wraps round to 0 in 32 bits",
    guard="no uid or gid above 2^31-1 is taken, from image, passwd, group or request",
    control="test_40635_control_wrapped_round",
)
@real_kernel
@pytest.mark.asyncio
@pytest.mark.parametrize(
    "user", ["4294967296", "4294967296:4294967296", "1000:4294967296", "2147483648", "-4294967296"]
)
async def test_cve_2024_40635(bench: Bench, user: str) -> None:
    with pytest.raises(InvalidSpec):
        await runs_as(bench, user)


@real_kernel
@pytest.mark.asyncio
async def test_40635_control_wrapped_round(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.translate.user.identity", lambda _, value: value & 0xFFFFFFFF)
    assert await runs_as(bench, "4294967296") == "0"


def memory_for(layer: Path, name: str, limit_bytes: int) -> int:
    """The most memory that reading this file of an image takes."""
    tracemalloc.start()
    try:
        read_file(Merged((layer,)), name, limit_bytes)
    except Exhausted:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A layer with /etc/passwd and /etc/group of 1 GiB each."""
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        with open(tmp_path / "etc" / name, "wb") as file:
            file.truncate(1 << 30)
    return tmp_path


@attack(
    "CVE-2026-47262",
    "CVE-2025-4437",
    sentence="The image's /etc/group and /etc/passwd are of 1 GiB",
    guard="at most 4 MiB of each are read, and more is an error",
    control="test_47262_control_read_whole",
)
@pytest.mark.parametrize("name", ["/etc/passwd", "/etc/group"])
def test_cve_2026_47262_and_2025_4437(huge: Path, name: str) -> None:
    assert memory_for(huge, name, FILE_LIMIT_BYTES) < 4 * FILE_LIMIT_BYTES


def test_47262_control_read_whole(huge: Path) -> None:
    with open(huge / "etc/group", "wb") as file:
        file.truncate(64 << 20)
    assert memory_for(huge, "/etc/group", 128 << 20) > 64 << 20


def with_hostname(hostname: str) -> str:
    """The /etc/hosts of a pod with that hostname."""
    from cri.translate.etc import hosts

    plan = sandbox_to_pod(given.sandbox(hostname=hostname))
    assert plan.hostname
    return hosts(plan.hostname, ("10.0.0.2",))


@attack(
    "GHSA-cm9x-c3rh-7rc4",
    sentence="A hostname, or a home directory in passwd, holds a newline, and adds a line to a file that the runtime "
    "writes",
    guard="a hostname is letters, digits and '-_.'; crib writes no passwd, and a home is what one line of passwd holds",
    control="test_cm9x_control_any_hostname",
)
def test_ghsa_cm9x_c3rh_7rc4() -> None:
    with pytest.raises(InvalidSpec, match="hostname"):
        with_hostname("pod\n6.6.6.6 registry")
    found = resolve_user(pb.LinuxContainerSecurityContext(), "a", b"a:x:1:1::/home\nb:x:0:0::/:/bin/sh\n", None)
    assert "\n" not in found.home


def test_cm9x_control_any_hostname(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.translate.etc.hostname", lambda value: value)
    assert "\n6.6.6.6 registry" in with_hostname("pod\n6.6.6.6 registry")


# Defaults of the kernel's reach: -2020-14386, -2022-0492


RAW = """
import socket
for name, family in ('packet', socket.AF_PACKET), ('raw', socket.AF_INET):
    try:
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        print(name)
    except PermissionError:
        pass
"""


async def packets(bench: Bench, *held: str) -> list[str]:
    """Which sockets a container with these capabilities can have."""
    program, mounts = python()
    pod = await bench.pod()
    sets = capable(*held)
    spec = container(
        pod, program, "-I", "-S", "-c", RAW, mounts=mounts,
        process=lambda process: msgspec.structs.replace(process, capabilities=sets),
    )  # fmt: skip
    exited, log = await bench.run(pod, "c", spec)
    assert exited.code == 0, log
    return log.split()


@attack(
    "CVE-2020-14386",
    sentence="A container opens a packet or raw socket without having been given NET_RAW, to reach a defect of the "
    "kernel",
    guard="capabilities are exactly the request's; NET_RAW is in the default set, as containerd's, and goes with one "
    "line of "
    "configuration or `drop: NET_RAW`; ping needs it nowhere",
    control="test_14386_control_with_net_raw",
)
@real_kernel
@pytest.mark.asyncio
async def test_cve_2020_14386(bench: Bench) -> None:
    assert "CAP_NET_RAW" in DEFAULT
    assert len(DEFAULT) == 14
    without = capabilities(pb.Capability(drop_capabilities=["NET_RAW"]))
    assert "CAP_NET_RAW" not in {name for part in msgspec.structs.astuple(without) for name in part}
    assert await packets(bench, *(name[4:] for name in without.effective)) == []


@real_kernel
@pytest.mark.asyncio
async def test_14386_control_with_net_raw(bench: Bench) -> None:
    assert await packets(bench, "NET_RAW") == ["packet", "raw"]


CGROUPS = Mount(destination="/sys/fs/cgroup", type="cgroup", options=("nosuid", "nodev", "noexec", "ro"))
TAKE_OVER = """
for d in /sys/fs/cgroup /sys/fs/cgroup/*; do
    mkdir $d/attacker 2>/dev/null && { echo "MADE $d"; rmdir $d/attacker; }
    [ -e $d/release_agent ] && ( : >> $d/release_agent ) 2>/dev/null && echo "AGENT $d"
done; true
"""


# As published: root of a user namespace of its own mounts a hierarchy once more, and writes what is there already.
UNSHARE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
controllers = [line.split()[0] for line in open('/proc/cgroups') if not line.startswith('#')]
if libc.unshare(0x10000000 | 0x00020000 | 0x02000000) == 0:  # CLONE_NEWUSER, NEWNS, NEWCGROUP
    open('/proc/self/uid_map', 'w').write('0 0 1')
    print('ROOT')
    for name in controllers:
        if libc.mount(b'cgroup', b'/mine', b'cgroup', 0, name.encode()) == 0:
            print('MOUNTED', name)
            try:
                with open('/mine/release_agent', 'r+') as file:
                    was = file.read()
                    file.seek(0)
                    file.write(was or '\\n')
                print('AGENT', name)
            except OSError:
                pass
            libc.umount(b'/mine')
"""


async def release_agent(bench: Bench, *options: str, profile: bool = False) -> list[str]:
    """What an attacker said; `profile`: under the default seccomp profile."""
    program, libraries = python()
    seccomp = default_profile(DEFAULT, os.uname().machine, (5, 15))
    pod = await bench.pod()
    sysfs = Mount(destination="/sys", type="sysfs", options=("ro", "nosuid"))
    cgroups = msgspec.structs.replace(CGROUPS, options=("nosuid", "nodev", "noexec", *options))
    both = f'mkdir -p /mine\n{TAKE_OVER}\nexec {program} -I -S -c "$0"'
    spec = container(
        pod, "sh", "-c", both, UNSHARE, mounts=(sysfs, cgroups, *libraries), namespaces={"cgroup": ""},
        process=lambda process: msgspec.structs.replace(process, capabilities=capable(*(n[4:] for n in DEFAULT))),
        linux=lambda linux: msgspec.structs.replace(linux, seccomp=seccomp if profile else None),
    )  # fmt: skip
    exited, log = await bench.run(pod, "c", spec)
    assert exited.code == 0, log
    return log.splitlines()


@attack(
    "CVE-2022-0492",
    sentence="Root in a container with the default capabilities makes cgroups, or writes a release_agent, which the "
    "kernel would run on the host, also as root of a user namespace of its own that mounts the hierarchies anew",
    guard="/sys/fs/cgroup is read-only and of an own cgroup namespace; SYS_ADMIN, without which nothing is remounted, "
    "is no default; release_agent is the kernel's to guard, and under the default seccomp profile nobody gets as far",
    control="test_0492_control_writable",
)
@real_kernel
@pytest.mark.asyncio
async def test_cve_2022_0492(bench: Bench) -> None:
    defaults = given.spec()
    mount = next(each for each in defaults.mounts if each.type == "cgroup")
    assert "ro" in mount.options
    assert defaults.process.capabilities
    assert "CAP_SYS_ADMIN" not in defaults.process.capabilities.bounding
    said = await release_agent(bench, *mount.options)
    assert not [line for line in said if line.startswith(("MADE", "AGENT"))]


@real_kernel
@requires("seccomp")
@pytest.mark.asyncio
async def test_cve_2022_0492_under_the_default_profile(bench: Bench) -> None:
    """Nobody becomes root of another user namespace in the first place."""
    assert await release_agent(bench, "ro", profile=True) == []


@real_kernel
@pytest.mark.asyncio
async def test_0492_control_writable(bench: Bench) -> None:
    assert [line for line in await release_agent(bench, "rw") if line.startswith("MADE")]

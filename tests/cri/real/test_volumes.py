"""An image's VOLUMEs: what a container gets for them, on which disk, and what becomes of it."""

from __future__ import annotations

import asyncio
import os
import stat
import tarfile
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import MAPPED, Real
from tests.cri.real.test_full import fill, small  # noqa: F401
from tests.cri.real.test_images import busybox, load
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.images.given import Layer

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]

MAPPED_ROOT = MAPPED[0].host_id
CAPABILITY = b"\x01\x00\x00\x02\x00\x04\x00\x00" + bytes(12)  # CAP_NET_BIND_SERVICE, permitted and effective


def volumes_of(real: Real, container: str) -> Path:
    return real.daemon.root / "rootfs" / container / "volumes"


def userns(mapped: bool) -> pb.NamespaceOption:
    options = pb.NamespaceOption()
    if mapped:
        options.userns_options.CopyFrom(pb.UserNamespace(mode=pb.POD, uids=MAPPED, gids=MAPPED))
    return options


HOLE = 1 << 20
SPARSE = {"GNU.sparse.size": str(HOLE + 4096), "GNU.sparse.numblocks": "2", "GNU.sparse.map": f"0,5,{HOLE},4096"}


def layers() -> tuple[Layer, Layer]:
    """Two layers, of which the upper one takes away, replaces and adds."""
    lower = Layer().directory("v", mode=0o2751, uid=5, gid=6, pax_headers={"SCHILY.xattr.user.of": "the volume"})
    lower.directory("v/opaque").file("v/opaque/gone").file("v/gone").file("v/replaced", "old").directory("v/both")
    lower.file("v/both/lower", "lower")
    lower.file("v/setuid", "x" * 9000, mode=0o4711, uid=7, gid=8).hardlink("v/both/linked", "v/setuid")
    lower.file("v/sparse", b"begin" + b"e" * 4096, mode=0o604, mtime=1_234_567_890, pax_headers=SPARSE)
    lower.file("v/bound", pax_headers={"SCHILY.xattr.security.capability": CAPABILITY.decode("latin-1")})
    lower.add("v/fifo", tarfile.FIFOTYPE, mode=0o620, uid=1).add("v/null", tarfile.CHRTYPE, devmajor=1, devminor=3)
    lower.symlink("v/out", "/etc/passwd", uid=3, gid=4).symlink("to", "v/both").directory("empty", mode=0o1777, uid=9)
    upper = Layer().file("v/.wh.gone").file("v/opaque/.wh..wh..opq").file("v/opaque/new", "new")
    upper.file("v/replaced", "new", mtime=1_500_000_000).file("v/both/upper", "upper").file("v/both/né\n ", "name")
    return lower, upper


@pytest.mark.parametrize("mapped", [False, pytest.param(True, marks=requires("userns"))])
async def test_all_that_the_image_has_is_copied(real: Real, mapped: bool) -> None:
    """Compared with the image's own root file system, that of a container without VOLUMEs, attribute for attribute."""
    options = userns(mapped)
    config = real.pod_config()
    config.linux.security_context.namespace_options.CopyFrom(options)
    pod = await real.pod(config)
    linux = pb.LinuxContainerConfig()
    linux.security_context.namespace_options.CopyFrom(options)
    found = []
    for name, volumes in (("plain", ()), ("volumes", ("/v", "/to", "/empty", "/none/at/all"))):
        image = await load(real, busybox(), *layers(), Volumes={path: {} for path in volumes})
        container = await real.run(pod, "sleep", "1000", image=image, linux=linux, name=name)
        top = Path(f"/proc/{await real.pid(container)}/root")
        found.append({path: described(top / path) for path in ("v", "to", "empty")})
    assert found[1] == found[0]
    assert "security.capability" in str(found[1]["v"])
    made = volumes_of(real, container)
    assert sorted(os.listdir(made)) == ["0", "1", "2", "3"], "in the order of their names"
    root = MAPPED_ROOT if mapped else 0
    assert (made / "3/setuid").stat().st_uid == root + 7
    assert (made / "1").stat().st_uid == root, "what the image hasn't is root's"
    copied = made / "3/sparse"
    assert copied.stat().st_blocks * 512 < HOLE
    assert copied.read_bytes() == b"begin" + bytes(HOLE - 5) + b"e" * 4096


def described(top: Path) -> dict[str, object]:
    """All below a directory, without what is a file system's own."""
    inodes: dict[int, str] = {}
    found: dict[str, object] = {}
    for directory, names, files in os.walk(f"{top}/."):
        for name in (".", *names, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
                if not key.startswith(("security.selinux", "trusted.overlay."))
            }
            found[os.path.relpath(path, top)] = (
                (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev),
                Path(path).read_bytes() if kind == stat.S_IFREG else "",
                os.readlink(path) if kind == stat.S_IFLNK else "",
                attributes,
                inodes.setdefault(status.st_ino, path[len(str(top)) :]) if kind == stat.S_IFREG else "",
            )
    return found


@pytest.mark.parametrize("below", ["", "/var"])
async def test_an_overlay_in_a_volume(real: Real, below: str) -> None:
    """As container runtimes in a container mount it, which overlayfs refuses on itself."""
    layer = busybox().hardlink("bin/mount", "bin/busybox")
    image = await load(real, layer, Volumes={"/var/lib/docker": {}} | ({below: {}} if below else {}))
    config = real.pod_config()
    config.linux.security_context.privileged = True
    pod = await real.pod(config)
    linux = pb.LinuxContainerConfig()
    linux.security_context.privileged = True
    linux.security_context.readonly_rootfs = True
    container = await real.run(pod, "sleep", "1000", image=image, linux=linux)
    script = (
        "cd /var/lib/docker && mkdir lower upper work merged && touch lower/below"
        " && mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged"
        " && touch merged/made && ls merged upper"
    )
    done = await real.sh(container, script)
    assert (done.exit_code, done.stderr) == (0, b"")
    assert done.stdout.split() == [b"merged:", b"below", b"made", b"upper:", b"made"]
    on_disk = volumes_of(real, container)
    assert len(list(on_disk.rglob("made"))) == 1
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    assert not on_disk.parent.exists()


async def test_what_is_written_there_is_the_containers(real: Real) -> None:
    """Counted as its writable layer, and gone with it; another container of the image has its own."""
    image = await load(real, busybox(), Layer().file("v/there", "x" * 5000), Volumes={"/v": {}})
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000", image=image)
    before = await written(real, container)
    assert before[0] >= 5000, "what was copied is on the disk as well"
    assert (await real.sh(container, "cat /bin/busybox /bin/busybox > /v/new; ln /v/new /v/same")).exit_code == 0
    size = (volumes_of(real, container) / "0/new").stat().st_size
    used, inodes = await written(real, container)
    assert used - before[0] >= size
    assert inodes == before[1] + 1
    other = await real.run(pod, "sleep", "1000", image=image, name="other")
    assert (await real.sh(other, "ls /v; echo mine > /v/there")).stdout == b"there\n"
    assert (await real.sh(container, "stat -c %s /v/there")).stdout == b"5000\n"
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    assert not volumes_of(real, container).parent.exists()


async def written(real: Real, container: str) -> tuple[int, int]:
    stats = (await real.client.ContainerStats(pb.ContainerStatsRequest(container_id=container))).stats
    return stats.writable_layer.used_bytes.value, stats.writable_layer.inodes_used.value


async def test_odd_names(real: Real) -> None:
    """Whatever a directory may be called; what can't be one's name is said, and nothing is left."""
    odd = "/new\nline/\x1b[2J \\040 : , \u202e"
    image = await load(real, busybox(), Layer().file(f"{odd}/there", "x"), Volumes={odd: {}})
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000", image=image)
    assert (await real.sh(container, f"cat '{odd}/there' && echo y > '{odd}/new'")).exit_code == 0
    assert sorted(os.listdir(volumes_of(real, container) / "0")) == ["new", "there"]
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    image = await load(real, busybox(), Volumes={f"/{'n' * 300}": {}})
    with pytest.raises(grpc.aio.AioRpcError, match=r"(?i)file name too long"):
        await real.run(pod, "true", image=image, name="long")


@pytest.mark.timeout(scaled(120))
async def test_as_many_as_an_image_can_name(real: Real) -> None:
    """The next pod doesn't notice."""
    pod = await real.pod()
    long = "x" * 240
    image = await load(real, busybox(), Volumes={f"/{number}/{long}": {} for number in range(400)})
    container = await real.run(pod, "sleep", "1000", image=image)
    assert (await real.sh(container, f"echo x > /399/{long}/file")).exit_code == 0
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    image = await load(real, busybox(), Volumes={f"/{number}/{long}": {} for number in range(4096)})
    container = await real.create(pod, "true", image=image, name="most")
    assert len(os.listdir(volumes_of(real, container))) == 4096
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    image = await load(real, busybox(), Volumes={f"/{number}": {} for number in range(10_000)})
    with pytest.raises(grpc.aio.AioRpcError, match="image: 10000 volumes, the limit is 4096"):
        await real.create(pod, "true", image=image, name="more")
    assert os.listdir(real.daemon.root / "rootfs") == []
    image = await load(real, busybox())
    assert await real.run(pod, "sleep", "1000", image=image, name="usual")


@pytest.mark.parametrize("volume", ["/file", "/to-file", "/to-root", "/up"])
async def test_what_is_no_directory_is_refused(real: Real, volume: str) -> None:
    odd = Layer().file("file").symlink("to-file", "file").symlink("to-root", "bin/..").symlink("up", "../../..")
    image = await load(real, busybox(), odd, Volumes={volume: {}})
    pod = await real.pod()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.create(pod, "true", image=image)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"VOLUME '{volume}'" in str(caught.value.details())
    assert os.listdir(real.daemon.root / "rootfs") == []


async def test_no_more_is_copied_than_the_image_has(real: Real) -> None:
    """Links of an image, as many as it likes, to one directory."""
    odd = Layer().file("v/large", os.urandom(1 << 20))
    for number in range(50):
        odd.symlink(f"l{number}", "v")
    image = await load(real, busybox(), odd, Volumes={f"/l{number}": {} for number in range(50)})
    pod = await real.pod()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.create(pod, "true", image=image)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the limit for this image" in str(caught.value.details())
    assert os.listdir(real.daemon.root / "rootfs") == []


async def test_a_full_disk(small: Real) -> None:  # noqa: F811
    image = await load(small, busybox(), Layer().file("v/large", os.urandom(5 << 20)), Volumes={"/v": {}})
    pod = await small.pod()
    full = fill(small.daemon.root)
    os.truncate(full, full.stat().st_size - (2 << 20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await small.create(pod, "true", image=image)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "'/v': no space left on device" in str(caught.value.details())
    assert os.listdir(small.daemon.root / "rootfs") == []
    full.unlink()
    assert await small.run(pod, "sleep", "1000", image=image)


MANY = 8_000


def many() -> Layer:
    layer = Layer()
    for number in range(MANY):
        layer.file(f"v/{number % 100}/{number}", "x" * (number % 2))
    return layer


async def copying(real: Real) -> tuple[str, asyncio.Task[str], Path]:
    """A pod, the creation of a container that is being copied to, and the directory."""
    image = await load(real, busybox(), many(), Volumes={"/v": {}})
    pod = await real.pod()
    creation = asyncio.ensure_future(real.create(pod, "sleep", "1000", image=image))
    roots = real.daemon.root / "rootfs"
    async with asyncio.timeout(scaled(20)):
        while not any(path.is_dir() for path in roots.glob("*/volumes/0/*")):
            assert not creation.done()
            await asyncio.sleep(0.002)
    return pod, creation, roots


async def test_stopping_the_pod_ends_the_copy(real: Real) -> None:
    pod, creation, roots = await copying(real)
    await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await creation
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert os.listdir(roots) == []


async def test_nothing_is_left_when_cribd_is_killed(real: Real) -> None:
    pod, creation, roots = await copying(real)
    real.daemon.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await creation
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    async with asyncio.timeout(scaled(20)):
        while os.listdir(roots):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not (await real.client.ListContainers(pb.ListContainersRequest())).containers
    assert await real.run(pod, "sleep", "1000", image=pb.ImageSpec(image="local/app:1"))

"""Images, volumes and working directories that lead out of the container's root, or round what is masked in it."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import msgspec
import pytest

from cri.api import cri_pb2 as pb
from runtime.engine import Pod
from runtime.errors import StepFailed
from runtime.plan import identity, mounts
from runtime.plan.plan import Plan
from runtime.spec import Linux, Mount, Process, Spec, User
from tests.cri.real.conftest import Real
from tests.cri.real.test_images import busybox, load
from tests.requires import requires
from tests.runtime.conftest import TIMEOUT_S, Bench, container
from tests.security import weak
from tests.security.conftest import Image, Plans, WeakCribd, Weaken, bind, execute, holding, replaced, with_image
from tests.security.defects import attack

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]

RESOLVED = "paths in a root file system are resolved by openat2 with RESOLVE_IN_ROOT"
MASKED = ("/proc/kcore", "/proc/keys", "/proc/acpi")


def masked(linux: Linux) -> Linux:
    return msgspec.structs.replace(linux, masked_paths=MASKED, readonly_paths=("/proc/sys", "/proc/sysrq-trigger"))


async def said(bench: Bench, pod: Pod, spec: Spec) -> str:
    """What a container wrote, or why it was not started."""
    try:
        return (await bench.run(pod, "c", spec))[1]
    except StepFailed as error:
        return str(error)


# CVE-2024-21626: the working directory


async def leaked_directory(bench: Bench, cwd: str, tmp_path: Path) -> list[str]:
    """What a container finds beyond a working directory that is one of crib's descriptors."""
    (tmp_path / "only-on-the-host").touch()
    pod = await bench.pod()
    command = f"i=0; while [ $i -lt 12 ]; do [ -e .{tmp_path}/only-on-the-host ] && echo HOST; cd ..; i=$((i+1)); done"
    spec = container(pod, "sh", "-c", command, process=lambda made: msgspec.structs.replace(made, cwd=cwd))
    try:
        _, log = await bench.run(pod, "c", spec)
    except StepFailed:
        return []
    finally:
        await bench.engine.stop_pod(pod.id)
        bench.exits.clear()
        bench.cgroups.remove(f"{bench.cgroup}/c")
    return log.splitlines()


@attack(
    "CVE-2024-21626",
    sentence="The working directory is /proc/self/fd/N, for every N that could be a directory of the host's left open",
    guard="all descriptors but the plan's are closed first; no magic link is followed; getcwd must be below the root",
    control="test_21626_control_unguarded",
)
async def test_cve_2024_21626_start(bench: Bench, tmp_path: Path) -> None:
    for number in range(3, 24):
        assert await leaked_directory(bench, f"/proc/self/fd/{number}", tmp_path) == []


async def test_21626_control_unguarded(weaken: Weaken, tmp_path: Path) -> None:
    edits: weak.Edits = (
        ("zygote/child.py", "        close_all_but(keep)\n", ""),
        ("plan/identity.py", "files.make_directories(root, self.path)", "os.open(self.path, os.O_PATH)"),
        ("plan/identity.py", 'if not os.getcwd().startswith("/"):', "if False:"),
    )  # fmt: skip
    bench = await weaken(edits)
    found = [await leaked_directory(bench, f"/proc/self/fd/{number}", tmp_path) for number in range(3, 24)]
    assert any("HOST" in lines for lines in found)


@attack(
    "CVE-2024-21626",
    sentence="A command is run in a container whose image has the working directory as a link to /proc/self/fd/N",
    guard="no magic link is followed, and getcwd must be below the root",
    control="test_21626_control_unguarded",
)
async def test_cve_2024_21626_exec(bench: Bench, image: Image, null: int) -> None:
    for number in range(3, 24):
        (image.root / f"w{number}").symlink_to(f"/proc/self/fd/{number}")
    pod = await with_image(bench, image).pod()
    await bench.start(pod, "c", container(pod, "sleep", "1000"))
    for number in range(3, 24):

        def there(process: Process, number: int = number) -> Process:
            return msgspec.structs.replace(process, cwd=f"/w{number}")

        with pytest.raises(StepFailed, match="/w"):
            await asyncio.wait_for(execute(bench, pod, number, (null,) * 3, "true", process=there).wait(), TIMEOUT_S)


# Mount targets that lead out: -2021-30465, -2024-45310, -2024-5154


async def through_volume(bench: Bench, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Mount a volume on a link that lies in another one and leads to a directory of the host.

    What is in that directory afterwards, and whether the second volume is where the link leads inside.
    """
    outside, first, second = tmp_path / "outside", tmp_path / "first", tmp_path / "second"
    for directory in (outside, first, second):
        directory.mkdir()
    (second / "mine").touch()
    (first / "link").symlink_to(outside)
    pod = await bench.pod()
    volumes = (bind(first, "/mnt"), bind(second, "/mnt/link"), bind(second, "/mnt/link/deeper/directory"))
    spec = container(pod, "sh", "-c", f"ls {outside}", mounts=volumes)
    log = await said(bench, pod, spec)
    # Inside, `second` covers what the link leads to: the directories were made in the volume, by its owner's leave.
    return sorted(os.listdir(outside)), log.split()


@attack(
    "CVE-2021-30465", "CVE-2024-45310",
    sentence="A volume holds a link to a directory of the host; another volume is to be mounted on it, and below it, "
    "so that "
    "the mount lands there and missing directories are made there",
    guard=RESOLVED + ", and mounted on by descriptor; sources are opened before any target",
    control="test_30465_control_resolved_by_the_kernel_alone",
)  # fmt: skip
async def test_cve_2021_30465_and_2024_45310(bench: Bench, tmp_path: Path) -> None:
    made_outside, inside = await through_volume(bench, tmp_path)
    assert made_outside == []
    assert "mine" in inside


async def test_30465_control_resolved_by_the_kernel_alone(weaken: Weaken, tmp_path: Path) -> None:
    _, inside = await through_volume(await weaken(weak.NO_RESOLVE_IN_ROOT), tmp_path)
    assert "mine" not in inside


async def made_by_mounts(bench: Bench, image: Image, tmp_path: Path) -> list[str]:
    """Mount files and directories on targets that the image has as links to the host."""
    outside, source = tmp_path / "outside", tmp_path / "source"
    outside.mkdir()
    source.touch()
    for name in ("hosts", "hostname", "resolv.conf", "mtab"):
        (image.root / "etc" / name).symlink_to(outside / name)
    (image.root / "mnt").symlink_to(outside)
    pod = await with_image(bench, image).pod()
    targets = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/mnt/file")
    volumes = (
        *(bind(source, target) for target in targets),
        bind(tmp_path / "source-directory", "/mnt/a/b", "x-crib.mkdir"),
    )
    try:
        await bench.run(pod, "c", container(pod, "true", mounts=volumes))
    except StepFailed:
        pass
    return sorted(os.listdir(outside))


@attack(
    "CVE-2024-45310", "CVE-2024-5154",
    sentence="The image has /etc/hosts, /etc/hostname, /etc/resolv.conf, /etc/mtab and a directory as links to the "
    "host, and "
    "mounts are to go there: empty files and directories are made outside",
    guard=RESOLVED + "; crib writes no /etc/mtab",
    control="test_45310_control_resolved_by_the_kernel_alone",
)  # fmt: skip
async def test_cve_2024_45310_and_2024_5154(bench: Bench, image: Image, tmp_path: Path) -> None:
    assert await made_by_mounts(bench, image, tmp_path) == []


async def test_45310_control_resolved_by_the_kernel_alone(weaken: Weaken, image: Image, tmp_path: Path) -> None:
    assert "hosts" in await made_by_mounts(await weaken(weak.NO_RESOLVE_IN_ROOT), image, tmp_path)


# An image's own volumes: -2022-23648


async def volumes(real: Real, tmp_path: Path) -> tuple[set[str], set[str], str]:
    """An image whose VOLUMEs lead to a directory of the host and to kernel file systems, by `..`, by links, and by
    links in what they hold. The files that the container got; those that are there then; what it could do to the
    kernel's.

    The image has a directory of that name in its own tree as well, with something else in it.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    own = str(outside).lstrip("/")
    up = "../" * 12
    layer = busybox().file(f"{own}/inside").directory("held").file("held/file")
    layer.symlink("held/away", str(outside)).hardlink("held/again", "held/file")
    layer.symlink("a", f"/{own}").symlink("b", up + own).symlink("c", f"{up}{tmp_path}")
    layer.symlink("k", "/sys").symlink("l", "/sys/fs/cgroup")
    paths = ("/a", "/b", "/c/outside", f"/{up}{own}", f"held/{up}{own}", "/held", "/a/new", "/k", "/l")
    image = await load(real, layer, Volumes={path: {} for path in paths})
    pod = await real.pod()
    linux = pb.LinuxContainerConfig()
    linux.security_context.readonly_rootfs = True
    running = await real.run(pod, "sleep", "1000", image=image, linux=linux)
    tried = "/sys /k /l /sys/kernel /k/kernel /sys/fs/cgroup"
    script = f"for each in {tried}; do mkdir $each/in && [ -e $each/in/cgroup.procs ] && echo $each; done"
    done = await real.sh(running, f"({script}; cat /sys/kernel/*) 2>/dev/null")
    made = (real.daemon.root / "rootfs" / running).rglob("*")
    found = {path.name for path in made if path.is_symlink() or not path.is_dir()}
    return found, {path.name for path in outside.iterdir()}, done.stdout.decode()


@attack(
    "CVE-2022-23648",
    sentence="An image's VOLUMEs lead to a directory of the host, by `..` and by links, and to kernel file systems: "
    "what is there is copied for the container, made writable or added to",
    guard="what copies has the image as its root, and finds a VOLUME by openat2 with RESOLVE_IN_ROOT; below it no link "
    "is followed",
    control="test_23648_control_a_root_like_anybodys",
)
async def test_cve_2022_23648(real: Real, tmp_path: Path) -> None:
    copied, outside, written = await volumes(real, tmp_path)
    assert {"inside", "away", "again"} <= copied
    assert "secret" not in copied
    assert (outside, written) == ({"secret"}, "")


async def test_23648_control_a_root_like_anybodys(weak_cribd: WeakCribd, tmp_path: Path) -> None:
    own_root: weak.Edits = (
        ("images/copyup.py", '    os.chroot(".")  # noqa', "    # noqa"),
        (
            "images/copyup.py",
            "open_in_root(self._root, path, os.O_RDONLY | os.O_DIRECTORY)",
            'os.open(path.lstrip("/"), os.O_RDONLY, dir_fd=self._root)',
        ),
    )
    copied, _, _ = await volumes(await weak_cribd(own_root), tmp_path)
    assert "secret" in copied


# Round the masks: -2019-19921, -2023-27561, -2023-28642, -2019-16884, -2025-31133


async def unmasked(bench: Bench, image: Image, tmp_path: Path) -> str:
    """An image whose /proc is a link, by way of a directory that a volume covers later."""
    (image.root / "real").mkdir()
    (image.root / "volume").mkdir()
    (image.root / "volume/link").symlink_to("/real")
    (image.root / "proc").symlink_to("/volume/link")
    volume = tmp_path / "volume"
    (volume / "link").mkdir(parents=True)
    pod = await with_image(bench, image).pod()
    command = "[ -w /real/sys/kernel/core_pattern ] && ( : >> /real/sys/kernel/core_pattern ) && echo WRITABLE"
    spec = container(pod, "sh", "-c", command, mounts=(bind(volume, "/volume"),), linux=masked)
    return await said(bench, pod, spec)


@attack(
    "CVE-2019-19921", "CVE-2023-27561", "CVE-2023-28642",
    sentence="The image's /proc is a link into a directory that a volume covers: masks, read-only paths and labels "
    "go to the "
    "volume, and the real /proc stays open elsewhere",
    guard="/proc and /sys must be directories",
    control="test_19921_control_proc_may_be_a_link",
)  # fmt: skip
async def test_cve_2019_19921_2023_27561_and_2023_28642(bench: Bench, image: Image, tmp_path: Path) -> None:
    assert "/proc, a symbolic link in the image" in await unmasked(bench, image, tmp_path)


async def test_19921_control_proc_may_be_a_link(weaken: Weaken, image: Image, tmp_path: Path) -> None:
    assert "WRITABLE" in await unmasked(await weaken(weak.NO_CHECK_OF_PROC), image, tmp_path)


async def over_proc(bench: Bench, image: Image, tmp_path: Path) -> str:
    (image.root / "link").symlink_to("/proc")
    fake = tmp_path / "fake"
    (fake / "self/attr").mkdir(parents=True)
    (fake / "self/attr/exec").write_text("fake")
    pod = await with_image(bench, image).pod()
    spec = container(pod, "cat", "/proc/self/attr/exec", mounts=(bind(fake, "/link"),), linux=masked)
    return await said(bench, pod, spec)


@attack(
    "CVE-2019-16884",
    sentence="A volume is mounted over /proc, by way of a link in the image, so that a label is written to a fake file",
    guard="no mount goes to /proc by way of a link, and none that a request names there is taken; labels are written "
    "through the host's /proc",
    control="test_16884_control_links_may_lead_into_proc",
)
async def test_cve_2019_16884(bench: Bench, image: Image, tmp_path: Path) -> None:
    assert "a link into /proc" in await over_proc(bench, image, tmp_path)


async def test_16884_control_links_may_lead_into_proc(weaken: Weaken, image: Image, tmp_path: Path) -> None:
    assert "fake" in await over_proc(await weaken(weak.NO_CHECK_OF_PROC), image, tmp_path)


async def with_fake_null(bench: Bench, image: Image, tmp_path: Path) -> str:
    """A volume at /dev whose null is a link to a file that is to be covered, where another one is masked."""
    fake = tmp_path / "dev"
    fake.mkdir()
    (fake / "null").symlink_to("/proc/sys/kernel/hostname")
    (image.root / "masked").write_text("masked")
    pod = await with_image(bench, image).pod()
    spec = container(
        pod, "cat", "/masked", linux=lambda linux: msgspec.structs.replace(linux, masked_paths=("/masked",))
    )
    usual = tuple(each for each in spec.mounts if not each.destination.startswith("/dev"))
    spec = msgspec.structs.replace(spec, mounts=(*usual, bind(fake, "/dev")))
    return await said(bench, pod, spec)


@attack(
    "CVE-2025-31133",
    sentence="The container's /dev/null is a link into /proc; what masks a path is that file, open for writing",
    guard="paths are masked with the host's null device, which is checked to be character device 1:3",
    control="test_31133_control_the_containers_null",
)
async def test_cve_2025_31133(bench: Bench, image: Image, tmp_path: Path) -> None:
    assert await with_fake_null(bench, image, tmp_path) == ""


async def test_31133_control_the_containers_null(weaken: Weaken, image: Image, tmp_path: Path) -> None:
    edits: weak.Edits = (
        (
            "plan/mounts.py",
            'null = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)',
            'null = files.open_in_root(context.root, "/dev/null", os.O_PATH)',
        ),
        ("plan/mounts.py", "if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(1, 3):", "if False:"),
    )  # fmt: skip
    assert await with_fake_null(await weaken(edits), image, tmp_path) == "pod\n"


# Terminals and labels: -2025-52565, -2025-52881


async def with_fake_terminal(bench: Bench, image: Image, tmp_path: Path) -> Path:
    """A volume at /dev whose pts/ptmx leads to a real one, and whose pts/0 and so on to a file of another's.

    That file, of which the container's user 1000 has become the owner, or not.
    """
    fake, victims = tmp_path / "dev", tmp_path / "victims"
    (fake / "pts").mkdir(parents=True)
    (fake / "real").mkdir()
    (fake / "pts/ptmx").symlink_to("/dev/real/ptmx")
    victims.mkdir()
    victim = victims / "file"
    victim.write_text("")
    for number in range(8):
        (fake / f"pts/{number}").symlink_to("/victims/file")
    pod = await with_image(bench, image).pod()
    spec = container(
        pod, "true",
        process=lambda process: msgspec.structs.replace(process, terminal=True, user=User(uid=1000, gid=1000)),
    )  # fmt: skip
    usual = tuple(each for each in spec.mounts if not each.destination.startswith("/dev"))
    devpts = Mount(destination="/dev/real", type="devpts", options=("newinstance", "ptmxmode=0666", "mode=0620"))
    spec = msgspec.structs.replace(spec, mounts=(*usual, bind(fake, "/dev"), devpts, bind(victims, "/victims")))
    try:
        await bench.run(pod, "c", spec)
    except StepFailed:
        pass
    return victim


@attack(
    "CVE-2025-52565",
    sentence="A volume at /dev provides the terminal: its slave, which crib opens and gives to the container's user, "
    "is a "
    "link to somebody else's file",
    guard="the slave is opened through its master (TIOCGPTPEER), which is checked to be one; nothing is bound on "
    "/dev/console",
    control="test_52565_control_slave_by_path",
)
async def test_cve_2025_52565(bench: Bench, image: Image, tmp_path: Path) -> None:
    assert (await with_fake_terminal(bench, image, tmp_path)).stat().st_uid == 0


async def test_52565_control_slave_by_path(weaken: Weaken, image: Image, tmp_path: Path) -> None:
    by_path = "os.open(f\"/dev/pts/{struct.unpack('I', fcntl.ioctl(master, 0x80045430, bytes(4)))[0]}\", os.O_RDWR)"
    edits: weak.Edits = (
        ("plan/identity.py", "fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)", by_path),
    )
    victim = await with_fake_terminal(await weaken(edits), image, tmp_path)
    assert victim.stat().st_uid == 1000


def labelled(pod_spec: Spec, image: Image) -> Spec:
    """A process with a label to write, in an image that has the kernel's file for it as one of its own."""
    attributes = image.root / "proc/thread-self/attr"
    for directory in (attributes, image.root / "proc/self/attr"):
        directory.mkdir(parents=True)
        (directory / "exec").write_text("")
    usual = tuple(each for each in pod_spec.mounts if each.destination != "/proc")
    process = msgspec.structs.replace(pod_spec.process, selinux_label="system_u:system_r:container_t:s0")
    return msgspec.structs.replace(pod_spec, mounts=usual, process=process)


def keyring_unlabelled(plan: Plan) -> Plan:
    """Without the keyring's label, at which a start ends early where SELinux is off."""
    return tuple(replaced(step, key_label="") if isinstance(step, identity.Detach) else step for step in plan)


async def write_label(bench: Bench, image: Image) -> list[str]:
    """What turns up in the image's fake files."""
    pod = await with_image(bench, image).pod()
    try:
        await bench.run(pod, "c", labelled(container(pod, "true"), image))
    except StepFailed:
        pass
    upper = bench.directory / f"upper{bench.count}"
    return [path.read_text() for path in upper.rglob("exec") if stat.S_ISREG(path.lstat().st_mode)]


@attack(
    "CVE-2025-52881", "CVE-2019-16884",
    sentence="The container's /proc is a fake: the security label for execve is written to a file of the attacker's",
    guard="the label's file is opened on the host's /proc, before the process enters the container's root; kernel "
    "parameters "
    "are written by the monitor, in the host's mount namespace",
    control="test_52881_control_label_opened_inside",
)  # fmt: skip
async def test_cve_2025_52881(bench: Bench, image: Image, plans: Plans) -> None:
    plans.starts(keyring_unlabelled)
    assert await write_label(bench, image) == []


async def test_52881_control_label_opened_inside(bench: Bench, image: Image, plans: Plans) -> None:
    def moved(plan: Plan) -> Plan:
        plan = keyring_unlabelled(plan)
        opened = [step for step in plan if isinstance(step, identity.OpenLabel)]
        others = [step for step in plan if step not in opened]
        at = next(number for number, step in enumerate(others) if isinstance(step, mounts.PivotRoot)) + 1
        return (*others[:at], *(replaced(step, path="/proc/self/attr/exec") for step in opened), *others[at:])

    plans.starts(moved)
    assert await write_label(bench, image) == ["system_u:system_r:container_t:s0"]


@attack(
    "CVE-2025-52881",
    sentence="/proc/sys is read-only, and stays it when a volume is mounted below it by way of links",
    guard="read-only paths are made so last, recursively, through openat2",
    control="test_52881_control_writable_proc_sys",
)
async def test_cve_2025_52881_sysctls(bench: Bench) -> None:
    assert await write_sysctl(bench) == ""


async def test_52881_control_writable_proc_sys(bench: Bench, plans: Plans) -> None:
    plans.starts(lambda plan: tuple(step for step in plan if not isinstance(step, mounts.ReadOnlyPaths)))
    assert "WRITABLE" in await write_sysctl(bench)


async def write_sysctl(bench: Bench) -> str:
    pod = await bench.pod()
    command = "( : >> /proc/sys/kernel/core_pattern ) && echo WRITABLE"
    spec = container(pod, "sh", "-c", command, linux=masked, process=holding("SYS_ADMIN", "DAC_OVERRIDE"))
    _, log = await bench.run(pod, "c", spec)
    return "" if "WRITABLE" not in log else log

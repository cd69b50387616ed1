"""Rules that hold for any image, any mounts, any working directory and any processes, tried with random ones."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.engine import Pod, PodStart
from runtime.errors import StepFailed
from runtime.linux.probe import probe
from runtime.spec import Linux, Mount
from tests.requires import requires
from tests.runtime.conftest import MAPS, POD_ID, TIMEOUT_S, Bench, container
from tests.security import weak
from tests.security.conftest import Plans, Weaken, applet, capable, execute, held
from tests.security.defects import attack
from tests.security.trace import Call, Trace, tracing
from tests.security.watch import NO_PTRACE, Watch, at_the_fifo, has, held_by, shared, until

pytestmark = [requires("root", "overlay", "busybox", "strace"), pytest.mark.asyncio]

# Times as many examples, and others in each run.
MORE = int(os.environ.get("CRIB_EXAMPLES", "1"))


def tried(examples: int) -> settings:
    """Hypothesis only makes the examples: they are tried outside of it, in the test's event loop."""
    return settings(
        max_examples=examples * MORE, deadline=None, database=None, derandomize=MORE == 1,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


CALLS = (
    "open openat openat2 mkdir mkdirat mknod mknodat symlink symlinkat chown fchownat chmod fchmodat mount umount2 "
    "move_mount open_tree pivot_root setns execve chdir unlink unlinkat rename renameat renameat2 link linkat truncate "
    "setxattr"
).split()
# What a child may name by an absolute path between its root file system's mount and the pivot: nothing below the root.
ALLOWED = re.compile(
    r"/proc/self/fd/\d+|/dev/null|/proc/(thread-)?self/attr/[a-z/]+|/sys|/|/run/crib-[^/]+/[^/]+/rootfs"
)
BUILDS = r'^mount\("overlay"'  # what begins to build a container's tree
OUTSIDE = "only-on-the-host"

names = st.sampled_from(["x y", *"a b etc bin dev proc sys mnt ä ... -n etc/hosts dev/null".split()])
magic = st.tuples(st.sampled_from(["self", "1", "thread-self"]), st.sampled_from(["root", "cwd", "fd/3", "fd/7"]))
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@st.composite
def links(draw: Any) -> str:
    """Where a link may lead: out by the root, up, through /proc, in a circle, to the outside."""
    up = "../" * draw(st.integers(0, 12))
    kind = draw(st.integers(0, 4))
    inside: str = draw(paths)
    return {
        0: f"{up}{inside}",
        1: f"/{inside}",
        2: "/proc/" + "/".join(draw(magic)),
        3: f"{up}OUTSIDE",
        4: "/OUTSIDE/new",
    }[kind]


link = st.tuples(st.just("link"), links())
other = st.tuples(st.sampled_from(["file", "fifo", "device"]), st.just(""))
entries = st.lists(st.tuples(paths, st.one_of(link, other)), max_size=6)
targets = st.lists(st.tuples(paths, st.booleans()), max_size=4)
directories = st.one_of(paths, links().map(lambda text: "/" + text.lstrip("/")))


def plant(root: Path, outside: Path, wanted: list[tuple[str, tuple[str, str]]]) -> None:
    """Put these into an image or a volume, as far as they fit."""
    for name, (kind, target) in wanted:
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.resolve().is_relative_to(root.resolve()) or path.is_symlink():
                continue
            if path.is_dir():
                if name in ("bin", "etc"):
                    continue
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            if kind == "link":
                path.symlink_to(target.replace("/OUTSIDE", str(outside)).replace("OUTSIDE", str(outside).lstrip("/")))
            elif kind == "fifo":
                os.mkfifo(path)
            elif kind == "device":
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 11))
            else:
                path.write_text("x")
        except (OSError, RuntimeError):
            continue


def stray(trace: Trace) -> list[Call]:
    """Calls of a container's first process, while it builds the tree, that could have gone out of the root."""
    found = []
    for _, calls in trace.children(BUILDS).values():
        for call in calls:
            if call.name == "pivot_root":
                break
            if "RESOLVE_IN_ROOT" in call.text or call.name in ("setns", "execve"):
                continue
            if "cgroup" in call.path and call.name == "openat" and "O_WRONLY" in call.text:
                continue  # it joins its cgroup
            path = mounted_on(call)
            named = ALLOWED.fullmatch(path) if path.startswith("/") else "/" not in path and path != ".."
            if not named or call.name == "openat2":
                found.append(call)
    return found


def mounted_on(call: Call) -> str:
    """The path that a call acts on: the second one of those with two."""
    found = re.findall(r'"((?:[^"\\]|\\.)*)"', call.text)
    return found[1] if call.name in ("mount", "symlink", "symlinkat") and len(found) > 1 else call.path


class Random:
    """One pod in which random containers are started, each in an image of its own."""

    def __init__(self, bench: Bench, pod: Pod, directory: Path, busybox: Path) -> None:
        self.bench, self.pod, self.directory, self.busybox = bench, pod, directory, busybox
        self.number = 0

    async def start(
        self, wanted: list[Any], in_volume: list[Any], mounts: list[tuple[str, bool]], cwd: str
    ) -> tuple[Trace, list[str]]:
        """Start a container; its calls, and what has changed in the directory outside."""
        self.number += 1
        here = self.directory / f"case{self.number}"
        outside, volume, root = here / "outside", here / "volume", here / "layers/1"
        for each in (outside, volume, root / "bin", root / "etc"):
            each.mkdir(parents=True)
        (outside / OUTSIDE).touch()
        os.chown(outside / OUTSIDE, 4711, 4711)
        shutil.copy(self.busybox, root / "bin/busybox")
        (root / "bin/true").symlink_to("busybox")
        plant(root, outside, wanted)
        plant(volume, outside, in_volume)
        (here / "file").touch()
        self.bench.layer = here / "layers"
        binds = tuple(
            Mount(
                destination=f"/{name}", type="bind", source=str(volume if deep else here / "file"), options=("rbind",)
            )
            for name, deep in mounts
        )

        def masked(linux: Linux) -> Linux:
            hidden = ("/proc/kcore", "/etc/a")
            return msgspec.structs.replace(linux, masked_paths=hidden, readonly_paths=("/proc/sys",))

        spec = container(
            self.pod, "true", mounts=binds, linux=masked,
            process=lambda process: msgspec.structs.replace(process, cwd=f"/{cwd}"),
        )  # fmt: skip
        before = snapshot(outside)
        with tracing(self.pod.monitor_pid, here, *CALLS) as trace:
            id = f"c{self.number}"
            try:
                await self.bench.run(self.pod, id, spec)
                await self.pod.forget(id)
            except StepFailed:
                pass
        changed = sorted(set(snapshot(outside)) ^ set(before))
        shutil.rmtree(here, ignore_errors=True)
        return trace, changed


def snapshot(directory: Path) -> list[str]:
    return [f"{path} {path.lstat().st_mode:o} {path.lstat().st_uid}" for path in (directory, *directory.rglob("*"))]


@pytest_asyncio.fixture
async def random(bench: Bench, layer: Path, tmp_path: Path) -> AsyncIterator[Random]:
    yield Random(bench, await bench.pod(), tmp_path, layer / "1/bin/busybox")


@attack(
    "property: nothing outside the root",
    sentence="Random images and volumes (links, devices, fifos, odd names), random mounts and random working "
    "directories have "
    "crib open, create, mount or chown something outside the container's root",
    guard="every path in a root is resolved by openat2 with RESOLVE_IN_ROOT, by calls that were all traced",
    control="test_property_control_a_path_out_of_the_root",
)
async def test_nothing_outside_the_root_is_touched(random: Random) -> None:
    loop = asyncio.get_running_loop()
    cases: list[tuple[Any, ...]] = []

    @tried(25)
    @given(st.tuples(entries, entries, targets, directories))
    def collect(case: tuple[Any, ...]) -> None:
        cases.append(case)

    await loop.run_in_executor(None, collect)
    watched = 0
    for case in cases:
        trace, changed = await random.start(*case)
        assert changed == [], case
        assert stray(trace) == [], case
        watched += len(trace.children(BUILDS))
    assert watched == len(cases)  # each was seen mounting its root file system, and what came then


async def test_property_control_a_path_out_of_the_root(weaken: Weaken, layer: Path, tmp_path: Path) -> None:
    bench = await weaken(weak.NO_RESOLVE_IN_ROOT)
    weakened = Random(bench, await bench.pod(), tmp_path, layer / "1/bin/busybox")
    trace, changed = await weakened.start([("mnt", ("link", "/OUTSIDE/new"))], [], [("mnt/a", True)], "")
    assert changed
    assert stray(trace)


SEE = """
exec 2>/dev/null
for p in /proc/[0-9]*; do
    case $(tr '\\0' ' ' < $p/cmdline) in *crib*) echo "COMMAND LINE $p";; esac
    grep -q python $p/maps 2>/dev/null && echo "MAP $p"
    grep -q . $p/environ 2>/dev/null && tr '\\0' '\\n' < $p/environ | grep -q CRIB && echo "ENVIRONMENT $p"
    for f in $p/fd/*; do
        case $(readlink $f) in *memfd*|*/pods/*|*cgroup*|*socket*) echo "DESCRIPTOR $f $(readlink $f)";; esac
    done
done; true
"""


process_trees = st.recursive(
    st.just("look"),
    lambda inner: st.tuples(
        st.sampled_from(["( {} )", "( {} & )", "{} & {} ; wait", "setsid sh -c '. /look' ; {}"]), inner
    ).map(lambda pair: pair[0].replace("{}", pair[1])),
    max_leaves=4,
)


@attack(
    "property: no view of crib",
    sentence="Random trees of processes, orphans among them, look for descriptors, memory maps, environments and "
    "command lines "
    "of crib's among all processes that they see",
    guard="a container has its own pid namespace and closed descriptors; crib's processes are not dumpable",
    control="test_property_control_host_pid_namespace",
)
async def test_no_process_in_a_container_sees_crib(bench: Bench, layer: Path) -> None:
    applet(layer, "tr")
    pod = await bench.pod()
    trees: list[str] = []

    @tried(12)
    @given(process_trees)
    def collect(tree: str) -> None:
        trees.append(tree)

    collect()
    (layer / "1/look").write_text(SEE)
    for number, tree in enumerate(trees):
        spec = container(
            pod,
            "sh",
            "-c",
            f"look() {{ . /look; }}; {tree}; wait",
            process=lambda process: msgspec.structs.replace(process, capabilities=capable(*held())),
        )
        exited, log = await bench.run(pod, f"c{number}", spec)
        assert exited.code == 0
        assert log == "", tree


async def test_property_control_host_pid_namespace(bench: Bench, layer: Path) -> None:
    applet(layer, "tr")
    pod = await bench.pod()
    (layer / "1/look").write_text(SEE)
    spec = container(
        pod,
        "sh",
        "-c",
        ". /look",
        namespaces={"pid": None},
        process=lambda process: msgspec.structs.replace(process, capabilities=capable("SYS_PTRACE")),
    )
    _, log = await bench.run(pod, "c", spec)
    assert {"COMMAND", "MAP", "DESCRIPTOR"} <= set(log.split())


async def seen_while_entering(bench: Bench, layer: Path, plans: Plans, null: int, directory: Path) -> str:
    """What a container that is not frozen sees while a command and a container of its pod are
    held before their first step."""
    applet(layer, "tr")
    (layer / "1/look").write_text(SEE)
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", pid=True))
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    rounds = "round=$((round+1)); echo $round > /rounds.new; mv /rounds.new /rounds"
    able = [name for name in NO_PTRACE if name != "SYS_ADMIN"]  # which has PERFMON's rights: see docs/security.md
    spec = container(
        pod, "sh", "-c", f"round=0; look() {{ . /look; }}; while :; do look >> /seen; {rounds}; done",
        namespaces=shared(pod), process=has(capable(*able)),
    )  # fmt: skip
    await bench.start(pod, "c", spec)
    watch = Watch(bench.directory / f"upper{bench.count}")
    await watch.tried()
    plans.both(held_by(fifo))
    running = execute(bench, pod, 1, (null, null, null), "true", linux=spec.linux)
    starting = asyncio.ensure_future(bench.run(pod, "other", container(pod, "true", namespaces=shared(pod))))
    await until(lambda: at_the_fifo(pod.monitor_pid) == 2)
    await watch.tried()
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert (await asyncio.wait_for(running.wait(), TIMEOUT_S)).code == 0
    assert (await starting)[0].code == 0
    os.close(reader)
    await pod.kill("c")
    return (watch.upper / "seen").read_text()


@attack(
    "property: no view of crib",
    sentence="A container looks for the same in what enters its pid namespace, a command and another container of its "
    "pod, when that has not taken its first step yet",
    guard="what a monitor clones has no command line of the monitor's, and is not dumpable",
    control="test_property_control_the_monitors_title",
)
async def test_what_enters_shows_nothing_of_crib(
    bench: Bench, layer: Path, plans: Plans, null: int, tmp_path: Path
) -> None:
    assert await seen_while_entering(bench, layer, plans, null, tmp_path) == ""


async def test_property_control_the_monitors_title(
    weaken: Weaken, layer: Path, plans: Plans, null: int, tmp_path: Path
) -> None:
    titled = (("zygote/podspace.py", 'title = set_title(b"")', 'title = set_title(b"crib-monitor")'),)
    seen = await seen_while_entering(await weaken(titled), layer, plans, null, tmp_path)
    assert "COMMAND LINE" in seen


STAY = """
for f in /proc/sys/kernel/core_pattern /proc/sys/kernel/hostname2 /proc/sysrq-trigger; do
    ( : >> $f ) 2>/dev/null && echo "WRITABLE $f"
done
mknod /disk b 8 0 2>/dev/null && cat /disk > /dev/null 2>&1 && echo DEVICE
mount -t ext4 /dev/null /mnt 2>/dev/null && echo MOUNTED
mkdir -p /p && mount -t proc proc /p 2>/dev/null
( : >> /p/sys/kernel/core_pattern ) 2>/dev/null && [ -e /p/self ] && echo "WRITABLE /p"
cat /proc/self/uid_map
"""


async def every_capability(bench: Bench, *, mapped: bool) -> list[str]:
    maps: dict[str, Any] = {"uids": MAPS, "gids": MAPS} if mapped else {}
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", **maps))
    sets = capable(*held())
    spec = container(pod, "sh", "-c", STAY, process=lambda process: msgspec.structs.replace(process, capabilities=sets))
    _, log = await bench.run(pod, "c", spec)
    return log.splitlines()


@attack(
    "property: a user namespace holds",
    sentence="A container with every capability there is, in a user namespace, writes the host's kernel parameters, "
    "opens its "
    "disks, or mounts file systems of the host's",
    guard="capabilities count in the pod's user namespace alone; its ids are nobody's on the host",
    control="test_property_control_every_capability_on_the_host",
)
@requires("userns")
async def test_every_capability_stays_in_a_user_namespace(bench: Bench, tmp_path: Path) -> None:
    if not probe(str(tmp_path)).user_namespaces:
        pytest.skip("this kernel's overlay takes no idmapped layers")
    lines = await every_capability(bench, mapped=True)
    assert len(lines) == 1
    assert lines[0].split() == [str(number) for number in MAPS[0]]


async def test_property_control_every_capability_on_the_host(bench: Bench) -> None:
    assert "WRITABLE" in " ".join(await every_capability(bench, mapped=False))

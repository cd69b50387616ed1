"""Engines for attackers: the real one, and ones without a guard."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from runtime.cgroup import detect
from runtime.engine import Cgroup, ContainerStart, Engine, Exec, ExecStart, LogFile, Pod, Started, open_log
from runtime.images import RootFs
from runtime.linux.caps import NAMES
from runtime.linux.probe import probe
from runtime.plan.compile import compile_exec, compile_start
from runtime.plan.plan import Plan, Step
from runtime.spec import Capabilities, Linux, Mount, Process, Spec, User
from tests.cri.real.conftest import Real, archive, daemon, real, settings  # noqa: F401
from tests.cri.real.daemon import BUILTIN, Daemon, load_image
from tests.runtime.conftest import Bench, bench, layer, null, state_dir  # noqa: F401
from tests.security import weak
from tests.security.defects import Attack

Weaken = Callable[..., Awaitable[Bench]]


@pytest_asyncio.fixture
async def weaken(
    layer: Path,  # noqa: F811
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Weaken]:
    """Makes a bench whose zygote lacks guards (see `weak`)."""
    made: list[Bench] = []

    async def make(*edits: weak.Edits) -> Bench:
        state = run_dir / "weak-state"
        state.mkdir()
        engine = Engine(state, weak.zygote(tmp_path, monkeypatch, *edits), probe())
        made.append(Bench(engine, layer, tmp_path, detect(driver="cgroupfs"), f"/crib-test-{os.getpid()}-weak"))
        return made[-1]

    yield make
    for weakened in made:
        weakened.cgroups.kill(weakened.cgroup)
        pods = run_dir / "weak-state/pods"
        for pod_id in os.listdir(pods) if pods.exists() else ():
            await weakened.engine.stop_pod(pod_id)
        weakened.engine.close()
        await weakened.remove_cgroups()


WeakCribd = Callable[..., Awaitable[Real]]


@pytest_asyncio.fixture
async def weak_cribd(run_dir: Path, archive: bytes, tmp_path: Path) -> AsyncIterator[WeakCribd]:  # noqa: F811
    """Starts a cribd that lacks guards (see `weak`)."""
    made: list[Real] = []

    async def make(*edits: weak.Edits, config: str = BUILTIN) -> Real:
        cribd = Daemon(run_dir, config, code=weak.packages(tmp_path, *edits))
        cribd.start()
        made.append(Real(cribd, cribd.client(), tmp_path / "logs"))
        await load_image(made[-1].client, archive)
        return made[-1]

    yield make
    for weakened in made:
        try:
            for item in (await weakened.client.ListPodSandbox(pb.ListPodSandboxRequest())).items:
                await weakened.remove(item.id)
        finally:
            await weakened.client.close()
            assert weakened.daemon.stop() == 0, weakened.daemon.log()


class Plans:
    """Plans are data: what `edit` makes of a start's or an exec's is what the engine executes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def starts(self, edit: Callable[[Plan], Plan]) -> None:
        def edited(*given: Any) -> Any:
            start = compile_start(*given)
            return dataclasses.replace(start, plan=edit(start.plan))

        self._patch.setattr("runtime.starts.compile_start", edited)

    def execs(self, edit: Callable[[Plan], Plan]) -> None:
        self._patch.setattr("runtime.execs.compile_exec", lambda *given: edit(compile_exec(*given)))

    def both(self, edit: Callable[[Plan], Plan]) -> None:
        self.starts(edit)
        self.execs(edit)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    return Plans(monkeypatch)


def replaced(step: Step, **fields: Any) -> Step:
    """The step with other values."""
    return type(step)(**(dict(zip(step.fields, step.values(), strict=True)) | fields))


def holding(*names: str) -> Callable[[Process], Process]:
    """A change of a process: it has these capabilities as well."""

    def change(process: Process) -> Process:
        sets = process.capabilities or Capabilities()
        held = (*sets.bounding, *(f"CAP_{name}" for name in names))
        return msgspec.structs.replace(
            process, capabilities=Capabilities(bounding=held, effective=held, permitted=held)
        )

    return change


def capable(*names: str) -> Capabilities:
    held = tuple(f"CAP_{name}" for name in names)
    return Capabilities(bounding=held, effective=held, permitted=held)


def held() -> tuple[str, ...]:
    """All capabilities that this process can give, without their prefix."""
    bits = int(Path("/proc/self/status").read_text().partition("CapPrm:")[2].split()[0], 16)
    return tuple(name for number, name in enumerate(NAMES) if bits >> number & 1)


def applet(layer: Path, name: str) -> None:  # noqa: F811
    """Have one more of busybox's programs in the usual image."""
    path = layer / "1/bin" / name
    if not path.exists():
        path.symlink_to("busybox")


def bind(source: Path, destination: str, *options: str) -> Mount:
    return Mount(destination=destination, type="bind", source=str(source), options=("rbind", "rprivate", *options))


def python() -> tuple[str, tuple[Mount, ...]]:
    """A Python interpreter, the tests' own, and the mounts with which a container has it."""
    places = sorted({path for path in ("/usr", "/lib", "/lib64", sys.base_prefix) if os.path.isdir(path)})
    mounts = tuple(Mount(destination=path, type="bind", source=path, options=("rbind", "ro")) for path in places)
    return os.path.realpath(sys.executable), mounts


class Image:
    """A root file system of an attacker's: busybox, and what a test adds below `root`."""

    def __init__(self, base: Path, layer: Path) -> None:  # noqa: F811
        self.base = base
        self.root = base / "1"
        shutil.copytree(layer / "1", self.root, symlinks=True)


@pytest.fixture
def image(tmp_path: Path, layer: Path) -> Image:  # noqa: F811
    base = tmp_path / "hostile"
    base.mkdir()
    return Image(base, layer)


def with_image(made: Bench, image: Image) -> Bench:
    made.layer = image.base
    return made


async def start_at(made: Bench, pod: Pod, spec: Spec, *, log: str) -> Started:
    """Start container c with that log path."""
    made.count += 1
    upper, work = made.directory / f"upper{made.count}", made.directory / f"work{made.count}"
    upper.mkdir()
    work.mkdir()
    rootfs = RootFs(base=str(made.layer), lowers=("1",), upper=str(upper), work=str(work))
    fd = open_log(log)
    try:
        return await pod.start(ContainerStart("c", spec, rootfs, made.cgroup_of("c"), LogFile(log, fd)))
    finally:
        os.close(fd)


def execute(
    made: Bench,
    pod: Pod,
    number: int,
    streams: tuple[int, int, int],
    *args: str,
    container: str = "c",
    process: Callable[[Process], Process] = lambda process: process,
    linux: Linux | None = None,
) -> Exec:
    """Run a command as root in a container, with these descriptors."""
    base = Process(cwd="/", user=User(uid=0, gid=0), args=args, env=("PATH=/bin",))
    cgroup = Cgroup.of(made.cgroups, f"{made.cgroup}/{container}")
    request = ExecStart(f"e{number}", container, process(base), linux or Linux(), cgroup.join_files, cgroup.clone_dir)
    return pod.exec(request, *streams)


# The count, printed last


_attacks: dict[str, Attack] = {}
_ROOM = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_ROOM):
            item.add_marker(pytest.mark.root)  # hack/vm test runs what is marked so: all of the suite
        found = getattr(getattr(item, "function", None), "attack", None)
        if isinstance(found, Attack):
            _attacks[item.nodeid] = found


def _published(reports: Iterable[Any]) -> set[str]:
    """The published defects among what the tests of these reports try."""
    tests = {report.nodeid for report in reports}
    ids = {id for nodeid, attack in _attacks.items() if nodeid in tests for id in attack.ids}
    return {id for id in ids if id.startswith(("CVE-", "GHSA-"))}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """One line before pytest's own last one. What fails counts as successful, whatever the reason."""
    yield
    stats = terminalreporter.stats
    passed, failed = stats.get("passed", ()), stats.get("failed", ())
    succeeded, unclear = _published(failed), _published(stats.get("error", ()))
    if tried := _published(passed) | succeeded | unclear:
        skipped = _published(stats.get("skipped", ())) - tried
        controls = sum("_control_" in report.nodeid for report in passed)
        terminalreporter.write_line(
            f"published defects tried: {len(tried)}, succeeded: {len(succeeded)} {' '.join(sorted(succeeded))}".rstrip()
            + f"; controls that succeeded: {controls}"
            + (f"; not tried: {' '.join(sorted(skipped))}" if skipped else "")
            + (f"; left something behind: {' '.join(sorted(unclear))}" if unclear else "")
        )

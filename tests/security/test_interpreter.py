"""CVE-2019-14271 in its Python form: an image with files at the interpreter's paths."""

from __future__ import annotations

import asyncio
import os
import sysconfig
from functools import partial
from pathlib import Path

import msgspec
import pytest

from runtime.errors import StepFailed
from runtime.spec import Process, User
from tests.requires import requires
from tests.runtime.conftest import TIMEOUT_S, Bench, container
from tests.security import weak
from tests.security.conftest import Image, Weaken, execute, with_image
from tests.security.defects import attack
from tests.security.trace import Call, Trace, tracing

pytestmark = [requires("root", "overlay", "busybox", "strace"), pytest.mark.asyncio]

OPENS = ("open", "openat", "openat2", "execve", "pivot_root", "setns")
HOSTILE = "import os\nos.close(os.open('/pwned', os.O_CREAT | os.O_WRONLY))\n"
NAME_SERVICES = (
    "/etc/nsswitch.conf /etc/passwd /etc/group /etc/hosts /etc/resolv.conf /etc/host.conf /etc/ld.so.cache "
    "/etc/ld.so.preload /etc/localtime /usr/share/locale/locale.alias /usr/lib/locale/locale-archive"
).split()


def infest(image: Image, monitor: int) -> None:
    """Put hostile files at the paths of the standard library, of what a monitor maps, and of name services."""
    places = {Path(path) for path in NAME_SERVICES}
    for name in ("stdlib", "platstdlib"):
        for path in Path(sysconfig.get_path(name)).rglob("*"):
            if path.suffix in (".py", ".so") and "test" not in path.parts:
                places.add(path)
    for line in Path(f"/proc/{monitor}/maps").read_text().splitlines():
        if "/" in line:
            places.add(Path(line[line.index("/") :]))
    libraries = Path(os.path.dirname(next(str(path) for path in places if "libc.so" in path.name)))
    places |= {libraries / f"libnss_{name}.so.2" for name in ("files", "dns", "compat", "systemd", "myhostname")}
    places |= {libraries / "gconv" / name for name in ("gconv-modules", "UTF-16.so", "ISO8859-1.so")}
    places |= {Path(__file__).parents[2] / name for name in ("runtime/__init__.py", "runtime/plan/plan.py")}
    for path in places:
        here = image.root / str(path).lstrip("/")
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_text(HOSTILE)
        here.chmod(0o755)


def opened(calls: list[Call]) -> list[str]:
    return [call.path for call in calls if call.name.startswith("open")]


def entered(trace: Trace) -> list[list[str]]:
    """What each child opened between its entering a container's mount namespace and its program, or its end."""
    # CLONE_NEWNS among setns's flags is an exec; the monitor's own setns of the pid namespace is not.
    children = trace.children(r"pivot_root\(|setns\(.*CLONE_NEWNS")
    return [opened(after) for _, after in children.values()]


def instead(made: Process, _: Process) -> Process:
    return made


async def attempts(bench: Bench, image: Image, null: int, trace_in: Path) -> Trace:
    """Start and exec by every way that can be gone wrong, under a tracer."""
    pod = await bench.pod()
    infest(image, pod.monitor_pid)
    with_image(bench, image)
    with tracing(pod.monitor_pid, trace_in, *OPENS) as trace:
        await bench.start(pod, "c", container(pod, "sleep", "1000"))

        def process(**fields: object) -> Process:
            return msgspec.structs.replace(container(pod, "x").process, **fields)

        wrong: dict[str, dict[str, object]] = {
            "good": {"args": ("true",)},
            "missing": {"args": ("no-such-program",)},
            "undecodable": {"args": ("no-\udcff-such",)},
            "directory": {"args": ("/etc",)},
            "nobody": {"args": ("true",), "user": User(uid=12345, gid=54321, additional_gids=(7,))},
            "no directory": {"args": ("true",), "cwd": "/bin/busybox"},
            "no program": {"args": ("/etc/passwd",)},
            "terminal": {"args": ("true",), "terminal": True},
        }
        for number, (_, fields) in enumerate(wrong.items()):
            made = process(**fields)
            try:
                await bench.start(pod, f"c{number}", container(pod, "x", process=partial(instead, made)))
            except (StepFailed, UnicodeEncodeError):
                pass
            running = execute(bench, pod, number, (null,) * 3, "x", process=partial(instead, made))
            try:
                await asyncio.wait_for(running.wait(), TIMEOUT_S)
            except StepFailed:
                pass
        await pod.kill("c")
        await asyncio.wait_for(bench.exited("c"), TIMEOUT_S)
    return trace


@attack(
    "CVE-2019-14271",
    sentence="An image has hostile copies of the standard library, of all that the interpreter maps, of codecs and "
    "name "
    "services at their paths; containers are started and commands run there, rightly and wrongly",
    guard="after entering a container's root nothing is imported, loaded or looked up: only steps open files",
    control="test_14271_control_an_import_left_over",
)
async def test_cve_2019_14271(bench: Bench, image: Image, null: int, tmp_path: Path) -> None:
    trace = await attempts(bench, image, null, tmp_path)
    children = entered(trace)
    assert len(children) >= 12
    usual = {"/", "/dev/pts/ptmx", "/dev", "/dev/console", "/bin/busybox"}
    assert {path for paths in children for path in paths} <= usual
    assert not list(bench.directory.glob("upper*/pwned"))


async def test_14271_control_an_import_left_over(weaken: Weaken, image: Image, null: int, tmp_path: Path) -> None:
    edits: weak.Edits = (
        (
            "zygote/child.py",  # what no rehearsal of the zygote's comes to
            '        sync.send(pack({"failed": outcome.failed,',
            '        import fractions\n        sync.send(pack({"failed": outcome.failed,',
        ),
    )
    bench = await weaken(weak.IMPORTS_WORK, edits)
    trace = await attempts(bench, image, null, tmp_path)
    assert any("fractions" in path for paths in entered(trace) for path in paths)
    assert list(bench.directory.glob("upper*/pwned"))

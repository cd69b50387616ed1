"""Cgroups of a test's own, and programs that run in them."""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest

from runtime.cgroup import Cgroups, detect, files
from runtime.spec import Resources
from tests import requires
from tests.limits import scaled

DEADLINE_S = scaled(30)

# Joins the cgroups whose files are its arguments, says so and runs the test's program once a line comes in.
_PROLOGUE = """
import sys
for file in sys.argv[1:]:
    with open(file, "w") as opened:
        opened.write("0")
print("joined", flush=True)
sys.stdin.readline()
"""


class Program:
    """A Python program in a cgroup; it prints lines, and reads lines."""

    def __init__(self, join_files: tuple[str, ...], code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROLOGUE + textwrap.dedent(code), *join_files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        assert self.line() == "joined"

    @property
    def pid(self) -> int:
        return self._process.pid

    def go(self) -> None:
        self.tell("go")

    def tell(self, text: str) -> None:
        self._stdin.write(text + "\n")
        self._stdin.flush()

    def line(self) -> str:
        return self._stdout.readline().rstrip("\n")

    def silent_for(self, duration_s: float) -> bool:
        """Whether nothing is printed; only where every printed line has been read."""
        return not select.select([self._stdout], [], [], duration_s)[0]

    def wait(self) -> int:
        """The exit code, or minus the signal's number."""
        return self._process.wait(DEADLINE_S)

    def output(self) -> str:
        """Let it run, and all that it printed once it has ended."""
        self.go()
        text = self._stdout.read()
        assert self.wait() == 0
        return text

    def end(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)
        self._stdin.close()
        self._stdout.close()


@dataclass(slots=True)
class Place:
    """A parent cgroup that exists only for the test."""

    cgroups: Cgroups
    root: str
    programs: list[Program] = field(default_factory=list)

    @property
    def parent(self) -> str:
        return self.cgroups.join_path(self.root)

    def path(self, *names: str) -> str:
        return self.cgroups.join_path(self.root, *names)

    def make(self, *names: str, limits: Resources | None = None) -> str:
        path = self.path(*names)
        self.cgroups.create(path, limits)
        return path

    def run(self, path: str, code: str) -> Program:
        program = Program(self.cgroups.join_files(path), code)
        self.programs.append(program)
        return program

    def run_nested(self, path: str, code: str) -> Program:
        """Run it in cgroups below, such as a container makes for itself."""
        joins = []
        for file in self.cgroups.join_files(path):
            directory, _, name = file.rpartition("/")
            os.mkdir(f"{directory}/nested")
            if directory.startswith("/sys/fs/cgroup/cpuset"):
                for setting in ("cpuset.cpus", "cpuset.mems"):
                    files.write(f"{directory}/nested/{setting}", files.read(f"{directory}/{setting}"))
            joins.append(f"{directory}/nested/{name}")
        program = Program(tuple(joins), code)
        self.programs.append(program)
        return program

    def oom_kills(self, path: str) -> int:
        file = self.cgroups.memory_events(path)
        assert file
        return files.oom_kills(file)


def wait_until_dead(pids: Iterable[int]) -> None:
    """Wait for processes that are about to end; their exit, and not their reaping, takes them out of their cgroup."""
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended = select.select([pidfd], [], [], DEADLINE_S)[0]
        os.close(pidfd)
        assert ended


@pytest.fixture(params=["cgroupfs", "systemd"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "systemd":
        requires.need("systemd", "cgroup2")
    cgroups = detect(driver=request.param)
    root = f"crib-test-{secrets.token_hex(6)}"
    made = Place(cgroups, f"/{root}" if request.param == "cgroupfs" else f"{root.replace('-', '')}.slice")
    yield made
    for program in made.programs:
        program.end()
    cgroups.kill(made.parent)
    wait_until_dead(cgroups.procs(made.parent))
    assert cgroups.remove(made.parent)


@pytest.fixture
def needs_controller(place: Place) -> Callable[[str], None]:
    """Skips the test where no such controller can be limited."""

    def check(name: str) -> None:
        if name not in place.cgroups.controllers:
            pytest.skip(f"no {name} controller here")

    return check

"""Mount targets in a volume whose owner exchanges a directory and a link to the host while containers start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.engine import Pod
from runtime.errors import StepFailed
from runtime.spec import Mount
from tests.requires import requires
from tests.runtime.conftest import Bench, container
from tests.security import weak
from tests.security.conftest import Weaken, bind, python
from tests.security.defects import attack
from tests.security.watch import until

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]

STARTS = 40
SOURCES = ("file", "new", "volume")  # what is mounted on a file and a directory to be made, and on one that is there
EXCHANGE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
first = True
while libc.renameat2(-100, b"/shared/target", -100, b"/shared/other", 2) == 0:  # RENAME_EXCHANGE
    if first:
        first = open("/shared/begun", "x") and False
raise OSError(ctypes.get_errno(), "renameat2")
"""


class Race:
    """A container that exchanges `target`, a directory of a shared volume, for a link to a directory of the host's
    without end, and others that start meanwhile, with mounts on it and below."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        self._bench = bench
        self._directory = directory
        self.outside = directory / "outside"
        self._shared = directory / "shared"
        self.started = 0
        self.lost: set[str] = set()
        """The mounts that were made but aren't in the container: they went where the link leads on the host."""
        self.at_directory = self.at_link = 0
        """How many starts found `target` to be what when they mounted on it."""

    async def begin(self) -> Pod:
        for path in (self.outside, self._shared / "target", self._directory / "new", self._directory / "volume"):
            path.mkdir(parents=True)
        (self._directory / "file").touch()
        (self._shared / "other").symlink_to(self.outside)
        pod = await self._bench.pod()
        interpreter, mounts = python()
        command = (interpreter, "-I", "-S", "-c", EXCHANGE)
        await self._bench.start(
            pod, "attacker", container(pod, *command, mounts=(*mounts, bind(self._shared, "/shared")))
        )
        await until((self._shared / "begun").exists)
        return pod

    async def start(self, pod: Pod) -> None:
        """Start one container in the midst of it."""
        self.started += 1
        targets = (f"target/file{self.started}", f"target/new{self.started}", "target")
        mounts = [bind(self._directory / source, f"/shared/{at}") for source, at in zip(SOURCES, targets, strict=True)]
        # Inside, there is a directory where the link leads: mounts go there as readily as to the other one.
        inside = Mount(destination=str(self.outside), type="tmpfs", source="tmpfs")
        spec = container(pod, "cat", "/proc/self/mountinfo", mounts=(inside, bind(self._shared, "/shared"), *mounts))
        try:
            _, log = await self._bench.run(pod, f"c{self.started}", spec)
        except StepFailed:
            return  # `target` was the one thing and then the other within one step, which may say so
        found = {fields[3]: fields[4] for fields in map(str.split, log.splitlines())}
        at = {source: point for path, point in found.items() for source in SOURCES if path.endswith(f"/{source}")}
        self.lost |= set(SOURCES) - set(at)
        if "volume" in at:
            self.at_link += at["volume"] == str(self.outside)
            self.at_directory += at["volume"] in ("/shared/target", "/shared/other")

    @property
    def made_outside(self) -> list[str]:
        return sorted(os.listdir(self.outside))


@attack(
    "CVE-2021-30465", "CVE-2024-45310",
    sentence="A container exchanges a directory of a shared volume and a link to the host (RENAME_EXCHANGE, without "
    "end) while others start that mount on it and below, so that mounts land and files and directories are made there",
    guard="every look-up is an openat2 with RESOLVE_IN_ROOT; what is made is made in, and mounted on, a descriptor",
    control="test_30465_control_resolved_as_a_string",
)  # fmt: skip
async def test_cve_2021_30465_and_2024_45310_races(bench: Bench, tmp_path: Path) -> None:
    race = Race(bench, tmp_path)
    pod = await race.begin()
    while race.started < STARTS:
        await race.start(pod)
        assert race.made_outside == []
        assert race.lost == set()
    assert str(race.outside) not in Path("/proc/self/mountinfo").read_text()
    assert race.at_directory and race.at_link  # both were met, so there was a race


async def test_30465_control_resolved_as_a_string(weaken: Weaken, tmp_path: Path) -> None:
    race = Race(await weaken(weak.RESOLVED_AS_A_STRING), tmp_path)
    pod = await race.begin()
    while race.started < 4 * STARTS and not (race.lost and race.made_outside):
        await race.start(pod)
    assert race.lost
    assert race.made_outside

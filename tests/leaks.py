"""What a root test could leave behind: a snapshot of the machine, and the difference of two."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import enclosure
from tests.limits import scaled

# How long the kernel may take: a link goes some time after the last reference to its namespace, a cgroup's last
# process is reaped after it was killed.
SETTLE_S = scaled(10)

# Where files of crib's could turn up outside of the directories that a test gives it. Tests have /run/netns to
# themselves (see enclosure); the defaults of cribd are not theirs to use.
WATCHED = ("/run/netns/*", "/run/crib", "/var/lib/crib", "/dev/shm/*crib*", "/dev/mqueue/*crib*")


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything counted, each by a text that names it."""

    processes: frozenset[str]
    mounts: frozenset[str]
    links: frozenset[str]
    tables: frozenset[str]
    cgroups: frozenset[str]
    files: frozenset[str]

    @classmethod
    def now(cls) -> Machine:
        return cls(
            processes=frozenset(_named_processes()),
            mounts=frozenset(_mounts()),
            links=frozenset(name for _, name in socket.if_nameindex()),
            tables=frozenset(_tables()),
            cgroups=frozenset(_cgroups()),
            files=frozenset(_files()),
        )


def left_since(before: Machine, settle_s: float = SETTLE_S) -> list[str]:
    """What is there and wasn't `before`, once the kernel has had its time to let go."""
    deadline = time.monotonic() + settle_s
    while (left := _difference(before, Machine.now())) and time.monotonic() < deadline:
        time.sleep(0.02)  # noqa: TID251 - these states have no event to wait for
    return left


def _difference(before: Machine, after: Machine) -> list[str]:
    # A process is the same one whatever has become of its state and command line.
    known = {text.split()[0] for text in before.processes}
    known |= {f"{pid}'s" for pid in known}
    left = [f"process {text}" for text in sorted(after.processes) if text.split()[0] not in known]
    left += [f"mount {text}" for text in sorted(after.mounts - before.mounts)]
    left += [f"network interface {name}" for name in sorted(after.links - before.links)]
    left += [f"nft {name}" for name in sorted(after.tables - before.tables)]
    left += [f"cgroup {path}" for path in _ours(after.cgroups - before.cgroups)]
    left += [f"file {path}" for path in sorted(after.files - before.files)]
    return left


def _named_processes() -> Iterator[str]:
    for pid, text in enclosure.descendants().items():
        if text.endswith(" crib-spare"):  # a zygote's, which makes and replaces it as it finds the time: part of it
            try:
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield f"{parent}'s spare, {pid} {text}"
        else:
            yield f"{pid} {text}"


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        number, _, _, root, point = fields.split()[:5]
        kind, source = rest.split()[:2]
        yield f"{point} ({kind} {source} {root}, id {number})"


def _tables() -> list[str]:
    if not shutil.which("nft"):
        return []
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout.splitlines()


def _cgroups() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split()[0] in ("cgroup", "cgroup2"):
            for path, directories, _ in os.walk(fields.split()[4]):
                yield from (f"{path}/{name}" for name in directories)


def _ours(paths: frozenset[str]) -> list[str]:
    """The topmost of new cgroups, less those that someone else's processes are in (cgroups are the host's)."""
    own = enclosure.descendants().keys() | {os.getpid()}
    ours = []
    for path in sorted(paths):
        if os.path.dirname(path) not in paths and _processes(path) <= own:
            ours.append(path)
    return ours


def _processes(cgroup: str) -> set[int]:
    found: set[int] = set()
    for path, _, _ in os.walk(cgroup):
        try:
            found.update(int(pid) for pid in Path(path, "cgroup.procs").read_text().split())
        except OSError:  # gone meanwhile, or threaded
            continue
    return found


def _files() -> Iterator[str]:
    for pattern in (*WATCHED, f"/run/crib-test-{os.getpid()}-*"):
        yield from glob.glob(pattern)

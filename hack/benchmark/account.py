"""What a runtime's processes cost: CPU by cgroup accounting, memory by Pss and page tables.

CPU. A runtime's work is spread over a daemon, helpers that live as long as a pod (shims, monitors) and programs that
live for milliseconds (an OCI runtime, CNI plugins), so sampling processes misses most of it and `times` of a process
tree misses what was reparented. A cgroup's counter misses nothing: it holds what ended processes used. The cgroups read
are the one that the pods run in (asked for by the benchmark) and those of the daemon and its helpers. Where these
share theirs with strangers (a daemon started from a shell), they are moved to a cgroup of the benchmark's own for the
run and back after it; children follow. What the kernel does on a runtime's behalf in its own threads (tearing down
network namespaces) belongs to no cgroup: the system-wide figure of /proc/stat over the same cycles shows it, together
with the benchmark's own client and whatever else ran.

Memory. Pss shares each page among those that map it, so that forked or identical helpers are counted fairly; page
tables are private to each. Counted are the daemon's helpers: its descendants, and the ancestors of the pods' processes.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from hack.benchmark.client import SLEEP

_CGROUP = Path("/sys/fs/cgroup")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def unified() -> bool:
    return (_CGROUP / "cgroup.controllers").exists()


def _root() -> Path:
    return _CGROUP if unified() else _CGROUP / "cpuacct"


def _cgroup_of(pid: int) -> Path:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (controllers == "") if unified() else ("cpuacct" in controllers.split(",")):
            return _root() / path.lstrip("/")
    raise FileNotFoundError(f"process {pid} has no cgroup that accounts CPU time")


def _own_procs(cgroup: Path) -> list[int]:
    try:
        return [int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()]
    except OSError:  # removed meanwhile
        return []


def procs(cgroup: Path) -> set[int]:
    """The processes in a cgroup and below it."""
    return {pid for directory, _, _ in os.walk(cgroup) for pid in _own_procs(Path(directory))}


def _usage_s(cgroup: Path) -> float:
    if unified():
        fields = dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6
    return int((cgroup / "cpuacct.usage").read_text()) / 1e9


def system_cpu_s() -> float:
    """CPU time of the whole machine but idle, waiting and stolen time."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) * _TICK_S


def _parents() -> dict[int, int]:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    return parents


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    chain = []
    while (pid := parents.get(pid, 0)) > 1:
        chain.append(pid)
    return chain


def helpers(daemon: int, pods: set[int]) -> set[int]:
    """The processes that a runtime keeps besides its daemon and the pods' own."""
    parents = _parents()
    strangers = {*_ancestors(daemon, parents), *_ancestors(os.getpid(), parents), os.getpid(), daemon}
    found = {pid for pid in parents if daemon in _ancestors(pid, parents)}
    for pid in pods:
        found.update(_ancestors(pid, parents))
    return found - strangers - pods


def memory_bytes(pid: int) -> int:
    """Pss and page tables of a process; 0 when it has ended."""
    total = 0
    try:
        for name in ("smaps_rollup", "status"):
            for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
                if line.startswith(("Pss:", "VmPTE:")):
                    total += int(line.split()[1]) << 10
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return total


def is_workload(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1] == [word.encode() for word in SLEEP]
    except OSError:
        return False


@dataclass(slots=True)
class Adopted:
    """A context manager: a daemon with its children is in a cgroup of the benchmark's own, and back afterwards."""

    name: str
    daemon: int
    _moved: dict[int, Path] = field(default_factory=dict)

    @property
    def _cgroup(self) -> Path:
        return _root() / f"bench-pulls-{self.name}"

    def __enter__(self) -> Adopted:
        self._cgroup.mkdir(exist_ok=True)
        home = _cgroup_of(self.daemon)
        for pid in helpers(self.daemon, set()) | {self.daemon}:
            if _cgroup_of(pid) == home:
                self._moved[pid] = home
                (self._cgroup / "cgroup.procs").write_text(str(pid))
        return self

    def cpu_s(self) -> float:
        return _usage_s(self._cgroup)

    def __exit__(self, *ignored: object) -> None:
        for pid in _own_procs(self._cgroup):
            with contextlib.suppress(OSError):
                (self._moved.get(pid, self._moved[self.daemon]) / "cgroup.procs").write_text(str(pid))
        with contextlib.suppress(OSError):
            self._cgroup.rmdir()


@dataclass(slots=True)
class Account:
    """The CPU meter of one runtime. `attach` needs a pod of it running; `release` puts back what was moved."""

    name: str
    daemon: int
    systemd: bool
    _cgroups: list[Path] = field(default_factory=list)
    _moved: dict[int, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the pods' parent, as a kubelet does: what ended pods used is counted there after they are gone."""
        if not self.systemd:
            self._pods.mkdir(exist_ok=True)

    @property
    def pod_parent(self) -> str:
        """The cgroup_parent to ask for."""
        if self.systemd:
            return f"cribbench_{self.name.replace('-', '_')}.slice"
        return f"/crib-bench-{self.name}"

    @property
    def _pods(self) -> Path:
        return _root() / self.pod_parent.lstrip("/")

    @property
    def _adopted(self) -> Path:
        return _root() / f"crib-bench-daemon-{self.name}"

    def pods(self) -> set[int]:
        return procs(self._pods)

    def helpers(self) -> set[int]:
        return helpers(self.daemon, self.pods())

    def attach(self) -> None:
        pods = self.pods()
        if not pods:
            raise RuntimeError(f"{self.name}: no process in cgroup {self._pods}: cgroup_parent was not honoured")
        family = helpers(self.daemon, pods) | {self.daemon}
        cgroups = {_cgroup_of(pid) for pid in family}
        for shared in {cgroup for cgroup in cgroups if cgroup == _root() or procs(cgroup) - family - pods}:
            self._adopted.mkdir(exist_ok=True)
            for pid in family.intersection(_own_procs(shared)):
                self._moved[pid] = shared
                (self._adopted / "cgroup.procs").write_text(str(pid))
            cgroups.remove(shared)
            cgroups.add(self._adopted)
        cgroups.add(self._pods)
        self._cgroups = sorted(c for c in cgroups if not cgroups.intersection(c.parents))

    def cpu_s(self) -> float:
        return sum(_usage_s(cgroup) for cgroup in self._cgroups)

    def describe(self) -> list[str]:
        return [f"/{cgroup.relative_to(_root())}" for cgroup in self._cgroups]

    def release(self) -> None:
        """Put moved processes (and what they started since) back, and remove the benchmark's own cgroups."""
        back = next(iter(self._moved.values()), _root())
        for pid in _own_procs(self._adopted):
            with contextlib.suppress(OSError):
                (self._moved.get(pid, back) / "cgroup.procs").write_text(str(pid))
        hierarchies = [_CGROUP] if unified() else [path for path in _CGROUP.iterdir() if path.is_dir()]
        for name in (self.pod_parent.lstrip("/"), self._adopted.name):
            for hierarchy in hierarchies:
                for directory, _, _ in os.walk(hierarchy / name, topdown=False):
                    with contextlib.suppress(OSError):  # in use still: systemd's, or a leak that the caller will see
                        os.rmdir(directory)

"""What a cgroup backend offers, whichever the host's hierarchy and whoever manages it.

A `path` is absolute below the hierarchy's root as this process sees it ("/kubepods/pod1/<id>"). Every method raises
InvalidSpec for a malformed path and NotFound, where nothing else is said, for a cgroup that isn't there.
"""

from dataclasses import dataclass
from typing import Protocol

from runtime.cgroup.stats import Stats
from runtime.spec import Resources


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of what a container sees under /sys/fs/cgroup; to be mounted inside the container's cgroup namespace.

    `target` is relative to /sys/fs/cgroup: "" is that directory itself. Where it isn't, the directory is a tmpfs and
    holds `links` (names of symlinks to `target`) as well. `directory` is the container's own cgroup on the host, for a
    container that keeps the host's cgroup namespace and gets it bound instead.
    """

    target: str
    fstype: str
    source: str
    data: str
    links: tuple[str, ...]
    directory: str


class Cgroups(Protocol):
    """Makes, changes, watches and removes the cgroups of pods and containers. Thread-safe; caches nothing by path."""

    version: int
    driver: str
    controllers: frozenset[str]
    """The controllers that can be limited here, by their v2 names on v2 and v1 names on v1."""

    def join_path(self, parent: str, *names: str) -> str:
        """The path of the cgroup `names` below the `parent` that a request gave (a slice's name with systemd).

        Raises InvalidSpec for a parent that isn't of this driver's kind.
        """

    def default_parent(self, instance: str) -> str:
        """The parent, as `join_path` takes it, of pods whose request gives none."""

    def create(self, path: str, resources: Resources | None) -> tuple[str, ...]:
        """Make the cgroup, its missing parents too, and set its limits: all of it or nothing.

        Returns the paths that did not exist before, outermost first. An empty cgroup that is there already is taken
        over and thawed. Raises InvalidSpec for a limit that is malformed, that the kernel refuses or has no controller
        for; WrongState where the cgroup or its parent holds processes that are in the way; Unavailable or Exhausted
        where the kernel can't make one.
        """

    def update(self, path: str, resources: Resources) -> None:
        """Set the limits that are given and leave the others: all of them or none. Raises as `create`."""

    def join_files(self, path: str) -> tuple[str, ...]:
        """The files that a process writes "0" to in order to move itself into the cgroup."""

    def clone_dir(self, path: str) -> str | None:
        """The directory for clone3's CLONE_INTO_CGROUP; None where a process has to join by itself."""

    def memory_events(self, path: str) -> str | None:
        """The file with a line "oom_kill N" about the cgroup, readable after its last process is gone."""

    def kill(self, path: str) -> None:
        """SIGKILL for every process in it and below, frozen or not; a missing cgroup is fine.

        Raises DeadlineExceeded when new processes keep appearing (v1).
        """

    def procs(self, path: str) -> tuple[int, ...]:
        """The processes in it and below; none where it's missing."""

    def freeze(self, path: str) -> None:
        """Stop every process in it and below; waits until they are. Raises DeadlineExceeded, then nothing is frozen."""

    def thaw(self, path: str) -> None:
        """Undo `freeze`."""

    def exists(self, path: str) -> bool:
        """Whether there is anything left of the cgroup."""

    def remove(self, path: str) -> bool:
        """Remove it and all below; False while a process is in it. Kills nothing."""

    def stats(self, path: str) -> Stats:
        """What it uses and has used."""

    def mounts_in_container(self, path: str) -> tuple[Mount, ...]:
        """What /sys/fs/cgroup in a container consists of, in this order."""

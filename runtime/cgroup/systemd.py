"""cgroup v2 under systemd: it makes the cgroups and knows their limits, the rest is as without it.

A container is a slice of its own. A scope would go when its last process ends, before anyone can read memory.events,
and could not be there before its first process is: a slice stays until it is stopped, takes its process by
CLONE_INTO_CGROUP (a scope's is moved by systemd, at the cost of an RCU grace period), and needs no process to begin
with. runc runs containers in slices, too. What systemd has been told is repeated by it now and then (after a
daemon-reload, or when a sibling starts), so every limit that it has a property for is set as one; what it has none for
and writes all the same (memory.oom.group, which the kubelet sets) is written again when that happens.

The price: systemd delegates scopes and services, no slices. Cgroups that a container makes below its own can lose
their controllers when the container's limits are changed.
"""

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Any, Final

from runtime.cgroup import devices, files, tree, units
from runtime.cgroup.dbus import Connection, Refused
from runtime.cgroup.guard import Guard
from runtime.cgroup.v2 import V2, controllers_of, writes
from runtime.cgroup.writes import Write, carry_out, carry_out_or_revert, revert
from runtime.errors import CribError, InvalidSpec, NotFound, Unavailable, WrongState
from runtime.spec import Resources

# Has systemd enable the controllers, for figures and for limits that come later.
_ALWAYS: Final[dict[str, tuple[str, Any]]] = {
    "CPUAccounting": ("b", True),
    "CPUWeight": ("t", 100),
    "IOAccounting": ("b", True),
    "MemoryAccounting": ("b", True),
    "TasksAccounting": ("b", True),
}
# Files that systemd writes with every other change, and has no exact property for.
_REWRITTEN: Final = ("cpu.idle", "cpu.max", "memory.oom.group", "memory.zswap.max", "memory.zswap.writeback")
_STOPPED: Final = ("NoSuchUnit", "LoadFailed")


class Systemd(V2):
    """The systemd driver on v2; see `Cgroups`."""

    driver = "systemd"

    def __init__(self, root: str) -> None:
        super().__init__(root)
        # systemd enables what its properties ask for, and disables the rest again: that moves every process below.
        self._always = frozenset()
        self._guard = Guard()
        self._guard.resume(root)

    def join_path(self, parent: str, *names: str) -> str:
        return units.slice_below(parent, names)

    def default_parent(self, instance: str) -> str:
        return f"{instance.replace('-', '_')}.slice"  # a dash would put it into another slice

    def create(self, path: str, resources: Resources | None) -> tuple[str, ...]:
        name = units.slice_name(tree.checked(path))
        resources = resources or Resources()
        limits = self._available(writes(resources))
        policy = devices.policy(resources.devices)
        made = [above for above in tree.lineage(path) if not self.exists(above)]
        with ExitStack() as rollback:
            for above in made:
                rollback.callback(self._undo, above)  # innermost first
            self._start(name, path, limits)
            self._hand_down(path, controllers_of(limits))
            carry_out(path, lambda _: self._root + path, limits)
            if not policy.open:
                self._programs.attach(self._root + path, policy)
            rollback.pop_all()
        self._guard.keep(self._root + path, _rewritten(limits))
        return tuple(made)

    def update(self, path: str, resources: Resources) -> None:
        name = units.slice_name(tree.checked(path))
        directory = self._directory(path)
        limits = self._available(writes(self._completed(path, resources)))
        policy = devices.policy(resources.devices) if resources.devices else None
        self._hand_down(path, controllers_of(limits))
        guarded = _rewritten(limits)
        self._guard.release(directory, guarded)
        try:
            # The kernel judges first; systemd takes what it's told and would only log a refusal.
            undo = carry_out_or_revert(path, lambda _: directory, limits)
            try:
                self._tell(name, path, limits)
                if policy is not None:
                    self._programs.attach(directory, policy)
            except CribError:
                revert(lambda _: directory, undo)
                with suppress(CribError):
                    self._tell(name, path, undo)
                raise
        finally:
            self._guard.keep(directory, guarded)

    def remove(self, path: str) -> bool:
        name = units.slice_name(tree.checked(path))
        directory = self._root + path
        if files.procs(directory):
            return False
        self._stop(name)  # and those below with it
        return tree.remove(directory)

    def _start(self, name: str, path: str, limits: tuple[Write, ...]) -> None:
        """Have the slice started with its limits; one that is there, and empty, is taken over."""
        properties = [("Description", ("s", "crib")), *(_ALWAYS | dict(units.properties(limits))).items()]
        try:
            with Connection() as systemd:
                result = systemd.job("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "replace", properties, [])
        except Refused as refusal:
            if refusal.name != "UnitExists":
                raise InvalidSpec(f"cgroup {path}: systemd refuses slice {name}: {refusal}") from refusal
            self._start_again(name, path, limits)
            return
        if result != "done":
            raise Unavailable(f"cgroup {path}: systemd could not start slice {name}: {result}")

    def _start_again(self, name: str, path: str, limits: tuple[Write, ...]) -> None:
        """A slice of that name is loaded: left by an earlier run, started as another's parent, or stopped just now."""
        try:
            with Connection() as systemd:
                result = systemd.job("StartUnit", "ss", name, "fail")
        except Refused as refusal:
            raise Unavailable(f"cgroup {path}: systemd refuses slice {name}: {refusal}") from refusal
        if result != "done":
            raise Unavailable(f"cgroup {path}: systemd could not start slice {name}: {result}")
        try:
            if files.procs(self._root + path):
                raise WrongState(f"cgroup {path} exists and holds processes")
            for below in list(files.tree(self._root + path))[1:]:
                if below.endswith(".slice"):
                    self._stop(below.rpartition("/")[2])
            self._take_over(path)
        except OSError as error:
            raise tree.explain(error, path) from error
        self._tell(name, path, limits)

    def _tell(self, name: str, path: str, limits: tuple[Write, ...]) -> None:
        """Set the limits as properties of a running slice, until it is stopped."""
        properties = list(units.properties(limits))
        if not properties:
            return
        quota = self._quota(path)
        try:
            with Connection() as systemd:
                systemd.call("SetUnitProperties", "sba(sv)", name, True, properties)
                # systemd now writes all files by itself, and knows the quota in whole percents only.
                systemd.settle()
        except Refused as refusal:
            if refusal.name in _STOPPED:
                raise NotFound(f"cgroup {path}: systemd has no slice {name}") from refusal
            raise InvalidSpec(f"cgroup {path}: systemd refuses limits of slice {name}: {refusal}") from refusal
        carry_out(path, lambda _: self._root + path, quota)

    def _quota(self, path: str) -> tuple[Write, ...]:
        """What sets cpu.max as it is now."""
        try:
            held = files.read(f"{self._root}{path}/cpu.max").strip()
        except OSError:
            return ()
        return (Write("cpu", "cpu.max", (held,), "cpu.quota and cpu.period", held, tolerant=True),)

    def _stop(self, name: str) -> None:
        try:
            with Connection() as systemd:
                systemd.job("StopUnit", "ss", name, "replace")
        except Refused as refusal:
            if refusal.name not in _STOPPED:
                raise Unavailable(f"systemd refuses to stop slice {name}: {refusal}") from refusal

    def _undo(self, path: str) -> None:
        """Take back a slice that was made, unless others have begun to use it. An empty one does no harm."""
        directory = self._root + path
        if list(files.tree(directory)) == [directory]:
            with suppress(CribError):
                self.remove(path)


def _rewritten(limits: Iterable[Write]) -> tuple[str, ...]:
    return tuple(write.file for write in limits if write.file in _REWRITTEN)

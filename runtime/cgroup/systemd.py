"""cgroup v2 under systemd: the slices are systemd's, and what is below them is crib's alone.

A container is a plain cgroup in its pod's slice, as with cgroupfs. systemd neither writes to it nor ends it: its
figures outlive its last process (a scope goes with that, and memory.events before anybody has read it), its limits and
its device program outlive any daemon-reload, and so do cgroups that it makes below its own. What systemd would do is
take the controllers from a slice in which no unit needs them. So in a slice that holds such cgroups there is a slice
more, with nothing in it, that needs them all: the keeper. It comes with the first of them and goes with the last.

systemd would rather have what others manage below a unit with Delegate=, but delegates only scopes and services, which
live as long as their processes do; and a pod's slice is the kubelet's.
"""

import os
from contextlib import ExitStack, suppress
from threading import Lock
from typing import Any, Final

from runtime.cgroup import files, tree, units
from runtime.cgroup.dbus import Connection, Refused
from runtime.cgroup.v2 import V2
from runtime.errors import CribError, InvalidSpec, Unavailable
from runtime.spec import Resources

_PLAIN: Final[list[tuple[str, tuple[str, Any]]]] = [("Description", ("s", "crib"))]
# Each needs a controller. What systemd doesn't know of, such as hugetlb, it leaves alone.
_KEEPER: Final[list[tuple[str, tuple[str, Any]]]] = [
    ("Description", ("s", "keeps controllers enabled for crib's containers")),
    ("CPUWeight", ("t", 100)),
    ("AllowedCPUs", ("ay", b"\x01")),
    ("CPUAccounting", ("b", True)),
    ("IOAccounting", ("b", True)),
    ("MemoryAccounting", ("b", True)),
    ("TasksAccounting", ("b", True)),
]
_STOPPED: Final = ("NoSuchUnit", "LoadFailed")
_LOCKS: Final = 16


class Systemd(V2):
    """The systemd driver on v2; see `Cgroups`. A slice itself gets no limits: they are its owner's."""

    driver = "systemd"

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._locks = tuple(Lock() for _ in range(_LOCKS))

    def join_path(self, parent: str, *names: str) -> str:
        return tree.checked(units.below(parent, names))

    def default_parent(self, instance: str) -> str:
        return f"{instance.replace('-', '_')}.slice"  # a dash would put it into another slice

    def create(self, path: str, resources: Resources | None) -> tuple[str, ...]:
        path = tree.checked(path)
        name, slice_path = units.split(path)
        made = [above for above in tree.lineage(slice_path) if not self.exists(above)]
        with self._lock(name), ExitStack() as rollback:
            for above in made:
                rollback.callback(self._undo, above)  # innermost first
            if path != slice_path:
                rollback.callback(self._try_release, name, slice_path)
                if not self.exists(self._keeper(name)):
                    _start(units.keeper(name), _KEEPER)
                made += super().create(path, resources)
            elif resources is not None:
                raise InvalidSpec(f"cgroup {path}: the limits of a slice are its owner's")
            else:
                _start(name, _PLAIN)
            rollback.pop_all()
        return tuple(made)

    def update(self, path: str, resources: Resources) -> None:
        if units.split(path)[1] == path:
            raise InvalidSpec(f"cgroup {path}: the limits of a slice are its owner's")
        super().update(path, resources)

    def remove(self, path: str) -> bool:
        path = tree.checked(path)
        name, slice_path = units.split(path)
        if path == slice_path:
            if files.procs(self._root + path):
                return False
            _stop(name)  # and those below with it
            return super().remove(path)
        gone = super().remove(path)
        if gone:
            with self._lock(name):
                self._release(name, slice_path)
        return gone

    def _keeper(self, name: str) -> str:
        return units.slice_path(units.keeper(name))

    def _lock(self, name: str) -> Lock:
        return self._locks[hash(name) % _LOCKS]

    def _release(self, name: str, slice_path: str) -> None:
        """Stop the keeper of a slice that holds no cgroup of crib's any more."""
        if not self.exists(self._keeper(name)):
            return
        with suppress(FileNotFoundError), os.scandir(self._root + slice_path) as entries:
            if any(entry.is_dir(follow_symlinks=False) and not entry.name.endswith(".slice") for entry in entries):
                return
        _stop(units.keeper(name))

    def _try_release(self, name: str, slice_path: str) -> None:
        with suppress(CribError):
            self._release(name, slice_path)

    def _undo(self, path: str) -> None:
        """Take back a slice that was made, unless others have begun to use it. An empty one does no harm."""
        directory = self._root + path
        if list(files.tree(directory)) == [directory]:
            with suppress(CribError):
                self.remove(path)


def _start(name: str, properties: list[tuple[str, tuple[str, Any]]]) -> None:
    """Have a slice started, with those it is in; one that is there already gets the properties."""
    try:
        with Connection() as systemd:
            try:
                result = systemd.job("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "replace", properties, [])
            except Refused as refusal:
                if refusal.name != "UnitExists":
                    raise
                # Loaded: left by an earlier run, started as another's parent, or stopped just now.
                result = systemd.job("StartUnit", "ss", name, "fail")
                systemd.call("SetUnitProperties", "sba(sv)", name, True, properties[1:])
    except Refused as refusal:
        raise Unavailable(f"systemd refuses slice {name}: {refusal}") from refusal
    if result != "done":
        raise Unavailable(f"systemd could not start slice {name}: {result}")


def _stop(name: str) -> None:
    try:
        with Connection() as systemd:
            systemd.job("StopUnit", "ss", name, "replace")
    except Refused as refusal:
        if refusal.name not in _STOPPED:
            raise Unavailable(f"systemd refuses to stop slice {name}: {refusal}") from refusal

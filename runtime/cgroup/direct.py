"""What both versions have in common: cgroups are directories, and crib writes their files itself."""

import os
from abc import ABC, abstractmethod
from typing import Final

from runtime.cgroup import devices, files, tree
from runtime.cgroup.writes import Write, carry_out_or_revert, check_numbers, missing, revert
from runtime.errors import CribError, DeadlineExceeded, NotFound, WrongState
from runtime.spec import Resources

_FREEZE_TIMEOUT_S: Final = 5.0


class Direct(ABC):
    """The cgroupfs driver of one version; see `runtime.cgroup.interface.Cgroups`."""

    driver = "cgroupfs"
    controllers: frozenset[str]

    @abstractmethod
    def _directory(self, path: str, controller: str = "") -> str:
        """The cgroup's directory where `controller` is; without one, where its processes are told."""

    @abstractmethod
    def _changes(self, path: str, resources: Resources) -> tuple[Write, ...]:
        """What an update writes, in this order. Raises CribError for what can't be, before anything is changed."""

    @abstractmethod
    def _set_devices(self, path: str, policy: devices.Policy, fresh: bool) -> None:
        """Make `policy` that of the cgroup, in which all was allowed so far if it's `fresh`. Raises CribError."""

    @abstractmethod
    def _set_frozen(self, path: str, frozen: bool, timeout_s: float) -> bool:
        """Freeze or thaw; whether it is so in time. Raises OSError, CribError."""

    def join_path(self, parent: str, *names: str) -> str:
        return tree.below(parent, *names)

    def default_parent(self, instance: str) -> str:
        return f"/{instance}"

    def update(self, path: str, resources: Resources) -> None:
        path = tree.checked(path)
        if not os.path.isdir(self._directory(path)):
            raise NotFound(f"cgroup {path} does not exist")
        policy = devices.policy(resources.devices) if resources.devices else None
        directory = lambda controller: self._directory(path, controller)  # noqa: E731
        undo = carry_out_or_revert(path, directory, self._changes(path, resources))
        try:
            if policy is not None:
                self._set_devices(path, policy, fresh=False)
        except CribError:
            revert(directory, undo)
            raise

    def kill(self, path: str) -> None:
        try:
            files.kill((self._directory(tree.checked(path)),))
        except TimeoutError as error:
            raise DeadlineExceeded(str(error)) from error
        except OSError as error:
            raise tree.explain(error, path) from error

    def procs(self, path: str) -> tuple[int, ...]:
        return tuple(files.procs(self._directory(tree.checked(path))))

    def freeze(self, path: str) -> None:
        self._freezer(tree.checked(path), True)

    def thaw(self, path: str) -> None:
        self._freezer(tree.checked(path), False)

    def _freezer(self, path: str, frozen: bool) -> None:
        try:
            done = self._set_frozen(path, frozen, _FREEZE_TIMEOUT_S)
            if not done and frozen:
                self._set_frozen(path, False, 0)
        except OSError as error:
            raise tree.explain(error, path) from error
        if not done:
            state = "frozen" if frozen else "thawed"
            raise DeadlineExceeded(f"cgroup {path} is not {state} after {_FREEZE_TIMEOUT_S:g} s")

    def _available(self, limits: tuple[Write, ...]) -> tuple[Write, ...]:
        """The limits that have a controller here. Raises InvalidSpec for one that is asked for in vain."""
        for write in limits:
            if write.controller not in self.controllers and not write.tolerant:
                raise missing(write)
            if write.controller == "cpuset":
                check_numbers(write)
        return tuple(write for write in limits if write.controller in self.controllers)

    def _empty(self, directory: str, path: str) -> None:
        """Make ready for another use: a cgroup that is there already must hold no processes. Raises OSError."""
        if files.procs(directory):
            raise WrongState(f"cgroup {path} exists and holds processes")
        tree.remove_nested(directory)

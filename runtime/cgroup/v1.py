"""cgroup v1: one hierarchy per controller (or per few that are mounted together), each with its own directory.

The kernel's documentation: Documentation/admin-guide/cgroup-v1.
"""

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from msgspec import structs

from runtime.cgroup import devices, files, tree
from runtime.cgroup.direct import Direct
from runtime.cgroup.interface import Mount
from runtime.cgroup.stats import Stats, read_v1
from runtime.cgroup.writes import (
    Write,
    carry_out,
    fits,
    limit,
    page_size,
    positive,
    refuse_decrease,
)
from runtime.errors import InvalidSpec, Unavailable
from runtime.spec import BlockIO, Memory, Resources

_MEMSW: Final = "memory.memsw.limit_in_bytes"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy: where, its controllers in the kernel's order, its name if it has one."""

    mount: str
    controllers: tuple[str, ...]
    name: str = ""


Translation = Callable[[Resources], tuple[Write, ...]]


def writes(resources: Resources) -> tuple[Write, ...]:
    """The limits of `resources` as file writes, without its devices. Raises InvalidSpec for a malformed one."""
    if resources.unified:
        raise InvalidSpec(f"unified {', '.join(sorted(resources.unified))}: this host has cgroup v1")
    found: list[Write] = []
    if cpu := resources.cpu:
        if cpu.shares:
            found.append(_one("cpu", "cpu.shares", "cpu.shares", positive("cpu.shares", cpu.shares)))
        if cpu.period:
            found.append(_one("cpu", "cpu.cfs_period_us", "cpu.period", positive("cpu.period", cpu.period)))
        if cpu.quota:
            found.append(_one("cpu", "cpu.cfs_quota_us", "cpu.quota", limit("cpu.quota", cpu.quota, 1)))
        for file, field, value in (
            ("cpu.cfs_burst_us", "cpu.burst", cpu.burst),
            ("cpu.rt_period_us", "cpu.realtimePeriod", cpu.realtime_period),
            ("cpu.rt_runtime_us", "cpu.realtimeRuntime", cpu.realtime_runtime),
            ("cpu.idle", "cpu.idle", cpu.idle),
        ):
            if value is not None:
                found.append(_one("cpu", file, field, value))
        for field, numbers in (("cpus", cpu.cpus), ("mems", cpu.mems)):
            if numbers:
                found.append(Write("cpuset", f"cpuset.{field}", (numbers,), f"cpu.{field}", numbers))
    if resources.memory:
        found += _memory(resources.memory)
    if resources.pids:
        value = limit("pids.limit", resources.pids.limit)
        found.append(Write("pids", "pids.max", (str(value) if value > 0 else "max",), "pids.limit", str(value)))
    if resources.block_io:
        found += _block_io(resources.block_io)
    for huge in resources.hugepage_limits:
        field, value = f"hugepage {page_size(huge.page_size)}", limit("hugepage limit", huge.limit)
        found += [
            replace(
                _one("hugetlb", f"hugetlb.{huge.page_size}.{file}", field, value),
                # Without the controller no huge page is limited to nothing, but the kubelet asks for it on such hosts,
                # too. The reservation files are newer (5.7).
                tolerant=file.startswith("rsvd") or not huge.limit,
            )
            for file in ("limit_in_bytes", "rsvd.limit_in_bytes")
        ]
    return tuple(found)


def _one(controller: str, file: str, field: str, value: int) -> Write:
    return Write(controller, file, (str(value),), field, str(value))


def _memory(memory: Memory) -> list[Write]:
    found = []
    if memory.limit:
        value = limit("memory.limit", memory.limit)
        found.append(_one("memory", "memory.limit_in_bytes", "memory.limit", value))
        if value == -1 and not memory.swap:
            found.append(replace(_one("memory", _MEMSW, "memory.swap", -1), tolerant=True))
    if memory.swap:
        value = limit("memory.swap", memory.swap)
        if value != -1 and memory.limit and not 0 < memory.limit <= value:
            raise InvalidSpec(f"memory.swap {value}: memory and swap together are below memory.limit {memory.limit}")
        # Swap as large as nothing, or as all, needs no accounting of it.
        found.append(replace(_one("memory", _MEMSW, "memory.swap", value), tolerant=value in (-1, memory.limit)))
    if memory.reservation:
        value = limit("memory.reservation", memory.reservation)
        found.append(_one("memory", "memory.soft_limit_in_bytes", "memory.reservation", value))
    if memory.swappiness is not None:
        found.append(_one("memory", "memory.swappiness", "memory.swappiness", memory.swappiness))
    if memory.disable_oom_killer:
        found.append(_one("memory", "memory.oom_control", "memory.disableOOMKiller", 1))
    return found


def _block_io(block_io: BlockIO) -> list[Write]:
    found = []
    if block_io.weight:
        found.append(_one("blkio", "blkio.bfq.weight", "blockIO.weight", block_io.weight))
    for weighted in block_io.weight_device:
        if weighted.weight:
            line = f"{weighted.major}:{weighted.minor} {weighted.weight}"
            found.append(Write("blkio", "blkio.bfq.weight_device", (line,), "blockIO.weightDevice", line))
    for what, throttles in (
        ("read_bps", block_io.throttle_read_bps_device),
        ("write_bps", block_io.throttle_write_bps_device),
        ("read_iops", block_io.throttle_read_iops_device),
        ("write_iops", block_io.throttle_write_iops_device),
    ):
        if throttles:
            lines = tuple(f"{throttle.major}:{throttle.minor} {throttle.rate}" for throttle in throttles)
            found.append(Write("blkio", f"blkio.throttle.{what}_device", lines, f"blockIO.{what}", ", ".join(lines)))
    return found


class V1(Direct):
    """cgroup v1. `root` is where the hierarchies are mounted side by side."""

    version = 1

    def __init__(self, root: str, hierarchies: tuple[Hierarchy, ...]) -> None:
        self.controllers = frozenset(controller for hierarchy in hierarchies for controller in hierarchy.controllers)
        self._root = root
        self._hierarchies = hierarchies
        self._mounts = {controller: h.mount for h in hierarchies for controller in h.controllers}
        # Any hierarchy tells what is in a cgroup; the freezer's is the one that killing goes by.
        self._procs_mount = self._mounts.get("freezer") or hierarchies[0].mount

    def create(self, path: str, resources: Resources | None) -> tuple[str, ...]:
        path = tree.checked(path)
        resources = resources or Resources()
        limits = self._available(writes(resources))
        policy = devices.policy(resources.devices)
        made: list[list[str]] = []
        with ExitStack() as rollback:
            for hierarchy in self._hierarchies:
                new = tree.make(hierarchy.mount, path)
                made.append(new)
                rollback.callback(tree.remove_made, hierarchy.mount, new)
                if path not in new:
                    self._take_over(hierarchy.mount, path)
                    limits = self._ordered(path, limits)
            self._fill_cpuset(path)
            carry_out(path, lambda controller: self._directory(path, controller), limits)
            self._set_devices(path, policy, fresh=True)
            rollback.pop_all()
        return tree.made_in_all(made)

    def join_files(self, path: str) -> tuple[str, ...]:
        # "tasks", not "cgroup.procs": for a process with one thread the kernel then skips a lock of the whole machine.
        path = tree.checked(path)
        return tuple(f"{hierarchy.mount}{path}/tasks" for hierarchy in self._hierarchies)

    def clone_dir(self, path: str) -> str | None:
        return None

    def memory_events(self, path: str) -> str | None:
        mount = self._mounts.get("memory")
        return mount and f"{mount}{tree.checked(path)}/memory.oom_control"

    def exists(self, path: str) -> bool:
        path = tree.checked(path)
        return any(os.path.isdir(hierarchy.mount + path) for hierarchy in self._hierarchies)

    def remove(self, path: str) -> bool:
        path = tree.checked(path)
        # Beside version 2 (hybrid), runc makes one of that version, too.
        mounts = (*(hierarchy.mount for hierarchy in self._hierarchies), f"{self._root}/unified")
        gone = [tree.remove(mount + path) for mount in mounts]
        return all(gone)

    def stats(self, path: str) -> Stats:
        path = tree.checked(path)
        return read_v1({controller: mount + path for controller, mount in self._mounts.items()})

    def mounts_in_container(self, path: str) -> tuple[Mount, ...]:
        path = tree.checked(path)
        mounts = []
        for hierarchy in self._hierarchies:
            target = os.path.relpath(hierarchy.mount, self._root)
            data = ",".join(hierarchy.controllers) if hierarchy.controllers else f"none,name={hierarchy.name}"
            links = tuple(controller for controller in hierarchy.controllers if controller != target)
            mounts.append(Mount(target, "cgroup", "cgroup", data, links, hierarchy.mount + path))
        return tuple(mounts)

    def _directory(self, path: str, controller: str = "") -> str:
        return (self._mounts[controller] if controller else self._procs_mount) + path

    def _changes(self, path: str, resources: Resources) -> tuple[Write, ...]:
        return self._ordered(path, self._available(writes(self._completed(path, resources))))

    def _take_over(self, mount: str, path: str) -> None:
        self._empty(mount + path, path)
        if mount == self._mounts.get("freezer"):
            self.thaw(path)

    def _fill_cpuset(self, path: str) -> None:
        """A new cpuset has no CPUs and no memory nodes, and takes no process: give it its parent's."""
        mount = self._mounts.get("cpuset")
        if mount is None:
            return
        try:
            for file in ("cpuset.cpus", "cpuset.mems"):
                _inherit(mount, path, file)
        except OSError as error:
            raise tree.explain(error, path) from error

    def _set_devices(self, path: str, policy: devices.Policy, fresh: bool) -> None:
        mount = self._mounts.get("devices")
        if mount is None:
            if not policy.open:
                raise InvalidSpec("device rules: this host has no devices controller")
            return
        if fresh and policy.open:
            return
        try:
            if fresh:
                lines = policy.v1_writes()
            else:
                lines = _device_changes(devices.parse_v1_list(files.read(f"{mount}{path}/devices.list")), policy)
            for file in dict.fromkeys(file for file, _ in lines):
                files.write(f"{mount}{path}/{file}", *(line for name, line in lines if name == file))
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EINVAL):
                raise InvalidSpec(
                    f"device rules: cgroup {path}'s parent doesn't allow them: {error.strerror}"
                ) from error
            raise tree.explain(error, path) from error

    def _set_frozen(self, path: str, frozen: bool, timeout_s: float) -> bool:
        if "freezer" not in self._mounts:
            raise Unavailable(f"cgroup {path}: this host has no freezer controller")
        return files.set_v1_freezer(self._directory(path, "freezer"), "FROZEN" if frozen else "THAWED", timeout_s)

    def _completed(self, path: str, resources: Resources) -> Resources:
        """The change with what it leaves out and the kernel's checks need. Raises InvalidSpec for memory below use."""
        memory = resources.memory
        if not memory or not memory.limit or "memory" not in self._mounts:
            return resources
        directory = self._mounts["memory"] + path
        if memory.swap and fits(memory.limit, f"{directory}/memory.usage_in_bytes"):
            return resources
        now = read_v1({"memory": directory})
        refuse_decrease(path, memory.limit, now.memory)
        if memory.limit > 0 and not memory.swap and now.swap and now.swap.limit is not None:
            # Memory and swap are limited together here: what the container may swap stays.
            memory = structs.replace(memory, swap=memory.limit + now.swap.limit)
        return structs.replace(resources, memory=memory)

    def _ordered(self, path: str, limits: tuple[Write, ...]) -> tuple[Write, ...]:
        """The writes in an order in which the kernel accepts each: no moment with memory above memory and swap,

        and none with more CPU than before and after.
        """
        by_file = {write.file: write for write in limits}
        pairs = (("memory.limit_in_bytes", _MEMSW), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        for first, second in pairs:
            if first not in by_file or second not in by_file:
                continue
            write = by_file[second]
            try:
                now = int(files.read(f"{self._mounts[write.controller]}{path}/{second}"))
            except OSError:
                continue
            raised = int(write.values[0]) > now or write.values[0] == "-1"
            by_file = _moved(by_file, second, first) if raised else _moved(by_file, first, second)
        return tuple(by_file.values())


def _moved(writes_by_file: dict[str, Write], first: str, second: str) -> dict[str, Write]:
    """The same with `first` right before `second`."""
    ordered = {}
    for file, write in writes_by_file.items():
        if file == second:
            ordered[first] = writes_by_file[first]
        if file != first:
            ordered[file] = write
    return ordered


def _inherit(mount: str, path: str, file: str) -> str:
    own = f"{mount}{path}/{file}"
    value = files.read(own).strip()
    if value or not path:
        return value
    value = _inherit(mount, path.rpartition("/")[0], file)
    files.write(own, value)
    return value


def _device_changes(now: devices.Policy, wanted: devices.Policy) -> tuple[tuple[str, str], ...]:
    """What turns the one policy into the other without a moment in which less is allowed than by both."""
    if now.default_allow or wanted.default_allow:
        return wanted.v1_writes()
    have = {exception[:3]: set(exception[3]) for exception in now.exceptions}
    want = {exception[:3]: set(exception[3]) for exception in wanted.exceptions}
    changes = []
    for device, letters in want.items():
        if added := letters - have.get(device, set()):
            changes.append(("devices.allow", devices.v1_line((*device, devices.ordered(added)))))
    for device, letters in have.items():
        if taken := letters - want.get(device, set()):
            changes.append(("devices.deny", devices.v1_line((*device, devices.ordered(taken)))))
    return tuple(changes)

"""cgroup v2: one hierarchy; controllers are passed down from parent to child, devices are a BPF program.

The kernel's documentation: Documentation/admin-guide/cgroup-v2.rst.
"""

import errno
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from msgspec import structs

from runtime.cgroup import devices, files, tree
from runtime.cgroup.direct import Direct
from runtime.cgroup.interface import Mount
from runtime.cgroup.programs import Programs
from runtime.cgroup.stats import Stats, read_v2
from runtime.cgroup.weights import cpu_weight, io_weight
from runtime.cgroup.writes import (
    Write,
    carry_out,
    fits,
    limit,
    page_size,
    positive,
    refuse_decrease,
)
from runtime.errors import InvalidSpec, Unavailable, WrongState
from runtime.spec import CPU, BlockIO, Memory, Resources

# What is handed down to every container, for its limits and its figures, where the host has it.
_HANDED_DOWN: Final = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")
_UNIFIED: Final = (*_HANDED_DOWN, "rdma", "misc", "dmem")


def writes(resources: Resources) -> tuple[Write, ...]:
    """The limits of `resources` as file writes, without its devices. Raises InvalidSpec for a malformed one."""
    found: list[Write] = []
    if resources.cpu:
        found += _cpu(resources.cpu)
    if resources.memory:
        found += _memory(resources.memory)
    if resources.pids:
        found.append(_one("pids", "pids.max", "pids.limit", _or_max(limit("pids.limit", resources.pids.limit) or -1)))
    if resources.block_io:
        found += _io(resources.block_io)
    for huge in resources.hugepage_limits:
        field, value = f"hugepage {page_size(huge.page_size)}", _or_max(limit("hugepage limit", huge.limit))
        found += [
            replace(
                _one("hugetlb", f"hugetlb.{huge.page_size}.{file}", field, value),
                tolerant=file.startswith("rsvd") or not huge.limit,
            )
            for file in ("max", "rsvd.max")
        ]
    found += [_unified(file, value) for file, value in resources.unified.items()]
    return tuple(found)


def _one(controller: str, file: str, field: str, value: str) -> Write:
    return Write(controller, file, (value,), field, value)


def _or_max(value: int) -> str:
    return "max" if value == -1 else str(value)


def _cpu(cpu: CPU) -> list[Write]:
    found = []
    if cpu.idle is not None:
        found.append(_one("cpu", "cpu.idle", "cpu.idle", str(cpu.idle)))
    if cpu.shares:
        weight = cpu_weight(positive("cpu.shares", cpu.shares))
        found.append(Write("cpu", "cpu.weight", (str(weight),), "cpu.shares", str(cpu.shares)))
    if cpu.quota or cpu.period:
        parts = [_or_max(limit("cpu.quota", cpu.quota or -1, 1))]
        if cpu.period:
            parts.append(str(positive("cpu.period", cpu.period)))
        found.append(_one("cpu", "cpu.max", "cpu.quota and cpu.period", " ".join(parts)))
    if cpu.burst is not None:
        found.append(_one("cpu", "cpu.max.burst", "cpu.burst", str(cpu.burst)))
    if cpu.realtime_runtime:
        raise InvalidSpec(f"cpu.realtimeRuntime {cpu.realtime_runtime}: cgroup v2 has no real-time limits")
    for field, numbers in (("cpus", cpu.cpus), ("mems", cpu.mems)):
        if numbers:
            found.append(_one("cpuset", f"cpuset.{field}", f"cpu.{field}", numbers))
    return found


def _memory(memory: Memory) -> list[Write]:
    found = []
    if memory.limit:
        found.append(_one("memory", "memory.max", "memory.limit", _or_max(limit("memory.limit", memory.limit))))
    if memory.swap:
        found.append(_swap(limit("memory.swap", memory.swap), memory.limit or 0))
    if memory.reservation:
        value = limit("memory.reservation", memory.reservation)
        found.append(_one("memory", "memory.low", "memory.reservation", _or_max(value)))
    if memory.disable_oom_killer:
        raise InvalidSpec("memory.disableOOMKiller: cgroup v2 can't do without its OOM killer")
    return found


def _swap(together: int, memory_limit: int) -> Write:
    """OCI counts memory and swap together, the kernel swap alone."""
    if together == -1:
        swap = -1
    elif memory_limit <= 0:
        raise InvalidSpec(f"memory.swap {together}: needs a memory.limit")
    elif together < memory_limit:
        raise InvalidSpec(f"memory.swap {together}: memory and swap together are below memory.limit {memory_limit}")
    else:
        swap = together - memory_limit
    # Swap as large as nothing, or as all, needs no accounting of it.
    tolerant = swap in (-1, 0)
    return Write("memory", "memory.swap.max", (_or_max(swap),), "memory.swap", str(together), tolerant)


def _io(block_io: BlockIO) -> list[Write]:
    found = []
    if block_io.weight:
        found += _weight("blockIO.weight", "", block_io.weight)
    for weighted in block_io.weight_device:
        if weighted.weight:
            found += _weight("blockIO.weightDevice", f"{weighted.major}:{weighted.minor} ", weighted.weight)
    lines: dict[str, list[str]] = {}
    for key, throttles in (
        ("rbps", block_io.throttle_read_bps_device),
        ("wbps", block_io.throttle_write_bps_device),
        ("riops", block_io.throttle_read_iops_device),
        ("wiops", block_io.throttle_write_iops_device),
    ):
        for throttle in throttles:
            rate = str(throttle.rate) if throttle.rate else "max"
            lines.setdefault(f"{throttle.major}:{throttle.minor}", []).append(f"{key}={rate}")
    if lines:
        values = tuple(" ".join([device, *limits]) for device, limits in lines.items())
        found.append(Write("io", "io.max", values, "blockIO.throttle", ", ".join(values)))
    return found


def _weight(field: str, device: str, weight: int) -> list[Write]:
    """io.cost's weight and the BFQ scheduler's: what the device's scheduler heeds counts; a kernel has both or one."""
    bfq = Write("io", "io.bfq.weight", (f"{device}{weight}",), field, f"{device}{weight}", tolerant=True)
    return [
        replace(
            bfq,
            file="io.weight",
            values=(f"{device}{io_weight(weight)}",),
            tolerant=False,
            fallback=replace(bfq, tolerant=False),
        ),
        bfq,
    ]


def _unified(file: str, value: str) -> Write:
    controller = file.partition(".")[0]
    if "/" in file or not file.isprintable() or controller not in _UNIFIED or controller == file:
        raise InvalidSpec(f"unified {file!r}: not a file of a cgroup v2 controller")
    lines = tuple(line for line in value.splitlines() if line.strip()) or ("\n",)
    return Write(controller, file, lines, f"unified {file}", value.strip())


def controllers_of(limits: Iterable[Write]) -> frozenset[str]:
    return frozenset(write.controller for write in limits if not write.tolerant)


class V2(Direct):
    """cgroup v2. `root` is where the hierarchy is mounted."""

    version = 2

    def __init__(self, root: str) -> None:
        self._root = root
        self.controllers = frozenset(files.read(f"{root}/cgroup.controllers").split())
        self._always = self.controllers.intersection(_HANDED_DOWN)
        self._programs = Programs()

    def create(self, path: str, resources: Resources | None) -> tuple[str, ...]:
        path = tree.checked(path)
        resources = resources or Resources()
        limits = self._available(writes(resources))
        policy = devices.policy(resources.devices)
        with ExitStack() as rollback:
            made = tree.make(self._root, path)
            rollback.callback(tree.remove_made, self._root, made)
            if path not in made:
                self._take_over(path)
            self._hand_down(path, controllers_of(limits))
            carry_out(path, lambda _: self._directory(path), limits)
            self._set_devices(path, policy, fresh=True)
            rollback.pop_all()
        return tuple(made)

    def join_files(self, path: str) -> tuple[str, ...]:
        return (f"{self._root}{tree.checked(path)}/cgroup.procs",)

    def clone_dir(self, path: str) -> str | None:
        return self._root + tree.checked(path)

    def memory_events(self, path: str) -> str | None:
        return f"{self._root}{tree.checked(path)}/memory.events" if "memory" in self.controllers else None

    def exists(self, path: str) -> bool:
        return os.path.isdir(self._root + tree.checked(path))

    def remove(self, path: str) -> bool:
        return tree.remove(self._root + tree.checked(path))

    def stats(self, path: str) -> Stats:
        return read_v2(self._root + tree.checked(path))

    def mounts_in_container(self, path: str) -> tuple[Mount, ...]:
        return (Mount("", "cgroup2", "cgroup", "", (), self._root + tree.checked(path)),)

    def _directory(self, path: str, controller: str = "") -> str:
        return self._root + path

    def _changes(self, path: str, resources: Resources) -> tuple[Write, ...]:
        limits = self._available(writes(self._completed(path, resources)))
        self._hand_down(path, controllers_of(limits))
        return limits

    def _set_devices(self, path: str, policy: devices.Policy, fresh: bool) -> None:
        if not (fresh and policy.open):
            self._programs.attach(self._root + path, policy)

    def _set_frozen(self, path: str, frozen: bool, timeout_s: float) -> bool:
        return files.set_v2_freezer(self._root + path, frozen, timeout_s)

    def _take_over(self, path: str) -> None:
        self._empty(self._root + path, path)
        files.write(f"{self._root}{path}/cgroup.freeze", "0")
        enabled = files.read(f"{self._root}{path}/cgroup.subtree_control").split()
        files.write(f"{self._root}{path}/cgroup.subtree_control", " ".join(f"-{controller}" for controller in enabled))

    def _hand_down(self, path: str, needed: frozenset[str]) -> None:
        """Enable the controllers in every cgroup above `path`. Raises WrongState for a `needed` one that can't be."""
        parent = path.rpartition("/")[0]
        wanted = self._always | needed
        try:
            lacking = self._lacking(parent, wanted)
            if lacking:
                # Usual for the first pod below a parent only; from the root down, as each can only pass on what it has.
                for above in ("", *tree.lineage(parent)) if parent else ("",):
                    self._enable(above, self._lacking(above, wanted))
                lacking = self._lacking(parent, needed)
        except OSError as error:
            raise tree.explain(error, path) from error
        if lacking:
            obstacle = self._obstacle(parent, lacking)
            raise WrongState(f"cgroup {path}: controllers {', '.join(sorted(lacking))} can't be enabled: {obstacle}")

    def _lacking(self, path: str, wanted: frozenset[str]) -> frozenset[str]:
        return wanted.difference(files.read(f"{self._root}{path}/cgroup.subtree_control").split())

    def _enable(self, path: str, lacking: frozenset[str]) -> None:
        if not lacking or self._is_leaf(path):
            return
        file = f"{self._root}{path}/cgroup.subtree_control"
        try:
            files.write(file, " ".join(f"+{controller}" for controller in sorted(lacking)))
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES):
                raise
            # One that can't be enabled shall not keep the others out; what was needed is missed by the caller.
            for controller in lacking:
                try:
                    files.write(file, f"+{controller}")
                except OSError:
                    continue

    def _is_leaf(self, path: str) -> bool:
        """Whether it holds processes itself and isn't the root of all (which has no cgroup.type).

        It can pass on "threaded" controllers at most then, and with those its children can hold no processes.
        """
        directory = self._root + path
        return bool(files.read(f"{directory}/cgroup.procs")) and os.path.exists(f"{directory}/cgroup.type")

    def _obstacle(self, parent: str, lacking: frozenset[str]) -> str:
        for above in ("", *tree.lineage(parent)) if parent else ("",):
            directory = self._root + above
            if not self._lacking(above, lacking):
                continue
            if self._is_leaf(above):
                return f"cgroup {above or '/'} holds processes itself (cgroup v2 allows them in leaves only)"
            return f"cgroup {above or '/'} has only {files.read(f'{directory}/cgroup.controllers').strip() or 'none'}"
        return "they are disabled while it is made"

    def _completed(self, path: str, resources: Resources) -> Resources:
        """The change with what it leaves out and the files need. Raises InvalidSpec for memory below use."""
        directory = self._root + path
        cpu, memory = resources.cpu, resources.memory
        try:
            if cpu and bool(cpu.period) != bool(cpu.quota):
                quota, period_us = files.read(f"{directory}/cpu.max").split()
                quota_us = -1 if quota == "max" else int(quota)
                cpu = structs.replace(cpu, quota=cpu.quota or quota_us, period=cpu.period or int(period_us))
            if memory and memory.limit and not fits(memory.limit, f"{directory}/memory.current"):
                refuse_decrease(path, memory.limit, read_v2(directory).memory)
            if memory and memory.swap and memory.swap > 0 and not memory.limit:
                now = files.read(f"{directory}/memory.max").strip()
                memory = structs.replace(memory, limit=None if now == "max" else int(now))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise Unavailable(f"cgroup {path}: {error.strerror}") from error
        return structs.replace(resources, cpu=cpu, memory=memory)

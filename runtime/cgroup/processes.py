"""What the processes of a cgroup hold, counted in /proc."""

import os
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Processes:
    """`open_files_limit` is the first process's soft limit, None where it has none."""

    count: int
    threads: int
    descriptors: int
    sockets: int
    open_files_limit: int | None


def look(pids: Iterable[int]) -> Processes:
    """Count; a process that ends meanwhile is left out."""
    count = threads = descriptors = sockets = 0
    limit: int | None = None
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                inside = int(file.read().rpartition(b")")[2].split()[17])
            files = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
            if not count:
                limit = _open_files(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        count += 1
        threads += inside
        descriptors += len(files)
        sockets += sum(file.startswith("socket:") for file in files)
    return Processes(count, threads, descriptors, sockets, limit)


def _open_files(pid: int) -> int | None:
    with open(f"/proc/{pid}/limits") as file:
        for line in file:
            if line.startswith("Max open files"):
                soft = line.split()[3]
                return int(soft) if soft.isdigit() else None
    return None

"""System calls of crib's processes, by strace."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_CALL = re.compile(r"(\d+) +(\w+)\((.*)")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Call:
    pid: int
    name: str
    text: str  # arguments and result

    @property
    def path(self) -> str:
        """The first string among the arguments."""
        found = _PATH.search(self.text)
        return found[1] if found else ""


@dataclass(slots=True)
class Trace:
    """Filled when the tracing ends."""

    calls: list[Call] = field(default_factory=list)

    def children(self, enters: str) -> dict[int, tuple[list[Call], list[Call]]]:
        """By pid, of those who made a call that `enters` matches: calls before it, and after it until execve "
        "succeeds."""
        found: dict[int, tuple[list[Call], list[Call]]] = {}
        before: dict[int, list[Call]] = {}
        done: set[int] = set()
        for call in self.calls:
            if call.pid in done:
                continue
            if call.pid in found:
                found[call.pid][1].append(call)
                if call.name == "execve" and "= 0" in call.text:
                    done.add(call.pid)
            elif re.search(enters, f"{call.name}({call.text}"):
                found[call.pid] = (before.get(call.pid, []), [])
            else:
                before.setdefault(call.pid, []).append(call)
        return found


@contextmanager
def tracing(pid: int, directory: Path, *names: str) -> Iterator[Trace]:
    """Trace these calls of the process and of whatever it forks, until the end of the block."""
    output = directory / "trace"
    command = ["strace", "-f", "-s", "4096", "-e", f"trace={','.join(names)}", "-o", str(output), "-p", str(pid)]
    trace = Trace()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr
        assert "attached" in strace.stderr.readline()
        try:
            yield trace
        finally:
            strace.terminate()
            strace.stderr.read()
    for line in output.read_text().splitlines():
        if found := _CALL.match(line):
            trace.calls.append(Call(int(found[1]), found[2], found[3]))

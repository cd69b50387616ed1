"""The floor: floor.c compiled on the spot and run as a companion process, one cycle at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_SOURCE = Path(__file__).with_name("floor.c")
_ROOT_DIRS = ("bin", "dev", "etc", "proc", "sys", "tmp")


@dataclass(frozen=True, slots=True)
class Cycle:
    start_ms: float
    exec_ms: float
    stop_ms: float
    cpu_ms: float


class Floor:
    """A bare pod start in C. Raises RuntimeError without a compiler, or with the program's words when it fails."""

    def __init__(self, work: Path) -> None:
        """Compile it and start it with its files below `work`, which must be able to hold an overlay's upper layer."""
        if shutil.which("gcc") is None:
            raise RuntimeError("the floor needs gcc (Debian: apt-get install gcc libc6-dev); --no-floor leaves it out")
        self._directory = Path(tempfile.mkdtemp(prefix="crib-floor-", dir=work))
        lower = self._directory / "lower"
        for name in _ROOT_DIRS:
            (lower / name).mkdir(parents=True)
        (self._directory / "work").mkdir()
        binary = lower / "bin" / "floor"
        compile_command = ["gcc", "-O2", "-Wall", "-Wextra", "-static", "-o", str(binary), str(_SOURCE)]
        try:
            subprocess.run(compile_command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            shutil.rmtree(self._directory)
            raise RuntimeError(f"{_SOURCE.name} does not compile: {error.stderr}") from error
        group = f"/crib-floor-{os.getpid()}"
        self._process = subprocess.Popen(
            [binary, lower, self._directory / "work", group],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Floor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=30)
        shutil.rmtree(self._directory, ignore_errors=True)

    def cycle(self) -> Cycle:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say why
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise RuntimeError(self._process.stderr.read().strip() or "the floor program ended")
        return Cycle(*(int(word) / 1e6 for word in line.split()))

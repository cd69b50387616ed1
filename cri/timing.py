"""When each part of a start began and how long it took: what `crib plan` shows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from cri.state.records import StepRecord, Timeline


class Timing:
    """Collects steps from its making on. Steps that run side by side overlap."""

    def __init__(self) -> None:
        self._began_ns = time.time_ns()
        self._steps: list[StepRecord] = []

    @contextlib.contextmanager
    def step(self, phase: str, text: str) -> Iterator[None]:
        """Time what is inside, whether it fails or not."""
        began_ns, error = time.time_ns(), ""
        try:
            yield
        except BaseException as failure:
            error = str(failure) or type(failure).__name__
            raise
        finally:
            self.add(phase, text, began_ns, time.time_ns() - began_ns, error)

    def add(self, phase: str, text: str, started_ns: int, duration_ns: int, error: str = "") -> None:
        """Take in a step that was timed elsewhere."""
        self._steps.append(
            StepRecord(phase=phase, text=text, started_ns=started_ns, duration_ns=duration_ns, error=error)
        )

    def timeline(self) -> Timeline:
        """All steps, in the order of their beginning, and the time since this was made."""
        steps = tuple(sorted(self._steps, key=lambda step: step.started_ns))
        return Timeline(steps=steps, total_ns=time.time_ns() - self._began_ns)

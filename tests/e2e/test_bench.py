"""The benchmark's arithmetic, and its floor against the kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hack.benchmark.account import helpers, memory_bytes
from hack.benchmark.floor import Floor
from hack.benchmark.measure import Deadline, Summary
from tests.requires import requires


def test_a_summary_is_of_the_samples_alone() -> None:
    summary = Summary.of([4.0, 1.0, 2.0, 3.0])
    assert summary == Summary(median=2.5, p99=4.0, best=1.0, count=4)
    assert Summary.of([]) is None


def test_p99_leaves_one_sample_in_a_hundred_out() -> None:
    summary = Summary.of([float(n) for n in range(1, 101)])
    assert summary is not None
    assert summary.p99 == 99.0


def test_a_passed_deadline_cuts_a_phase_and_says_so() -> None:
    limit = Deadline(-1)
    assert list(limit.rounds(3, "starts")) == []
    assert limit.cut == ["starts: 0 of 3"]


def test_helpers_are_neither_the_daemon_nor_its_ancestors_nor_pods() -> None:

    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert helpers(os.getppid(), set()) & {os.getpid(), os.getppid()} == set()
            assert child.pid in helpers(os.getpid(), set())
            assert child.pid not in helpers(os.getpid(), {child.pid})
            assert memory_bytes(child.pid) > 4096
        finally:
            child.terminate()


@requires("root", "overlay")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_floor_starts_a_pod_and_leaves_nothing(tmp_path: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    with Floor(tmp_path) as floor:
        cycle = floor.cycle()
    assert 0 < cycle.exec_ms < cycle.start_ms
    assert cycle.cpu_ms > 0
    assert list(tmp_path.iterdir()) == []
    assert Path("/proc/self/mountinfo").read_text() == before

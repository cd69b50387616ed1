"""The test machine, hack/vm, as tests use it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
VM = REPO / "hack/vm"


@pytest.fixture(scope="session")
def vm() -> str:
    """The program hack/vm, its images made: root tests have no network to make them with."""
    built = subprocess.run([VM, "build"], capture_output=True, text=True, timeout=900, check=False)
    if built.returncode:
        pytest.fail(f"run `hack/vm build` before the tests:\n{built.stderr[-3000:]}", pytrace=False)
    return str(VM)

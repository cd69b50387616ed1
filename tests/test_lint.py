"""The linters, as tests: what hack/lint finds fails here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.limits import scaled

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(scaled(600))
@pytest.mark.parametrize("linter", ["ruff", "format", "mypy", "imports"])
def test_linter_finds_nothing(linter: str) -> None:
    done = subprocess.run([ROOT / "hack/lint", linter], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

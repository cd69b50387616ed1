"""How long a test may wait where it runs: `CRIB_TEST_TIMEOUT_SCALE` says how much slower that is than usual."""

from __future__ import annotations

import os
from typing import Final

SCALE: Final = float(os.environ.get("CRIB_TEST_TIMEOUT_SCALE", "1"))


def scaled(seconds: float) -> float:
    """A limit for an event that is to come; never for one that a test wants to be too late."""
    return seconds * SCALE

"""Conversions between the scales of cgroup v1 (the OCI spec's) and of v2."""

import math
from typing import Final

LEAST_SHARES, MOST_SHARES = 2, 262144
LEAST_WEIGHT, MOST_WEIGHT = 1, 10000
_DEFAULT_SHARES: Final = 1024


def cpu_weight(shares: int) -> int:
    """cpu.weight for v1's cpu.shares: 2, 1024 and 262144 become 1, 100 and 10000.

    The curve that runc 1.3.2 and crun 1.23 took up (opencontainers/runc#4896); shares beyond the range are clamped.
    """
    if shares <= LEAST_SHARES:
        return LEAST_WEIGHT
    if shares >= MOST_SHARES:
        return MOST_WEIGHT
    if shares == _DEFAULT_SHARES:
        return 100  # exactly, whatever the rounding of the logarithms
    exponent = math.log2(shares)
    return math.ceil(10 ** ((exponent * exponent + 125 * exponent) / 612 - 7 / 34))


def io_weight(blkio_weight: int) -> int:
    """io.weight (1 to 10000) for v1's blkio weight (10 to 1000), linear as in runc and crun."""
    return 1 + (blkio_weight - 10) * 9999 // 990

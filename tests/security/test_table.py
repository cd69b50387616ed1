"""docs/security.md is what the suite is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# What issue trackers of the field list, and this suite has to try.
WANTED = (
    "CVE-2016-9962 CVE-2019-5736 CVE-2019-14271 CVE-2019-16884 CVE-2019-19921 CVE-2020-14386 CVE-2020-15257 "
    "CVE-2021-30465 "
    "CVE-2022-0492 CVE-2022-0811 CVE-2022-1708 CVE-2022-23648 CVE-2022-27652 CVE-2022-29162 CVE-2022-31030 "
    "CVE-2023-25173 "
    "CVE-2023-27561 CVE-2023-28642 CVE-2024-3154 CVE-2024-5154 CVE-2024-8676 CVE-2024-21626 CVE-2024-25621 "
    "CVE-2024-40635 "
    "CVE-2024-45310 CVE-2025-0750 CVE-2025-4437 CVE-2025-31133 CVE-2025-52565 CVE-2025-52881 CVE-2025-64329 "
    "CVE-2026-47262 "
    "CVE-2026-50195 CVE-2026-53488 CVE-2026-53489 CVE-2026-53492 CVE-2026-53495 GHSA-cm9x-c3rh-7rc4"
).split()


def test_the_table_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "hack/security-table"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_defect_is_in_it() -> None:
    page = (REPOSITORY / "docs/security.md").read_text()
    assert [id for id in WANTED if f"| {id} |" not in page] == []

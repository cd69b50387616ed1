"""The register of attacks: each test says which published defects it tries, and has a control.

`hack/security-table` makes the table of docs/security.md from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class Attack:
    """What a test tries. `control` is the test in which the same attack succeeds, without the guard."""

    ids: tuple[str, ...]
    sentence: str
    guard: str
    control: str


def attack(*ids: str, sentence: str, guard: str, control: str) -> Callable[[Test], Test]:
    """Register a test. `control` is the name of a test in the same module."""

    def register(test: Test) -> Test:
        test.__dict__["attack"] = Attack(ids, sentence, guard, control)
        return test

    return register

"""An attacker who watches from inside a container what enters it, and that being held until he has looked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from runtime.engine import Pod
from runtime.plan import identity
from runtime.plan.plan import Plan
from runtime.spec import Capabilities, Process
from tests.runtime.conftest import TIMEOUT_S
from tests.security.conftest import held

NO_PTRACE = tuple(name for name in held() if name not in ("SYS_PTRACE", "PERFMON"))
"""Every capability but those for which a container is frozen."""


def has(sets: Capabilities) -> Callable[[Process], Process]:
    return lambda process: msgspec.structs.replace(process, capabilities=sets)


def shared(pod: Pod) -> dict[str, str | None]:
    return {"pid": pod.namespaces.pid}


def held_by(fifo: Path) -> Callable[[Plan], Plan]:
    """Edits a plan so that it waits at its beginning until somebody reads the fifo."""
    return lambda plan: (identity.JoinCgroup((str(fifo),)), *plan)


def at_the_fifo(parent: int) -> int:
    """How many children of the monitor wait for the fifo's reader."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sum(
        "wait_for_partner" in Path(f"/proc/{pid}/wchan").read_text() or "fifo" in Path(f"/proc/{pid}/stack").read_text()
        for pid in children
    )


class Watch:
    """The attacker's side: a container with SYS_PTRACE that looks for a process with the host's tree."""

    def __init__(self, upper: Path) -> None:
        self.upper = upper

    def rounds(self) -> int:
        path = self.upper / "rounds"
        return int(path.read_text()) if path.exists() else 0

    @property
    def caught(self) -> bool:
        return (self.upper / "caught").exists()

    async def tried(self, rounds: int = 2) -> None:
        """Wait until it has looked through all processes again."""
        target = self.rounds() + rounds
        await until(lambda: self.rounds() >= target)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what is watched has no event
            await asyncio.sleep(0.01)

"""Turns: in order, a few at once, and a limit to how many wait."""

from __future__ import annotations

import asyncio

import pytest

from cri.container import turns as module
from cri.container.turns import AT_ONCE, LIMIT, Turn, Turns
from runtime.errors import Exhausted

pytestmark = pytest.mark.asyncio


async def settled(tasks: list[asyncio.Task[Turn]]) -> list[bool]:
    """Which of them have their turn, once nothing more happens by itself."""
    for _ in range(3):
        await asyncio.sleep(0)
    return [task.done() for task in tasks]


async def test_a_few_at_once_then_in_order() -> None:
    turns = Turns()
    first = [await turns.take("pod") for _ in range(AT_ONCE)]
    later = [asyncio.create_task(turns.take("pod")) for _ in range(3)]
    assert await settled(later) == [False, False, False]
    (await turns.take("other")).end()
    first[0].end()
    assert await settled(later) == [True, False, False]
    first[1].end()
    assert await settled(later) == [True, True, False]
    later[0].result().end()
    for turn in (*first[2:], await later[1], await later[2]):
        turn.end()
    assert vars(turns) == vars(Turns())


async def test_who_gives_up_passes_his_turn_on() -> None:
    turns = Turns()
    first = [await turns.take("pod") for _ in range(AT_ONCE)]
    later = [asyncio.create_task(turns.take("pod")) for _ in range(3)]
    await settled(later)
    later[0].cancel()
    await settled(later)
    first[0].end()  # to the second, which gives up before it has run on
    later[1].cancel()
    assert await settled(later) == [True, True, True]
    assert not later[2].cancelled()
    for turn in (*first[1:], later[2].result()):
        turn.end()
    assert vars(turns) == vars(Turns())


async def test_what_lasts_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BRIEF_S", 0.01)
    turns = Turns()
    first = [await turns.take("pod") for _ in range(AT_ONCE)]
    async with asyncio.timeout(5):
        second = [await turns.take("pod") for _ in range(AT_ONCE)]
    for turn in (*first, *second):
        turn.end()
    assert vars(turns) == vars(Turns())


async def test_too_many() -> None:
    turns = Turns()
    tasks = [asyncio.create_task(turns.take("pod")) for _ in range(LIMIT)]
    await settled(tasks)
    with pytest.raises(Exhausted, match=f"{LIMIT} commands run or wait"):
        await turns.take("other")
    for task in tasks:
        (await task).end()
    assert vars(turns) == vars(Turns())

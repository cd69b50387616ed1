"""Monitors of an older build: their pods go on, and are what they were, or it is said why they can't be talked to."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

import runtime
from runtime.engine import Engine, PodStart
from runtime.errors import Unavailable
from runtime.linux.probe import probe
from runtime.zygote import launch as launching
from runtime.zygote.launch import Zygote
from runtime.zygote.messages import VERSION
from tests.requires import requires
from tests.runtime.conftest import POD_ID, TIMEOUT_S, Bench, container

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]
FIRST = (
    "zygote/container.py",
    '            "log_full": self.log is not None and self.log.full,\n',
    "",
)
"""A monitor that doesn't limit logs."""
OTHER = ("zygote/messages.py", f"VERSION: Final = {VERSION}", f"VERSION: Final = {VERSION - 1}")
DROPS = (
    "zygote/server.py",
    "            self.send(connection, Kind.FAILED, re=error.number, errno=0, detail=str(error))\n            return\n",
    "            message = None\n",
)
"""What a monitor did with another version's message at first."""


def older(directory: Path, monkeypatch: pytest.MonkeyPatch, *edits: tuple[str, str, str]) -> Zygote:
    """The zygote of an older build."""
    copy = directory / "older"
    assert runtime.__file__
    shutil.copytree(Path(runtime.__file__).parent, copy / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text, replacement in edits:
        path = copy / "runtime" / name
        source = path.read_text()
        assert source.count(text) == 1, name
        path.write_text(source.replace(text, replacement))
    with monkeypatch.context() as patch:
        patch.setattr(launching, "__file__", str(copy / "runtime/zygote/launch.py"))
        return launching.launch()


async def test_a_monitor_that_tells_less_is_taken_over(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    first = Engine(state, older(tmp_path, monkeypatch, FIRST), probe())
    bench.engine, ours = first, bench.engine
    pod = await bench.pod()
    await bench.start(pod, "c", container(pod, "sleep", "100"))
    first.close()
    bench.engine = later = Engine(state, launching.launch(), probe())
    ours.close()
    found = await later.connect(POD_ID)
    assert found is not None
    assert [fact.id for fact in await found.containers()] == ["c"]
    bench.watch(found)
    exited, log = await bench.run(found, "d", container(found, "sh", "-c", "echo fine"))
    assert (exited.code, log) == (0, "fine\n")
    await found.kill("c")
    assert (await asyncio.wait_for(bench.exited("c"), TIMEOUT_S)).code == 137
    await later.stop_pod(POD_ID)


@pytest.mark.parametrize("edits", [(OTHER,), (OTHER, DROPS)])
async def test_a_monitor_that_speaks_otherwise_is_told_of_and_can_be_ended(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: tuple[tuple[str, str, str], ...]
) -> None:
    with monkeypatch.context() as patch:  # an older cribd, which speaks as its monitors do
        patch.setattr("runtime.zygote.messages.VERSION", VERSION - 1)
        state = tmp_path / "state"
        state.mkdir()
        first = Engine(state, older(tmp_path, monkeypatch, *edits), probe())
        bench.engine, ours = first, bench.engine
        ours.close()
        pod = await bench.pod(PodStart(id=POD_ID, hostname="pod"))
        started = await bench.start(pod, "c", container(pod, "sleep", "100"))
        first.close()
    bench.engine = later = Engine(state, launching.launch(), probe())
    with pytest.raises(Unavailable, match=r"its monitor lives, and doesn't answer") as caught:
        await later.connect(POD_ID)
    assert ("version" in str(caught.value)) == (DROPS not in edits)
    assert Path(f"/proc/{started.pid}").exists()
    os.kill(started.pid, 9)
    async with asyncio.timeout(TIMEOUT_S):
        while not later.exits_on_disk(POD_ID):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [(exit.id, exit.code) for exit in later.exits_on_disk(POD_ID)] == [("c", 137)]
    await later.stop_pod(POD_ID)
    assert await later.connect(POD_ID) is None

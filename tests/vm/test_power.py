"""The power fails at any moment of a pull or a removal: the machine's process is killed, and with it its page cache."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.requires import requires

CUTS = int(os.environ.get("CRIB_POWER_CUTS", "20"))

pytestmark = [requires("root", "vm"), pytest.mark.timeout(120 + 60 * CUTS)]

CYCLE = ["pulled one", "pulled two", "removed one", "removed two"]
# As harsh as ext4 can be: nothing is on the disk before it is asked for.
PROGRAM = """
mkdir -p /disk && mount -o data=writeback,noauto_da_alloc,commit=300 /dev/ubdc /disk &&
exec python -P -m tests.vm.power_program /disk/store
"""


def after(state: set[str], event: str) -> set[str]:
    word, name = event.split()
    return state | {name} if word == "pulled" else state - {name}


def following(last: str) -> str:
    """What the program does after it has told `last`."""
    return CYCLE[(CYCLE.index(last) + 1) % 4] if last in CYCLE else CYCLE[0]


def test_power_cuts(vm: str, tmp_path: Path) -> None:
    """What was told is there, and what was under way is there in full or not at all."""
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    chance = random.Random(11)
    allowed: list[set[str]] = [set()]
    times_s: list[float] = []
    cut_in = Counter[str]()
    for cut in range(CUTS + 1):
        command = [vm, "run", "--no-systemd", "--timeout", "300", "--disk", str(disk), PROGRAM]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as machine:
            assert machine.stdout
            try:
                word, *names = machine.stdout.readline().split() or ["nothing"]
                began_s = time.monotonic()
                assert word == "found", (word, names, machine.stdout.readline())
                assert set(names) in allowed, f"cut {cut}: {names} is there instead of one of {allowed}"
                told = []
                if not cut:  # how long each step takes here and now
                    times_s.append(0)
                    for _ in CYCLE:
                        told.append(machine.stdout.readline())
                        times_s.append(time.monotonic() - began_s)
                elif cut < CUTS:
                    step = chance.randrange(4)
                    wait_s = chance.uniform(times_s[step], times_s[step + 1])
                    time.sleep(wait_s)  # noqa: TID251 - any moment is as good
            finally:
                machine.kill()
            told += machine.stdout.readlines()
        state = set(names)
        for event in (line.strip() for line in told):
            state = after(state, event)
        underway = following(told[-1].strip() if told else "")
        cut_in[underway] += 1
        # What the host has not read of it is a line at most, and what comes after that.
        allowed = [state, then := after(state, underway), after(then, following(underway))]
    assert len(cut_in) > 1, f"the cuts were in {cut_in}"

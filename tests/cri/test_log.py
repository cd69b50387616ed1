"""What cribd writes to standard error, and who reads it."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.limits import scaled

CHILD = """
import logging, select, sys
from cri.daemon import log
log.setup("info", "text")
for number in range(5000):
    logging.info("line %d", number)
print("done", flush=True)
sys.stdin.readline()
room = select.poll()
room.register(2, select.POLLOUT)
room.poll()
logging.info("the end")
"""


def test_nobody_reads_it() -> None:
    """As behind a journald that hangs: cribd goes on, and what is missing is told once there is room."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout and child.stdout.readline() == "done\n"
        _, lines = child.communicate("\n", scaled(30))
    *written, missing, end = lines.splitlines()
    found = re.search(r'level=warning msg="(\d+) lines are missing: standard error was not read"', missing)
    assert found and len(written) + int(found[1]) == 5000
    assert all(f'"line {number}"' in line for number, line in enumerate(written))
    assert end.endswith('msg="the end"')

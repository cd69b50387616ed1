"""A child that is cloned while the C library makes a thread for a log: its end of a start must not wait for that."""

from __future__ import annotations

import subprocess
import sys

from tests.limits import scaled
from tests.requires import requires

_ROUNDS = 20
# On one processor the thread doesn't run before the clone. Each round is a process of its own: there is a new thread.
_PROGRAM = """
import os, select, sys
from runtime.linux.aio import Writer
from runtime.linux.process import clone3, set_effective_user, set_identity

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
null = os.open("/dev/null", os.O_WRONLY)
for _ in range(int(sys.argv[1])):
    if (process := os.fork()) == 0:
        Writer().begin(null, b"x")
        child, pidfd = clone3(0)
        if child == 0:
            set_effective_user(1)
            set_effective_user(0)
            set_identity(7, 8, (8, 9))
            alike = os.getresuid() == (7, 7, 7) and os.getresgid() == (8, 8, 8) and sorted(os.getgroups()) == [8, 9]
            os._exit(0 if alike else 1)
        if not select.select([pidfd], [], [], float(sys.argv[2]))[0]:
            os.kill(child, 9)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code:
        sys.exit(f"exit code {code}")
"""


@requires("root")
def test_a_child_changes_its_identity_while_its_parent_makes_a_thread() -> None:
    arguments = [sys.executable, "-c", _PROGRAM, str(_ROUNDS), str(scaled(10))]
    made = subprocess.run(arguments, capture_output=True, text=True, timeout=scaled(60))
    assert made.returncode == 0, made.stderr

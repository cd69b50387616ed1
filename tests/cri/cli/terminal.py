"""`crib` on a terminal of its own, as a person sits before it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from typing import Any

from tests.cri.cli.conftest import LIMIT_S, Crib


class Terminal:
    """Runs a command of `crib` on a new terminal of 24 lines and 80 columns."""

    def __init__(self, crib: Crib, *arguments: str) -> None:
        self._master, self._slave = pty.openpty()
        self.resize(24, 80)
        self.before = self.modes()
        self.shown = b""
        self._seen = 0
        self.process = subprocess.Popen(
            crib.command(*arguments),
            env=crib.environment,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self._slave)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, pattern: str) -> str:
        """Wait until what is shown from here on matches; what does."""
        end = time.monotonic() + LIMIT_S
        while not (match := re.search(pattern.encode(), self.shown[self._seen :])):
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{pattern!r} is not shown: {self.shown!r}")
        self._seen += match.end()
        return match.group().decode()

    def _read(self, limit_s: float) -> bool:
        if not select.select([self._master], [], [], max(limit_s, 0))[0]:
            return False
        self.shown += os.read(self._master, 65536)
        return True

    def end(self) -> int:
        """Wait for the command's end; its exit code. The terminal is as it was."""
        code = self.process.wait(LIMIT_S)
        while self._read(0):
            pass
        assert b"Traceback" not in self.shown, self.shown
        assert self.modes() == self.before
        return code

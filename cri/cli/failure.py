"""How a command fails: one line for a person, and a code for a script."""

from __future__ import annotations

import sys
from typing import Final

ERROR: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
UNREACHABLE: Final = 4


class Failure(Exception):
    """The command can't do it. The message is lower case and says what to do where that isn't plain."""

    def __init__(self, message: str, code: int = ERROR) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(Exception):
    """A signal has told this command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def printable(text: str) -> str:
    """`text` on one line and without what a terminal would obey; names and messages may come from anyone."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text.strip())


def report(failed: Failure) -> None:
    """Say it on standard error."""
    print(f"crib: {printable(str(failed))}", file=sys.stderr)

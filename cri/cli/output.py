"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from cri.cli.failure import printable

Row = TypeVar("Row")
_COLOURS: Final = {
    "running": "green",
    "ready": "green",
    "yes": "green",
    "exited": "dim",
    "not-ready": "dim",
    "no": "red",
}
_FOLDED: Final = ("STEP", "DETAIL", "FIX", "INSTEAD", "RULE", "LEADS TO")  # columns of sentences


def show(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], as_json: bool) -> None:
    """Print rows: as JSON whole, as a table what `columns` (title to text) make of each."""
    if as_json:
        show_json(rows)
        return
    lines = [[printable(text(row)) for text in columns.values()] for row in rows]
    if sys.stdout.isatty():
        _show_rich(list(columns), lines)
        return
    table = [list(columns), *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _show_rich(titles: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for title, *cells in zip(titles, *lines, strict=True):
        if title in _FOLDED:
            table.add_column(title, overflow="fold")
        else:  # whole, however narrow the terminal: it is what commands are given
            table.add_column(title, no_wrap=True, min_width=max(map(len, (title, *cells))))
    for line in lines:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell.partition(" ")[0], "")) for cell in line))
    Console(highlight=False).print(table, crop=False)


def show_json(value: Any) -> None:
    """Print a value of structs, lists and dicts as indented JSON."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    print(text)


def short(identifier: str) -> str:
    """As much of an id as a table shows; commands take it as a prefix."""
    return identifier.removeprefix("sha256:")[:12]


def age(since_ns: int) -> str:
    """How long ago that was: "12 s ago"."""
    if not since_ns:
        return "-"
    seconds = max(0, time.time_ns() - since_ns) // 10**9
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def size(number_bytes: float) -> str:
    """Bytes to read: "3.2 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if number_bytes < 1024:
            return f"{number_bytes:.0f} B" if unit == "B" else f"{number_bytes:.1f} {unit}"
        number_bytes /= 1024
    return f"{number_bytes:.1f} GiB"


def milliseconds(duration_ns: int) -> str:
    return f"{duration_ns / 1e6:.2f} ms"

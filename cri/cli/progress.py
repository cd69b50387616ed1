"""How far a pull or a load is: bars on a terminal, lines elsewhere, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from cri.api import crib_pb2
from cri.cli.output import short, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_WORDS: Final = {
    crib_pb2.LAYER_WAITING: "waiting",
    crib_pb2.LAYER_DOWNLOADING: "downloading",
    crib_pb2.LAYER_UNPACKING: "unpacking",
    crib_pb2.LAYER_DONE: "done",
    crib_pb2.LAYER_EXISTS: "already here",
}
_AT_WORK: Final = (crib_pb2.LAYER_DOWNLOADING, crib_pb2.LAYER_UNPACKING)
_OVER: Final = (crib_pb2.LAYER_DONE, crib_pb2.LAYER_EXISTS)


@contextmanager
def of_pull(quiet: bool) -> Iterator[Callable[[crib_pb2.PullProgress], None]]:
    """To be called with each layer's news."""
    if quiet:
        yield lambda news: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _Layers(bars).tell
    else:
        yield _Lines().tell


@contextmanager
def of_load(name: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """To be called with the number of bytes each time that some were sent."""
    if not sys.stderr.isatty():
        yield lambda sent_bytes: None
        return
    with _bars() as bars:
        task = bars.add_task(name, total=total_bytes or None, state="loading")
        yield lambda sent_bytes: bars.advance(task, sent_bytes)
        bars.update(task, state="done")


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[state]:<12}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        console=Console(stderr=True),
    )


class _Layers:
    """A bar for each layer; where there are more than the terminal has lines, for each at work and one for all."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._news: dict[str, crib_pb2.PullProgress] = {}
        self._all: TaskID | None = None

    def tell(self, news: crib_pb2.PullProgress) -> None:
        task = self._tasks.get(news.digest)
        if task is None:
            task = self._tasks[news.digest] = self._bars.add_task(short(news.digest), total=None, state="")
        self._news[news.digest] = news
        total, current = news.total_bytes or None, news.current_bytes
        if news.state in _OVER:
            total = current = news.total_bytes or news.current_bytes or 1
        self._bars.update(task, total=total, completed=current, state=_WORDS.get(news.state, ""))
        if len(self._tasks) > self._bars.console.height - 2:
            self._crowded()

    def _crowded(self) -> None:
        for digest, task in self._tasks.items():
            self._bars.update(task, visible=self._news[digest].state in _AT_WORK)
        if self._all is None:
            self._all = self._bars.add_task("all layers", total=None, state="")
        news = self._news.values()
        over = [layer for layer in news if layer.state in _OVER]
        self._bars.update(
            self._all,
            state=f"{len(over)}/{len(news)}",
            total=sum(layer.total_bytes for layer in news),
            completed=sum(layer.total_bytes if layer.state in _OVER else layer.current_bytes for layer in news),
        )


class _Lines:
    """A line each time that a layer gets to something new."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {}

    def tell(self, news: crib_pb2.PullProgress) -> None:
        if self._states.get(news.digest) == news.state:
            return
        self._states[news.digest] = news.state
        known = f" {size(news.total_bytes)}" if news.total_bytes else ""
        print(f"{short(news.digest)}: {_WORDS.get(news.state, '')}{known}", file=sys.stderr, flush=True)

"""A large blob in several requests at once, where the server answers ranges.

The pieces go to their places in the file in any order; hash and taker follow what is there without a gap.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

_READ = 1 << 18

# Brings the bytes from `start` up to `end` to their place; calls back with the position that it has come to.
Fetch = Callable[[int, int, Callable[[int], None]], None]


class Front:
    """The end of what is there without a gap from the start on; hashes it on its way to the taker."""

    def __init__(self, file: int, hash: Any, position: int, take: Callable[[bytes], None]) -> None:
        self._file = file
        self._hash = hash
        self._take = take
        self.position = position

    def advance(self, position: int) -> None:
        while self.position < position:
            data = os.pread(self._file, min(position - self.position, _READ), self.position)
            self._hash.update(data)
            self.position += len(data)
            self._take(data)


def in_parallel(fetch: Fetch, front: Front, size: int, piece_bytes: int, parallel: int) -> None:
    """Fetch what is missing of `size` bytes, `parallel` pieces at a time and in their order.

    What `fetch` or the taker raises ends it, when the other pieces have ended too.
    """
    stop = threading.Event()
    moved = threading.Condition()
    reached: dict[int, int] = {}

    def one(start: int, end: int) -> None:
        def progress(position: int) -> None:
            with moved:
                reached[start] = position
                moved.notify()
            if stop.is_set():
                raise _Stopped

        fetch(start, end, progress)

    starts = list(range(front.position, size, piece_bytes))
    pending: set[Future[None]] = set()
    with ThreadPoolExecutor(parallel, thread_name_prefix="range") as pool:
        try:
            for start in starts:
                pending.add(pool.submit(one, start, min(start + piece_bytes, size)))
            for future_start in starts:
                end = min(future_start + piece_bytes, size)
                while front.position < end:
                    with moved:
                        moved.wait_for(lambda: reached.get(future_start, 0) > front.position, timeout=0.1)  # noqa: B023
                        position = reached.get(future_start, 0)
                    done, pending = wait(pending, timeout=0, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    if position > front.position:
                        front.advance(position)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Stopped(Exception):
    """Another piece has failed."""

"""A container's log file as its monitor writes it: on a disk that may be full, and may not answer.

A write to a disk that doesn't answer can't be taken back, and not even a signal ends it. So none is made here: all go
through aio(7), one at a time for each file. What comes meanwhile is kept, up to `BUFFER_BYTES`; then the container's
output isn't read any more, and so it waits, as it would for any slow disk. When the disk has taken nothing for
`STALL_S`, output is read again, and dropped and counted until it does. Who waits for a write (the news of an exit, for
the last lines; a rotation) is told when that hangs.

A write that fails drops its lines, and what waits behind it. Before the next lines the file says how many it lacks.
"""

from __future__ import annotations

import os
import time
from errno import EBUSY

from runtime.linux.aio import Writer
from runtime.zygote.log import clock

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

BUFFER_BYTES: Final = 4 << 20
STALL_S: Final = 5.0
_FLOW_BYTES: Final = 512 << 10
_CHUNK_BYTES: Final = 256 << 10
_SOON_S: Final = 0.001
_LATER_S: Final = 0.05
_PATIENCE_S: Final = 2.0  # with a write for which nobody can say that it waits for the disk
_HUNG_CHECKS: Final = 2
_TELL_S: Final = 1.0
_NONE: Final = (0, 0)


class Log:
    """One log file. `fd` is `open_log`'s, and this object's; `size` what is in it; 0 for `max_bytes` is no limit.

    `lost_lines` and `lost_bytes` of lines never got into it, the last of them because of `lost_why`.
    """

    __slots__ = (
        "_ahead", "_busy_since", "_fd", "_hung", "_on_room", "_pending", "_pending_bytes", "_spool", "_successor",
        "_telling", "_torn", "_untold", "_waiting", "_writer", "busy", "closing", "container_id", "lost_bytes",
        "lost_lines", "lost_why", "max_bytes", "path", "size",
    )  # fmt: skip

    def __init__(self, spool: Spool, container_id: str, path: str, fd: int, size: int, max_bytes: int) -> None:
        self._spool = spool
        self.container_id = container_id
        self.path = path
        self._fd = fd
        self.size = size
        self.max_bytes = max_bytes
        self.busy = False  # whether a write is on its way to the disk
        self._writer: Writer | None = None
        self._busy_since = 0.0
        self._hung = 0  # how often the write was found waiting for the disk
        self._pending: list[bytes] | None = None
        self._pending_bytes = 0
        self._torn = b""  # the rest of a line of which a part is in the file
        self._untold = _NONE  # lines and bytes that were lost, and the file doesn't say so yet
        self._telling = _NONE  # and of which it is being told
        self._ahead = 0  # how many of `_pending` come before those
        self._waiting: tuple[Callable[[int], None], ...] = ()
        self._on_room: tuple[Callable[[], None], ...] = ()
        self._successor: tuple[int, int, Callable[[int], None]] | None = None
        self.closing = False
        self.lost_lines = self.lost_bytes = 0
        self.lost_why = ""

    @property
    def full(self) -> bool:
        """Whether it has grown to its limit."""
        return 0 < self.max_bytes <= self.size

    def write(self, lines: bytes) -> None:
        """Take whole lines."""
        if self._pending_bytes >= BUFFER_BYTES and self.stalled():
            self._lose(lines, "the disk did not answer")
            self._ahead = len(self._pending or ())
            return
        if self._pending:
            self._pending.append(lines)
        else:
            self._pending = [lines]
        self._pending_bytes += len(lines)
        if self.busy:
            self.poll()
        else:
            self._next()

    def crowded(self, on_room: Callable[[], None]) -> bool:
        """Whether its output had better wait; then `on_room` is called when it need not any more."""
        if self._pending_bytes < self._flow_bytes() or self.stalled():
            return False
        self._on_room += (on_room,)
        return True

    def _flow_bytes(self) -> int:
        """How much may wait: little while the disk is only slower than the container, for that takes memory."""
        slow = self.busy and time.monotonic() - self._busy_since >= _LATER_S
        return BUFFER_BYTES if slow else _FLOW_BYTES

    def stalled(self) -> bool:
        """Whether the disk doesn't answer."""
        return self.busy and time.monotonic() - self._busy_since >= STALL_S

    def flush(self, done: Callable[[int], None]) -> None:
        """Have `done` called when all lines are in the file or lost, with 0; or with EBUSY where that takes long."""
        if not self.busy:
            done(0)
        elif self.hung:
            done(EBUSY)
        else:
            self._waiting += (done,)

    def reopen(self, fd: int, size: int, done: Callable[[int], None]) -> None:
        """Go on in this new file, which is the object's; `done` is called with 0 once nothing goes to the old one.

        Or with EBUSY, and the old one goes on.
        """
        if self._successor:
            self._reopened(EBUSY)
        self._successor = fd, size, done
        if not self.busy:
            self._reopened(0)
        elif self.hung:
            self._reopened(EBUSY)

    @property
    def hung(self) -> bool:
        """Whether who waited was told that it takes long."""
        return self._hung >= _HUNG_CHECKS

    def close(self) -> None:
        """The container has ended and is forgotten: the file is closed when all is in it."""
        self.closing = True
        if not self.busy:
            os.close(self._fd)

    def abandon(self) -> None:
        """The monitor ends: what waits is lost."""
        self._drop("the disk did not answer")

    def due_s(self) -> float:
        """How soon `poll` is to be called, where it is `busy`."""
        wanted = self._pending or self._waiting or self._successor
        return min(max(time.monotonic() - self._busy_since, _SOON_S), _LATER_S) if wanted else _LATER_S

    def poll(self) -> None:
        """See how the write is doing, and go on."""
        assert self._writer
        try:
            written, why = self._writer.result(), "no space left on device"  # as the next write would say
        except OSError as error:
            written, why = 0, (error.strerror or "").lower()
        if written is None:
            self._still_writing()
        else:
            data = self._writer.data
            self._written(data, written, why)
            self._next(well=written == len(data))

    # Writing

    def _written(self, data: bytes, count: int, why: str) -> None:
        """The write of `data` has ended; `why` is what is wrong if `count` is less than all of it."""
        self.busy, self._hung = False, 0
        self.size += count
        whole = count == len(data)
        if self._torn:
            self._torn = self._torn[count:]
        elif whole:
            pass
        elif self._telling[0]:
            if count:
                self._torn = data[count:]
            else:
                self._untold = self._untold[0] + self._telling[0], self._untold[1] + self._telling[1]
        else:
            end = data.find(b"\n", count) + 1 if count and data[count - 1 : count] != b"\n" else count
            self._torn = data[count:end]
            self._lose(data[end:], why)
        self._telling = _NONE
        if not whole:
            self._drop(why)
        if self._successor:
            self._reopened(0)
        if self.full:
            self._spool.news(self)

    def _next(self, *, well: bool = False) -> None:
        """Begin the next write, if there is any. `well`: the last one was, so what the file lacks can be told, too."""
        if self._pending or (well and (self._torn or self._untold[0])):
            if self._torn:
                data = self._torn
            elif self._untold[0] and self._ahead <= 0:
                data = self._note()
            else:
                data = self._take()
            self._begin(data)
        if not self.busy:
            if self._writer:  # until there is something to write again
                self._writer = None
                self._spool.done(self)
            self._answer(0)
            if self.closing:
                os.close(self._fd)
        if self._on_room and self._pending_bytes < _FLOW_BYTES // 2:
            self._make_room()

    def _begin(self, data: bytes) -> None:
        if not self._writer:
            self._writer = self._spool.writer()
            self._spool.begun(self)
        self._busy_since = time.monotonic()
        try:
            self._writer.begin(self._fd, data)
        except OSError as error:
            self._written(data, 0, (error.strerror or "").lower())
        else:
            self.busy = True

    def _take(self) -> bytes:
        """Some of the lines that wait."""
        assert self._pending
        most = self._ahead if self._untold[0] else len(self._pending)
        count = size = 0
        while count < most and size < _CHUNK_BYTES:
            size += len(self._pending[count])
            count += 1
        data = self._pending[0] if count == 1 else b"".join(self._pending[:count])
        self._pending = self._pending[count:] or None
        self._pending_bytes -= size
        self._ahead -= count
        return data

    def _note(self) -> bytes:
        """The line that says how many are missing before it."""
        self._telling, self._untold = self._untold, _NONE
        lines, size = self._telling
        text = f" stderr F crib: {lines} lines ({size} bytes) of this log are missing here: {self.lost_why}\n"
        return clock.now() + text.encode()

    def _drop(self, why: str) -> None:
        """Lose all that waits."""
        if self._pending:
            self._lose(b"".join(self._pending), why)
            self._pending = None
        self._pending_bytes = self._ahead = 0

    def _lose(self, data: bytes, why: str) -> None:
        lines = data.count(b"\n")
        if lines:
            self.lost_lines += lines
            self.lost_bytes += len(data)
            self._untold = self._untold[0] + lines, self._untold[1] + len(data)
            self.lost_why = why
            self._spool.news(self)

    def _reopened(self, errno: int) -> None:
        assert self._successor
        (fd, size, done), self._successor = self._successor, None
        if errno:
            os.close(fd)
        else:
            os.close(self._fd)
            self._fd, self.size = fd, size
            self._torn = b""  # the line's end has nowhere to go
        done(errno)

    # A disk that doesn't answer

    def _still_writing(self) -> None:
        since_s = time.monotonic() - self._busy_since
        if self._on_room and (since_s >= STALL_S or self._pending_bytes < self._flow_bytes()):
            self._make_room()
        if (self._waiting or self._successor) and since_s >= _LATER_S and not self.hung:
            self._hung = _HUNG_CHECKS if since_s >= _PATIENCE_S else self._hung + 1 if _waits_for_disk() else 0
            if self.hung:
                self._give_up()

    def _give_up(self) -> None:
        """Tell who waits that it takes long."""
        self._answer(EBUSY)
        if self._successor:
            self._reopened(EBUSY)

    def _answer(self, errno: int) -> None:
        waiting, self._waiting = self._waiting, ()
        for done in waiting:
            done(errno)

    def _make_room(self) -> None:
        on_room, self._on_room = self._on_room, ()
        for call in on_room:
            call()


def _waits_for_disk() -> bool:
    """Whether a thread of this process is in an uninterruptible sleep, or stopped, which comes to the same."""
    own = str(os.getpid())
    for task in os.listdir("/proc/self/task"):
        if task != own:
            try:
                with open(f"/proc/self/task/{task}/stat", "rb", buffering=0) as file:
                    if file.read(256).rpartition(b")")[2].split()[0] in b"DTt":
                        return True
            except OSError:  # it has ended
                pass
    return False


class Spool:
    """The logs of one pod. `tell` is called with the id of a container whose log has news, once a second at most.

    Those are that it loses output, and that it has grown to its limit. `writer` makes what writes.
    """

    __slots__ = ("_busy", "_news", "_tell", "_told_at", "writer")

    def __init__(self, tell: Callable[[str], None], writer: Callable[[], Writer] = Writer) -> None:
        self._tell = tell
        self.writer = writer
        self._busy: tuple[Log, ...] = ()
        self._news: tuple[str, ...] = ()
        self._told_at = -_TELL_S

    def begun(self, log: Log) -> None:
        """A log is being written from now on."""
        self._busy += (log,)

    def done(self, log: Log) -> None:
        """It isn't any more."""
        self._busy = tuple(each for each in self._busy if each is not log)

    def news(self, log: Log) -> None:
        """There is something to tell of a log."""
        if log.container_id not in self._news:
            self._news += (log.container_id,)

    def expire(self) -> float:
        """Do what is due by now; seconds until the next is, -1 where there is none."""
        due = -1.0
        for log in self._busy:
            log.poll()
            if log.busy:
                due = log.due_s() if due < 0 else min(due, log.due_s())
        if self._news:
            left = self._told_at + _TELL_S - time.monotonic()
            if left <= 0:
                self._tell_news()
            else:
                due = left if due < 0 else min(due, left)
        return due

    def _tell_news(self) -> None:
        self._told_at = time.monotonic()
        news, self._news = self._news, ()
        for container_id in news:
            self._tell(container_id)

    @property
    def idle(self) -> bool:
        """Whether all is written that can be."""
        return all(log.hung for log in self._busy)

    def end(self) -> bool:
        """Give up what waits. Whether a write hangs, which keeps this process from going."""
        for log in self._busy:
            log.abandon()
        self._tell_news()
        return bool(self._busy)

"""A program that is killed before its Nth change to a file system: a supervisor is asked first (seccomp_unotify(2)).

What the program has started goes on when it is killed, as on a node: its next changes wait until the store that it has
left behind was looked at.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.linux.libseccomp import ALLOW, MASKED_EQ, Comparison, context, number
from tests.limits import scaled

ROOT = Path(__file__).parent.parent.parent.parent
_USER_NOTIF = 0x7FC00000
_NEW_LISTENER = 1 << 3
_RECV, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_NOTIFICATION, _ANSWER = struct.Struct("=QII64s"), struct.Struct("=QqiI")
# Changes, and what makes them last; sockets, pipes and the bytes of a file alone don't count.
_CALLS = (
    "mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat mknod mknodat"
    " chmod fchmod fchmodat fchmodat2 chown lchown fchown fchownat utimensat setxattr lsetxattr fsetxattr"
    " ftruncate fsync fdatasync syncfs sync pwrite64"
)
# Hands the listener over and becomes the program.
_START = """
import socket, sys
from runtime.linux.seccomp import Filter
with socket.socket(fileno=int(sys.argv[1])) as supervisor:
    socket.send_fds(supervisor, [b"x"], [Filter(bytes.fromhex(sys.argv[2])).load({flags})])
program, sys.argv[1:4] = sys.argv[3], []
exec(program)
"""


def _changes() -> bytes:
    with context(ALLOW) as made:
        for name in _CALLS.split():
            if (call := number(name)) is not None and call >= 0:
                made.add_rule(_USER_NOTIF, call, ())
        for name, argument in (("open", 1), ("openat", 2)):
            if (call := number(name)) is not None and call >= 0:
                made.add_rule(_USER_NOTIF, call, (Comparison(argument, MASKED_EQ, os.O_CREAT, os.O_CREAT),))
        return made.export()


class _Supervisor:
    """Answers each notification; kills `process` before change number `last`, and holds those that come after it."""

    def __init__(self, process: subprocess.Popen[bytes], listener: int, last: int) -> None:
        self._process = process
        self._listener = listener
        self._last = last
        self._held: list[int] = []
        self._release, self._released = os.pipe()
        self.count = 0
        self.killed = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._release, select.POLLIN)
        while True:
            for fd, event in poll.poll():
                if fd == self._release:
                    poll.unregister(fd)
                    self._last = sys.maxsize
                    for id in self._held:
                        self._answer(id)
                elif event & select.POLLIN:
                    self._one()
                else:  # nobody is left
                    return

    def _one(self) -> None:
        notification = array.array("B", bytes(_NOTIFICATION.size))
        try:
            fcntl.ioctl(self._listener, _RECV, notification)
        except OSError as error:
            if error.errno != errno.ENOENT:  # it has been killed meanwhile
                raise
            return
        id, _, _, _ = _NOTIFICATION.unpack(notification)
        self.count += 1
        if self.count == self._last:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self.killed.set()
        if self.count >= self._last:
            self._held.append(id)
        else:
            self._answer(id)

    def _answer(self, id: int) -> None:
        try:
            fcntl.ioctl(self._listener, _SEND, array.array("B", _ANSWER.pack(id, 0, 0, _CONTINUE)))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def close(self) -> None:
        """Let what is left of the program go on, and wait until it has ended."""
        os.write(self._released, b"x")
        self._thread.join(scaled(30))
        assert not self._thread.is_alive(), "what the program has started doesn't end"
        for fd in (self._listener, self._release, self._released):
            os.close(fd)


@contextmanager
def ended_before(change: int, program: str, *arguments: str | Path) -> Iterator[int]:
    """The program has been killed before this change of it, or has ended (0: let it). Gives how many changes it made.

    It has ended well, or been killed.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        start = _START.format(flags=_NEW_LISTENER)
        command = [sys.executable, "-c", start, str(theirs.fileno()), _changes().hex(), program, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=(theirs.fileno(),))
        theirs.close()
        _, [listener], _, _ = socket.recv_fds(ours, 1, 1)
    supervisor = _Supervisor(process, listener, change or sys.maxsize)
    try:
        status = process.wait(scaled(60))
        if not supervisor.killed.is_set():
            assert status == 0, f"the program ended with {status}"
        yield supervisor.count - (1 if supervisor.killed.is_set() else 0)
    finally:
        process.kill()
        process.wait()
        supervisor.close()

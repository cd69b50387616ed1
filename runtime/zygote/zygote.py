"""The zygote: a lean interpreter with everything loaded, which forks monitors (and runners of hooks), nothing else.

A monitor's memory is what it touches after the fork: reference counts are written, so every object that is used is
a page of its own. Hence the warm-up: what fills caches by being used once (the interpreter specializes code, types
remember lookups) is used here, before the fork.
"""

from __future__ import annotations

import array  # noqa: F401 - loaded now: socket.recv_fds imports it when called
import codecs
import gc
import os
import select
import signal
import socket
import sys

from runtime.linux.aio import Writer
from runtime.linux.mount import detached
from runtime.linux.namespaces import setns
from runtime.linux.process import PR_SET_DUMPABLE, prctl, set_title
from runtime.zygote.hookrunner import run_stage
from runtime.zygote.log import Stream
from runtime.zygote.messages import Kind, close_all, pack, receive, send
from runtime.zygote.monitor import Monitor
from runtime.zygote.podspace import PodSpace
from runtime.zygote.rehearsal import rehearse_child
from runtime.zygote.spare import Spare, become_monitor
from runtime.zygote.spool import Log, Spool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UNHEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ)
"""What does nothing to this process nor to monitors. Handled, and not ignored as Python does with the last two: that
would stay so after execve."""
_WARM_UP_ROUNDS = 12  # the interpreter specializes a function at its eighth call
_FAILING_PLAN = pack([["FindExecutable", "nothing", "/"]])
_POD: dict[str, Any] = {
    "net": True,
    "ipc": True,
    "pid": False,
    "uids": (),
    "gids": (),
    "hostname": "warm-up",
    "sysctls": {"net.ipv4.ip_unprivileged_port_start": "0"},
    "shm_bytes": 4096,
    "shm_path": "",
    "mount_label": "",
}
_START = {
    "id": "c",
    "plan": _FAILING_PLAN,
    "clone_dir": "",
    "kill_dirs": [],
    "memory_events": "",
    "pid": "host",
    "pid_ns": "",
    "own_pid": True,
    "watches": False,
    "terminal": False,
    "stdin": False,
    "stdin_once": False,
    "log": "/dev/null",
    "log_size": 0,
    "log_max_bytes": 0,
    "cgroup": "",
}
_WARM_UP: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    (Kind.POD, False, {"init_cgroup": [], **_POD}),
    (Kind.PREPARE, False, {**_START, "log": ""}),
    (Kind.START, True, _START),
    (Kind.FACTS, False, {}),
)


class Zygote:
    """Serves one cribd on `control`, until that is closed. Its monitors live on."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._spare = Spare()

    def serve(self) -> None:
        """Have a monitor per SPAWN message, fork a runner per RUNNER message; return when cribd is gone."""
        self._settle()
        while message := self._next():
            kind, fields, fds = message
            if kind == Kind.RUNNER or (kind == Kind.SPAWN and not (fields["usual"] and self._spare.give(fields, fds))):
                self._fork(kind, fields, fds)
            close_all(fds)
        self._spare.end()

    def _next(self) -> tuple[str, dict[str, Any], list[int]] | None:
        """The next message. A spare monitor is made while there is none, and made anew when it has become old."""
        while not select.select([self._control], [], [], self._spare.due_s)[0]:
            self._spare.end()
            if self._spare.make() == 0:
                self._control.close()
                self._spare.wait_for_pod()
        return receive(self._control)

    def _fork(self, kind: str, fields: dict[str, Any], fds: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            send(self._control, Kind.FAILED, re=fields["n"], errno=error.errno, detail="fork a process")
            return
        if pid == 0:
            self._control.close()
            self._spare.close()
            if kind == Kind.RUNNER:
                run_stage(socket.socket(fileno=fds[0]))
            become_monitor(fields, fds[0], PodSpace())

    def _settle(self) -> None:
        """Everything is loaded: from here on nothing is imported, by anybody."""
        set_title(b"crib-zygote")
        for number in _UNHEEDED:
            signal.signal(number, lambda *_: None)
        for encoding in ("ascii", "utf-8", "latin-1"):
            codecs.lookup(encoding)
        sys.path.clear()
        sys.meta_path.clear()
        sys.path_hooks.clear()
        sys.path_importer_cache.clear()
        prctl(PR_SET_DUMPABLE, 0)
        os.chdir("/")
        signal.signal(signal.SIGCHLD, lambda *_: None)
        _warm_up()
        signal.signal(signal.SIGCHLD, _reap)
        gc.collect()
        _fill_pools()
        gc.freeze()
        gc.disable()
        send(self._control, Kind.OK, re=0, pid=os.getpid())


_POOL_BYTES = 16384  # obmalloc.c
_fillers: list[object] = []


def _fill_pools() -> None:
    """Use up the free blocks that are strewn over the allocator's pools, so that a monitor's objects lie together.

    A block at the beginning of a pool means that no older pool had a free one of its size.
    """
    for size in range(48, 513, 16):  # smaller ones are shared more evenly than this would leave them (measured)
        for _ in range(_POOL_BYTES):
            filler = bytes(size - sys.getsizeof(b""))
            _fillers.append(filler)
            if id(filler) % _POOL_BYTES < 64 + size:
                break


_zygote_pid = os.getpid()


def _reap(*_: object) -> None:
    """The zygote waits for monitors that end. A monitor inherits this handler, and reaps in its own loop."""
    while os.getpid() == _zygote_pid:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _warm_up() -> None:
    """Go through a monitor's life, some times, and be left in the namespaces that this process was in before."""
    before = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in ("net", "ipc", "uts")]
    directory = detached("tmpfs", ())
    for _ in range(_WARM_UP_ROUNDS):
        _live(f"/proc/self/fd/{directory}")
        _log()
        rehearse_child()
    for namespace in before:
        setns(namespace, 0)
    close_all([directory, *before])


class _Rehearsal(Writer):
    """Writes nothing: a forked process must not think that it has the C library's thread."""

    def begin(self, fd: int, data: bytes) -> None:
        self.data = data

    def result(self) -> int | None:
        return len(self.data)


def _log() -> None:
    """A container's output on its way to a log, as often as one thing may happen between two others."""
    spool = Spool(lambda _: None, _Rehearsal)
    log = Log(spool, "c", "/dev/null", os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC), 0, 0)
    stream = Stream(log.write, b"stdout")
    stream.feed(b"1\n")
    spool.expire()
    stream.feed(b"2\n3")
    stream.feed(b"\n4")
    log.flush(lambda _: None)
    spool.expire()
    spool.expire()
    log.close()


def _live(directory: str) -> None:
    """A monitor's life, in this process and without making anything that lasts."""
    cribd, monitors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    with cribd:
        monitor = Monitor("warm-up", directory, monitors, PodSpace())
        wake = monitor.wake_on_signals()
        for kind, fds, fields in _WARM_UP:
            send(cribd, kind, (log,) if fds else (), n=1, **fields)
            monitor.turn()
            while select.select([cribd], [], [], 0)[0] == []:
                monitor.turn()
            message = receive(cribd)
            close_all(message[2] if message else [])
        signal.set_wakeup_fd(-1)
        os.close(wake)
        monitor.close()
    os.close(log)

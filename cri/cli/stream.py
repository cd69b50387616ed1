"""An exec's or attach's streams on this command's own descriptors: WebSocket channels of version 5, and terminals.

One thread and one `poll`, so that a signal ends it anywhere; the terminal's modes are put back whatever the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import ssl
import sys
import termios
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    RejectConnection,
    RejectData,
    Request,
)

from cri.cli import failure
from cri.cli.failure import Failure, Interrupted

_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE, _CLOSE = 0, 1, 2, 3, 4, 255
_READ_BYTES: Final = 32 << 10
_UNSENT_BYTES: Final = 256 << 10
"""Of input that cribd has not taken: above it, no more is read."""
_CONNECT_S: Final = 30
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
DETACH: Final = b"\x10\x11"
"""Ctrl-P Ctrl-Q, docker's keys for it."""


class Streams:
    """The streams behind an address that cribd gave out; this command's standard ones are the other ends.

    `stdin`: whether input is passed on; `terminal`: whether the other side is one, so that this one is raw meanwhile.
    `detaches`: whether `DETACH` on a terminal ends this without ending the other side. Raises Failure.
    """

    def __init__(self, url: str, *, stdin: bool, terminal: bool, detaches: bool = False) -> None:
        self._stdin = stdin
        self._terminal = terminal
        self._raw = terminal and stdin and os.isatty(0)
        self._keys = b"" if detaches and self._raw else None  # those of DETACH that have been typed
        self._frames = WSConnection(ConnectionType.CLIENT)
        self._unsent = bytearray()
        self._channel = -1  # of the message that is under way
        self._status = b""
        self._over = self._detached = False
        self._waits = selectors.PollSelector()  # epoll refuses files
        self._sock = _connect(url)
        try:
            self._upgrade(url)
        except BaseException:
            self._sock.close()
            raise

    def run(self) -> int | None:
        """The exit code, when the other side has ended; None when detached. Raises Failure, or Interrupted."""
        with self._sock, _signals() as woken, self._modes():
            self._sock.setblocking(False)
            self._waits.register(self._sock, selectors.EVENT_READ)
            self._waits.register(woken, selectors.EVENT_READ)
            if self._stdin and sys.stdin is not None:
                self._waits.register(0, selectors.EVENT_READ)
            elif self._stdin:
                self._end_input()
            self._resize()
            self._handle()  # what came with the server's consent: only now is the terminal ready for it
            while not self._over:
                self._turn(woken)
        return None if self._detached else self._code()

    def _turn(self, woken: int) -> None:
        self._waits.modify(self._sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0))
        for key, events in self._waits.select():
            if key.fd == woken:
                if signal.SIGCONT in os.read(woken, 512):
                    self._make_raw()  # whoever has stopped this command may have used the terminal
                self._resize()
            elif key.fd == 0:
                self._typed()
            elif events & selectors.EVENT_READ:
                self._received()
            else:
                self._flush()

    # To cribd

    def _send(self, channel: int, data: bytes) -> None:
        self._unsent += self._frames.send(BytesMessage(data=bytes((channel,)) + data))
        self._flush()
        if self._stdin and 0 in self._waits.get_map() and len(self._unsent) > _UNSENT_BYTES:
            self._waits.unregister(0)

    def _flush(self) -> None:
        try:
            del self._unsent[: self._sock.send(self._unsent)]
        except (BlockingIOError, ssl.SSLWantWriteError):
            return
        except OSError:  # its last words may still be there to be read
            self._unsent.clear()
        if self._stdin and 0 not in self._waits.get_map() and len(self._unsent) <= _UNSENT_BYTES:
            self._waits.register(0, selectors.EVENT_READ)

    def _typed(self) -> None:
        data = os.read(0, _READ_BYTES)
        if not data:
            self._waits.unregister(0)
            self._end_input()
        elif self._keys is None:
            self._send(_STDIN, data)
        else:
            self._detach_or_send(data)

    def _end_input(self) -> None:
        self._stdin = False
        self._send(_CLOSE, bytes((_STDIN,)))

    def _detach_or_send(self, data: bytes) -> None:
        assert self._keys is not None
        data = self._keys + data
        if DETACH in data:
            self._over = self._detached = True
            data = data.partition(DETACH)[0]
        self._keys = DETACH[:1] if data.endswith(DETACH[:1]) else b""  # it may be the first of the two
        if data := data.removesuffix(self._keys):
            self._send(_STDIN, data)

    def _resize(self) -> None:
        if self._terminal and os.isatty(1):
            columns, rows = os.get_terminal_size(1)
            self._send(_RESIZE, json.dumps({"Width": columns, "Height": rows}).encode())

    # From cribd

    def _upgrade(self, url: str) -> None:
        parts = urlsplit(url)
        request = Request(host=parts.netloc, target=parts.path, subprotocols=["v5.channel.k8s.io"])
        self._sock.sendall(self._frames.send(request))
        refusal = b""
        while data := self._sock.recv(_READ_BYTES):
            self._frames.receive_data(data)
            for event in self._frames.events():
                if isinstance(event, AcceptConnection):
                    return
                if isinstance(event, RejectData):
                    refusal += event.data
                elif isinstance(event, RejectConnection) and not event.has_body:
                    break
        why = refusal.decode(errors="replace").strip() or "it closed the connection"
        raise Failure(f"cribd refuses the streams: {why}")

    def _received(self) -> None:
        while not self._over:
            try:
                data = self._sock.recv(4 * _READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            except OSError:
                data = b""
            self._over = not data
            if data:
                self._frames.receive_data(data)
                self._handle()
            if not (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
                return

    def _handle(self) -> None:
        for event in self._frames.events():
            if isinstance(event, BytesMessage):
                self._message(bytes(event.data), event.message_finished)
            elif isinstance(event, Ping):
                self._unsent += self._frames.send(event.response())
            elif isinstance(event, CloseConnection):
                self._over = True
                return

    def _message(self, data: bytes, finished: bool) -> None:
        if self._channel < 0 and data:
            self._channel, data = data[0], data[1:]
        if self._channel == _ERROR:
            self._status += data
        elif self._channel in (_STDOUT, _STDERR) and data:
            output = (sys.stdout if self._channel == _STDOUT else sys.stderr).buffer
            output.write(data)
            output.flush()
        if finished:
            self._channel = -1

    def _code(self) -> int:
        """What the status on the error stream means."""
        if not self._status:
            raise Failure("the connection to cribd has ended before the command did", failure.UNREACHABLE)
        status = json.loads(self._status)
        if status["status"] == "Success":
            return 0
        if status.get("reason") == "NonZeroExitCode":
            return int(next(item["message"] for item in status["details"]["causes"] if item["reason"] == "ExitCode"))
        raise Failure(status.get("message", "it failed").removeprefix("Internal error occurred: "))

    # The terminal here

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        if not self._raw:
            yield
            return
        before = termios.tcgetattr(0)
        try:
            try:
                self._make_raw()
                yield
            finally:
                termios.tcsetattr(0, termios.TCSADRAIN, before)
        except Interrupted:  # it may have come just before that call, and it comes once
            termios.tcsetattr(0, termios.TCSADRAIN, before)
            raise

    def _make_raw(self) -> None:
        if self._raw:
            tty.setraw(0, termios.TCSADRAIN)


def tls() -> ssl.SSLContext:
    """For connections to cribd: who answers there it has said itself, over a socket that is root's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname
    try:
        sock = socket.create_connection((parts.hostname, parts.port or 443), _CONNECT_S)
        if parts.scheme == "https":
            sock = tls().wrap_socket(sock)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Failure(
            f"cannot reach cribd's streaming server at {parts.netloc}: {reason}", failure.UNREACHABLE
        ) from error
    return sock


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """The first signal that is to end this raises Interrupted, even in a write; others make the descriptor readable."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    heeded = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, _end) for number in heeded}
    before |= {number: signal.signal(number, _pass) for number in (signal.SIGWINCH, signal.SIGCONT)}
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def _end(number: int, frame: FrameType | None) -> None:
    for other in _ENDING:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def _pass(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor tells it."""

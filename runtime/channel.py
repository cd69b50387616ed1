"""cribd's end of a socket to a zygote or a monitor: requests with replies, and events, in the asyncio loop."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextvars import Context
from dataclasses import dataclass
from errno import EMSGSIZE
from socket import socket
from typing import Any, Final

from runtime.errors import DeadlineExceeded, Unavailable
from runtime.linux.waits import waits
from runtime.zygote.messages import Kind, ProtocolError, close_all, receive, send

_REPLIES: Final = (Kind.OK, Kind.FAILED)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: OK or FAILED, its fields and its descriptors, which the asker owns."""

    kind: str
    fields: dict[str, Any]
    fds: list[int]


class Channel:
    """One non-blocking SEQPACKET socket, which it owns. `on_event` gets what is no reply, `on_closed` the end.

    `peer_pid`, where it is known, is whose waits are told when there is no answer.
    """

    def __init__(self, sock: socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, Callable[[Reply], None]] = {}
        self._last = 0
        self.peer_pid = 0
        self._outbox: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
        self.on_event: Callable[[str, dict[str, Any]], None] | None = None
        self.on_closed: Callable[[], None] | None = None
        Context().run(self._loop.add_reader, sock.fileno(), self._readable)  # events belong to no call of cribd's

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def post(self, kind: str, fds: tuple[int, ...], replied: Callable[[Reply], None], **fields: Any) -> int:
        """Send a request and go on; `replied` is called with the answer, or with FAILED when the peer is gone or the
        request is longer than a message may be.

        The descriptors stay the caller's. Returns the request's number. Raises Unavailable when the peer is gone.
        """
        if self.closed:
            raise Unavailable(f"{kind}: the connection is closed")
        self._last += 1
        fields["n"] = self._last
        self._waiting[self._last] = replied
        if self._outbox:
            self._outbox.append((kind, tuple(map(os.dup, fds)), fields))
        else:
            try:
                send(self._sock, kind, fds, **fields)
            except BlockingIOError:
                self._outbox.append((kind, tuple(map(os.dup, fds)), fields))
                self._loop.add_writer(self._sock.fileno(), self._writable)
            except OSError as error:
                if error.errno == EMSGSIZE:
                    self._refuse(kind, self._last)
                else:
                    del self._waiting[self._last]
                    raise Unavailable(f"{kind}: {(error.strerror or '').lower()}") from error
        return self._last

    def _refuse(self, kind: str, number: int) -> None:
        """A request can't be sent: it is longer than a message may be."""
        reply = Reply(Kind.FAILED, {"errno": EMSGSIZE, "detail": f"{kind}: {os.strerror(EMSGSIZE).lower()}"}, [])
        if waiter := self._waiting.pop(number, None):
            self._loop.call_soon(waiter, reply, context=Context())

    def forget(self, number: int) -> None:
        """Wait no longer for the answer to a request: there will be none."""
        self._waiting.pop(number, None)

    def request(self, kind: str, fds: tuple[int, ...], timeout_s: float, **fields: Any) -> Coroutine[Any, Any, Reply]:
        """Send a request, now, and return what waits for its answer.

        Raises Unavailable when the peer is gone; waiting raises DeadlineExceeded or Unavailable.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()

        def replied(reply: Reply) -> None:
            if future.done():
                close_all(reply.fds)  # too late: nobody will own them
            else:
                future.set_result(reply)

        return self._answer(kind, self.post(kind, fds, replied, **fields), future, timeout_s)

    async def _answer(self, kind: str, number: int, future: asyncio.Future[Reply], timeout_s: float) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):
                reply = await future
        except TimeoutError:
            where = waits(self.peer_pid) if self.peer_pid else ""
            raise DeadlineExceeded(f"no answer to {kind} within {timeout_s:g} s" + (where and f": {where}")) from None
        finally:
            if number in self._waiting:
                self._waiting[number] = lambda reply: close_all(reply.fds)
        if reply.fields.get("lost"):
            raise Unavailable(f"{kind}: {reply.fields['detail']}")
        return reply

    def close(self) -> None:
        """Close without calling `on_closed`; who waits is told that the peer is gone."""
        self.on_closed = None
        self._end()

    def _readable(self) -> None:
        why = "the other process is gone"
        try:
            message = receive(self._sock)
        except BlockingIOError:
            return
        except ProtocolError as error:
            message, why = None, str(error)
        except OSError:
            message = None
        if message is None:
            self._end(why)
            return
        kind, fields, fds = message
        waiter = self._waiting.pop(fields.get("re", 0), None) if kind in _REPLIES else None
        if waiter:
            waiter(Reply(kind, fields, fds))
            return
        close_all(fds)
        if self.on_event:
            self.on_event(kind, fields)

    def _writable(self) -> None:
        while self._outbox:
            kind, fds, fields = self._outbox[0]
            try:
                send(self._sock, kind, fds, **fields)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != EMSGSIZE:
                    self._end()
                    return
                self._refuse(kind, fields["n"])
            self._outbox.pop(0)
            close_all(list(fds))
        self._loop.remove_writer(self._sock.fileno())

    def _end(self, why: str = "the other process is gone") -> None:
        if self.closed:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds, _ in self._outbox:
            close_all(list(fds))
        self._outbox.clear()
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting.values():
            waiter(Reply(Kind.FAILED, {"lost": True, "errno": 0, "detail": why}, []))
        if self.on_closed:
            self.on_closed()

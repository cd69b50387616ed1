"""The one file of the streaming server that does I/O with clients: a connection, from its request to its end."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from cri.streaming.upgrade import Refused, Upgrade, Upgrader
from cri.streaming.wire import Event, Wire, WireError

if TYPE_CHECKING:
    from cri.streaming.flow import Hungry

CONNECTIONS_LIMIT: Final = 4096
LINGER_S: Final = 5.0
"""For the client to close first, when everything has been said: its own last words would else cost it ours."""
TURN_S: Final = 0.005
"""Of computing for what a client has sent; then it is not read for as long as that took, and others have their turn."""
BITE_BYTES: Final = 4 << 10
"""The least that is taken of it at a time, where that takes long: up to 64 times as much else."""
WAITING_HIGH_BYTES: Final = 1 << 20
"""Of what came from the client and has found no taker: above it, the connection is not read."""
WAITING_LIMIT_BYTES: Final = 64 << 20
"""Of the same, where the client keeps windows, and the connection is read because they are told on it."""
PROBE_S: Final = 1.0
"""Between pings for a client that isn't read: its kernel's answer to something is what tells that it has closed."""
WRITE_HIGH_BYTES: Final = 512 << 10
WRITE_LIMIT_BYTES: Final = 8 << 20
"""Of what the client does not read, its own pings' answers among them: above it, the connection is broken off."""
_logger = logging.getLogger(__name__)


class Session(Protocol):
    """What a connection is for."""

    def begin(self) -> None: ...
    def event(self, event: Event) -> None: ...
    def gone(self) -> None: ...


class Link(asyncio.Protocol):
    """One client's connection. `take_up` makes the session of an upgraded one. It is in `links` as long as it stands.

    `creation_s` is for the request, and then for the streams that it needs; `idle_s` without a byte ends it.
    """

    def __init__(
        self,
        take_up: Callable[[Link, Upgrade], Session],
        upgrader: Upgrader,
        links: set[Link],
        creation_s: float,
        idle_s: float,
    ) -> None:
        self.creation_s = creation_s
        self._idle_s = idle_s
        self._take_up = take_up
        self._upgrader = upgrader
        self._links = links
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._wire: Wire | None = None
        self._session: Session | None = None
        self._full = False
        self._hungry: list[Hungry] = []
        self._waiting_bytes = 0
        self._hang_up: select.epoll | None = None
        self._probing: asyncio.TimerHandle | None = None
        self._bite_bytes = BITE_BYTES
        self._left = b""  # of what came, for the next turn
        self._resting: asyncio.TimerHandle | None = None
        self._finishing = False
        self._active_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self._links) >= CONNECTIONS_LIMIT:
            transport.abort()
            return
        self._transport = transport
        self._links.add(self)
        self._set_timer(self.creation_s, self._late)
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        self._active_at = self._loop.time()
        if self._wire is None:
            self._request(data)
        else:
            self._take_in(data)

    def eof_received(self) -> bool | None:
        return False  # no client of these protocols goes on listening after it has closed

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._timer, self._resting):
            if timer:
                timer.cancel()
        self._watch_hang_up(False)
        self._transport = None
        self._links.discard(self)
        if self._session:
            self._session.gone()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._active_at = self._loop.time()
        self._feed_hungry()

    # From request to session

    def _request(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            upgrade = self._upgrader.feed(data)
            if upgrade is None:
                return
            session = self._take_up(self, upgrade)
        except Refused as refused:
            self._transport.write(refused.response)
            self._transport.close()
            return
        self._transport.write(upgrade.response)
        self._wire = upgrade.wire
        self._session = session
        self._set_timer(self._idle_s, self._idle)
        session.begin()
        self.flush()
        if upgrade.trailing:
            self._take_in(upgrade.trailing)

    def _take_in(self, data: bytes) -> None:
        """Take what came, as much as one turn allows."""
        assert self._transport
        self._left += data
        begin = end = time.thread_time()
        while self._left and end - begin < TURN_S and not (self._finishing or self._transport.is_closing()):
            bite, self._left = self._left[: self._bite_bytes], self._left[self._bite_bytes :]
            self._feed(bite)
            bitten, end = end, time.thread_time()
            quick = end - bitten < TURN_S / 2
            self._bite_bytes = min(2 * self._bite_bytes, 64 * BITE_BYTES) if quick else BITE_BYTES
        if self._finishing:
            self._left = b""  # nobody takes it any more
        if end - begin >= TURN_S and self._resting is None:
            self._transport.pause_reading()
            self._resting = self._loop.call_later(end - begin, self._rested)

    def _rested(self) -> None:
        self._resting = None
        if self._transport:
            self._take_in(b"")
        self._read_on()

    def _read_on(self) -> None:
        """Read the connection again, unless there is another reason not to."""
        if self._transport and self._hang_up is None and self._resting is None:
            self._transport.resume_reading()

    def _feed(self, data: bytes) -> None:
        assert self._wire and self._session
        try:
            events = self._wire.feed(data)
        except WireError as error:
            _logger.info("streaming client broken off", extra={"fields": {"error": str(error)}})
            self.flush()
            self.break_off()
            return
        for event in events:
            self._session.event(event)
        self._feed_hungry()
        self.flush()

    def _set_timer(self, delay_s: float, then: Callable[[], None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, then)

    def _late(self) -> None:
        """No complete request within the time for it."""
        if self._transport:
            self._transport.abort()

    def _idle(self) -> None:
        left = self._active_at + self._idle_s - self._loop.time()
        if left <= 0:
            self.break_off()
        else:
            self._set_timer(left, self._idle)

    # For the session and its flows

    def room(self, stream: int) -> int:
        """How many bytes may be sent on the stream now."""
        if self._full or self._wire is None:
            return 0
        room = self._wire.room(stream)
        if room <= 0:
            self.flush()
        return room

    def need_room(self, flow: Hungry) -> None:
        """Resume the flow when there may be room."""
        self._hungry.append(flow)

    def _feed_hungry(self) -> None:
        if self._hungry and not self._full:
            hungry, self._hungry = self._hungry, []
            for flow in hungry:
                flow.resume()

    def send(self, stream: int, data: bytes) -> None:
        if self._wire:
            self._wire.send(stream, data)
            self._active_at = self._loop.time()
            self.flush()

    def end(self, stream: int) -> None:
        if self._wire:
            self._wire.end(stream)
            self.flush()

    def reset(self, stream: int) -> None:
        if self._wire:
            self._wire.reset(stream)
            self.flush()

    def consumed(self, stream: int, size: int) -> None:
        if self._wire:
            self._wire.consumed(stream, size)
            self.flush()

    def waiting(self, size: int) -> None:
        """So many more bytes (or fewer) wait for a taker."""
        self._waiting_bytes += size
        if self._transport is None or self._wire is None or self._transport.is_closing() or self._finishing:
            return
        if self._hang_up is not None:
            if self._waiting_bytes <= WAITING_HIGH_BYTES:
                self._watch_hang_up(False)
                self._read_on()
        elif self._waiting_bytes > WAITING_HIGH_BYTES:
            if not self._wire.paced():
                self._transport.pause_reading()
                self._watch_hang_up(True)
            elif self._waiting_bytes > WAITING_LIMIT_BYTES:
                self._transport.abort()

    def flush(self) -> None:
        """Hand what the wire has to say to the transport."""
        if self._wire and self._transport and (data := self._wire.take()):
            self._transport.write(data)
            if self._transport.get_write_buffer_size() > WRITE_LIMIT_BYTES:
                self._transport.abort()

    def finish(self, *, say: bool) -> None:
        """The session is over. The client is expected to close; `say` tells it so in the protocol's words at once."""
        if self._wire is None or self._transport is None or self._finishing:
            return
        if say:
            self._wire.close()
        self.flush()
        self._finishing = True
        if self._hang_up is not None:
            self._watch_hang_up(False)
            self._read_on()
        self._set_timer(LINGER_S, lambda: self._close(self._idle_s))

    def break_off(self) -> None:
        """Close, once what was said has been sent, or `LINGER_S` have passed."""
        self._close(LINGER_S)

    def _close(self, patience_s: float) -> None:
        if self._transport:
            if self._wire:
                self._wire.close()
                self.flush()
            self._set_timer(patience_s, self._transport.abort)
            self._transport.close()

    def _watch_hang_up(self, on: bool) -> None:
        """While the connection is not read its end is seen by this, or by a probe where it is behind data."""
        if on and self._transport and self._hang_up is None:
            self._hang_up = select.epoll()
            fd = self._transport.get_extra_info("socket").fileno()
            self._hang_up.register(fd, select.EPOLLRDHUP)  # and a reset, always
            self._loop.add_reader(self._hang_up.fileno(), self._hung_up)
            self._probing = self._loop.call_later(PROBE_S, self._probe)
        elif not on and self._hang_up is not None:
            self._loop.remove_reader(self._hang_up.fileno())
            self._hang_up.close()
            self._hang_up = None
            if self._probing:
                self._probing.cancel()

    def _probe(self) -> None:
        """Say something: a client that reads is not disturbed, and of one that has closed the kernel says so."""
        if self._wire and self._transport and not self._transport.get_write_buffer_size():
            self._wire.ping()
            self.flush()
        self._probing = self._loop.call_later(PROBE_S, self._probe)

    def _hung_up(self) -> None:
        self._watch_hang_up(False)
        if self._transport:
            self._transport.abort()

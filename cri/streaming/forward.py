"""Port-forward: each connection of the client's is one to a port inside the pod's network namespace."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from typing import TYPE_CHECKING, Final

from cri.streaming.flow import Inflow, Outflow
from cri.streaming.spdy import Spdy
from cri.streaming.wire import Closed, Data, Ended, Event, Opened, Reset
from runtime.errors import CribError

if TYPE_CHECKING:
    from cri.streaming.link import Link
    from cri.streaming.request import Forward

CONNECT_S: Final = 30.0
_ADDRESSES: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_MAX_PORT: Final = 65535
_logger = logging.getLogger(__name__)


class _Connection:
    """One connection: its data stream and its error stream, which the client opens in any order."""

    __slots__ = ("data", "error", "inflow", "port", "task", "timer")

    def __init__(self, port: int) -> None:
        self.port = port
        self.data: int | None = None
        self.error: int | None = None
        self.inflow: Inflow | None = None
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None


class ForwardSession:
    """All connections of one client. One that breaks leaves the others alone.

    `wire` None: WebSocket channels, two for each port of the request, which start with the port's number.
    """

    def __init__(self, link: Link, request: Forward, wire: Spdy | None) -> None:
        self._link = link
        self._request = request
        self._wire = wire
        self._connections: dict[str, _Connection] = {}
        self._by_data: dict[int, str] = {}
        self._by_error: dict[int, str] = {}
        self._watching: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """The connection stands."""
        self._watching = asyncio.get_running_loop().create_task(self._end_with_pod())
        if self._wire is not None:
            return
        for number, port in enumerate(self._request.ports):
            connection = _Connection(port)
            self._connections[str(number)] = connection
            for stream in (2 * number, 2 * number + 1):
                self._link.send(stream, port.to_bytes(2, "little"))
            self._join(str(number), connection, data=2 * number)
            self._join(str(number), connection, error=2 * number + 1)

    async def _end_with_pod(self) -> None:
        """What is sent to a pod that is gone goes nowhere, and holds no socket; what it has said is still told."""
        await self._request.pod.monitor.over.wait()
        for connection in self._connections.values():
            if connection.inflow:
                connection.inflow.close()

    def event(self, event: Event) -> None:
        if isinstance(event, Data):
            connection = self._of_data(event.stream)
            if connection and connection.inflow:
                connection.inflow.feed(event.data)
            else:
                self._link.consumed(event.stream, len(event.data))
        elif isinstance(event, Opened):
            self._opened(event)
        elif isinstance(event, Ended):
            if (connection := self._of_data(event.stream)) and connection.inflow:
                connection.inflow.end()
        elif isinstance(event, Reset):
            if key := self._by_data.get(event.stream):
                self._drop(key)
        elif isinstance(event, Closed):
            self._link.break_off()

    def _of_data(self, stream: int) -> _Connection | None:
        key = self._by_data.get(stream)
        return self._connections.get(key) if key else None

    def _opened(self, event: Opened) -> None:
        assert self._wire is not None
        kind, text = event.headers.get("streamtype", ""), event.headers.get("port", "")
        port = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0
        if kind not in ("data", "error") or not 0 < port <= _MAX_PORT:
            self._link.reset(event.stream)
            return
        # Clients before requestid open the error stream first, and the data stream right after it.
        key = event.headers.get("requestid") or str(event.stream - (2 if kind == "data" else 0))
        connection = self._connections.get(key)
        if connection is None:
            connection = self._connections[key] = _Connection(port)
            connection.timer = asyncio.get_running_loop().call_later(self._link.creation_s, self._drop, key)
        elif getattr(connection, kind) is not None or connection.port != port:
            self._link.reset(event.stream)
            return
        self._wire.reply(event.stream)
        if kind == "data":
            self._join(key, connection, data=event.stream)
            if event.ended and connection.inflow:
                connection.inflow.end()
        else:
            self._join(key, connection, error=event.stream)

    def _join(self, key: str, connection: _Connection, data: int | None = None, error: int | None = None) -> None:
        if data is not None:
            connection.data = data
            self._by_data[data] = key
            connection.inflow = Inflow(self._link, data, release=_shut)
        if error is not None:
            connection.error = error
            self._by_error[error] = key
        if connection.data is not None and connection.error is not None:
            if connection.timer:
                connection.timer.cancel()
            connection.task = asyncio.get_running_loop().create_task(self._serve(key, connection))

    async def _serve(self, key: str, connection: _Connection) -> None:
        try:
            await self._forward(key, connection)
        except Exception:
            _logger.exception("forwarding a connection failed")
            self._drop(key)

    async def _forward(self, key: str, connection: _Connection) -> None:
        assert connection.data is not None and connection.error is not None and connection.inflow
        try:
            sock = await self._connect(connection.port)
        except CribError as error:
            self._link.send(connection.error, f"error forwarding port {connection.port}: {error}".encode())
            self._end(key, connection)
            return
        with sock:
            connection.inflow.open(fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))
            outflow = Outflow(self._link, connection.data, sock.detach())
        try:
            await outflow.ended.wait()
            self._link.end(connection.data)
            self._link.end(connection.error)  # for its end, kubectl until 1.27 waits before it ends its own half
            await connection.inflow.ended.wait()
            self._end(key, connection)
        finally:
            outflow.close()

    async def _connect(self, port: int) -> socket.socket:
        """A connection to the pod's own loopback address, IPv4's or else IPv6's. Raises CribError."""
        loop = asyncio.get_running_loop()
        tried = []
        for family, address in _ADDRESSES:
            sock = None
            try:
                sock = await self._request.pod.monitor.tcp_socket(family)
                async with asyncio.timeout(CONNECT_S):
                    await loop.sock_connect(sock, (address, port))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as error:  # TimeoutError is one
                tried.append(f"{address}: {os.strerror(error.errno).lower() if error.errno else 'timed out'}")
            except BaseException:
                if sock:
                    sock.close()
                raise
            if sock:
                sock.close()
        raise CribError(f"failed to connect to port {port} inside the pod ({', '.join(tried)})")

    def _end(self, key: str, connection: _Connection) -> None:
        for stream in (connection.data, connection.error):
            if stream is not None:
                self._link.end(stream)
        if self._wire is not None:
            self._forget(key, connection)
        if connection.inflow:
            connection.inflow.close()

    def _drop(self, key: str) -> None:
        """Give a connection up: its client did, or never completed it."""
        connection = self._connections.get(key)
        if connection is None:
            return
        for stream in (connection.data, connection.error):
            if stream is not None:
                self._link.reset(stream)
        self._forget(key, connection)
        self._stop(connection)

    def _forget(self, key: str, connection: _Connection) -> None:
        self._connections.pop(key, None)
        if connection.data is not None:
            self._by_data.pop(connection.data, None)
        if connection.error is not None:
            self._by_error.pop(connection.error, None)

    @staticmethod
    def _stop(connection: _Connection) -> None:
        if connection.timer:
            connection.timer.cancel()
        if connection.task:
            connection.task.cancel()
        if connection.inflow:
            connection.inflow.close()

    def gone(self) -> None:
        """The client is gone."""
        if self._watching:
            self._watching.cancel()
        for connection in self._connections.values():
            self._stop(connection)
        self._connections.clear()


def _shut(fd: int) -> None:
    """The client sends no more: so the port is told, and what it answers still comes by another descriptor."""
    sock = socket.socket(fileno=fd)
    with sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)

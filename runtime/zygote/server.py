"""A monitor's ears: one epoll, the path socket that cribd finds it by, and the connections on it."""

from __future__ import annotations

import os
import select
import socket

from runtime.zygote.messages import Kind, OtherVersion, ProtocolError, receive, send

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

SOCKET_NAME: Final = "monitor.sock"


class Server:
    """Calls who watches a descriptor when it is ready, and `on_request` for each message of cribd's; `on_gone` with a
    connection that is closed.

    `directory` is a descriptor of the directory that the path socket is made in.
    """

    def __init__(
        self,
        directory: int,
        on_request: Callable[[socket.socket, str, dict[str, Any], list[int]], None],
        on_gone: Callable[[socket.socket], None],
    ) -> None:
        self._directory = directory
        self._on_request = on_request
        self._on_gone = on_gone
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._connections: list[socket.socket] = []
        self._listener = self._listen()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        # By way of the directory's descriptor: a path socket's name is limited to 107 bytes.
        path = f"/proc/self/fd/{self._directory}/{SOCKET_NAME}"
        umask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(umask)
        listener.listen(8)
        self.watch(listener.fileno(), self._accept)
        return listener

    def turn(self, timeout_s: float) -> None:
        """Wait until something happens, for so long at most (-1: for ever), and have it handled."""
        for fd, _ in self._epoll.poll(timeout_s):
            handler = self._handlers.get(fd)
            if handler:
                handler()

    def watch(self, fd: int, handler: Callable[[], None], mask: int = select.EPOLLIN) -> None:
        """Have `turn` call `handler` when `fd` is ready."""
        self._handlers[fd] = handler
        self._epoll.register(fd, mask)

    def rewatch(self, fd: int, mask: int) -> None:
        """Be called for `mask` from now on; 0 leaves the peer's hanging up."""
        self._epoll.modify(fd, mask)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`; before `fd` is closed.

        epoll forgets a closed descriptor only when nobody has it any more, and a child that was just cloned has all of
        them: until it closes them, what epoll told of this one would be taken for another's that got its number.
        """
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def watched(self, fd: int, handler: Callable[[], None] | None = None) -> bool:
        """Whether anybody watches `fd`, or this one does."""
        return fd in self._handlers and handler in (None, self._handlers[fd])

    def handle(self, fd: int) -> None:
        """Call who watches `fd` now: something is known to be there."""
        self._handlers[fd]()

    def add(self, connection: socket.socket) -> None:
        """Take requests from `connection`, which is the server's from here on."""
        connection.setblocking(False)
        self._connections.append(connection)
        self.watch(connection.fileno(), lambda: self._request(connection))

    def send(self, connection: socket.socket, kind: str, fds: tuple[int, ...] = (), **fields: Any) -> None:
        """Answer on one connection; one that is gone is dropped."""
        try:
            send(connection, kind, fds, **fields)
        except OSError:  # gone, or it does not read: it will connect again and ask for the facts
            self._drop(connection)

    def tell(self, kind: str, **fields: Any) -> None:
        """Say something on all connections."""
        for connection in list(self._connections):
            self.send(connection, kind, **fields)

    def close(self) -> None:
        """Listen no more."""
        os.unlink(SOCKET_NAME, dir_fd=self._directory)
        self._listener.close()
        self._epoll.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self.add(connection)

    def _drop(self, connection: socket.socket) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self.unwatch(connection.fileno())
            connection.close()
            self._on_gone(connection)

    def _request(self, connection: socket.socket) -> None:
        try:
            message = receive(connection)
        except BlockingIOError:
            return
        except OtherVersion as error:
            self.send(connection, Kind.FAILED, re=error.number, errno=0, detail=str(error))
            return
        except (OSError, ProtocolError):
            message = None
        if message is None:
            self._drop(connection)
        else:
            self._on_request(connection, *message)

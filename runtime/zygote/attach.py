"""Clients attached to a container: they see its output and may give it input.

The container and its log come first. A client that doesn't read loses what its socket can't hold, and is told how
much; input that the container doesn't read waits with the client that sent it.
"""

from __future__ import annotations

import os
import select
import socket

from runtime.zygote.packets import DATA_BYTES, END, LOST, STDIN

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from runtime.zygote.container import Container
    from runtime.zygote.server import Server


class Client:
    """One attachment; `stdin` is whether it gives input."""

    __slots__ = ("_container", "_input", "_lost_bytes", "_pending", "_server", "_sock", "stdin")

    def __init__(self, server: Server, container: Container, sock: socket.socket, stdin: bool) -> None:
        self._server = server
        self._container = container
        self._sock = sock
        self._pending = b""
        self._input = -1  # a descriptor of the container's stdin, while that takes no more
        self._lost_bytes = 0
        self.stdin = stdin
        server.watch(sock.fileno(), self._readable)

    def show(self, tag: bytes, data: bytes) -> None:
        """Send output, or drop it and keep count."""
        try:
            if self._lost_bytes:
                self._sock.send(LOST + str(self._lost_bytes).encode("ascii"))
                self._lost_bytes = 0
            self._sock.sendmsg((tag, data))
        except BlockingIOError:
            self._lost_bytes += len(data)
        except OSError:  # it has gone: `_readable` is about to see that
            pass

    def end(self) -> None:
        """The container has ended: say so unless output was lost, and close."""
        if not self._lost_bytes:
            try:
                self._sock.send(END)
            except OSError:  # no room: then something is lost, or it has gone
                pass
        self.close()

    def _readable(self) -> None:
        if self._input >= 0:  # nothing is asked for now, so this is the end
            self.close()
            return
        try:
            packet = self._sock.recv(DATA_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.close()
        elif packet[:1] == STDIN and self.stdin:
            if len(packet) > 1:
                self._feed(packet[1:])
            else:
                self._end_input()

    def _feed(self, data: bytes) -> None:
        """Write to the container's stdin; what doesn't fit is kept, and nothing more is read until it did."""
        stdin = self._container.stdin
        if stdin < 0:
            return
        try:
            data = data[os.write(stdin, data) :]
        except BlockingIOError:
            pass
        except OSError:  # EPIPE: nobody will read this
            return
        self._pending = data
        if data:
            self._input = os.dup(stdin)  # each client watches one of its own
            self._server.rewatch(self._sock.fileno(), 0)
            self._server.watch(self._input, self._writable, select.EPOLLOUT)

    def _writable(self) -> None:
        self._stop_waiting()
        self._server.rewatch(self._sock.fileno(), select.EPOLLIN)
        self._feed(self._pending)

    def _stop_waiting(self) -> None:
        self._server.unwatch(self._input)
        os.close(self._input)
        self._input = -1

    def _end_input(self) -> None:
        container = self._container
        if container.stdin_once and container.terminal < 0 and container.stdin >= 0:
            for client in container.clients:
                if client._input >= 0:
                    client._stop_waiting()
                    self._server.rewatch(client._sock.fileno(), select.EPOLLIN)
            os.close(container.stdin)
            container.stdin = -1

    def close(self) -> None:
        """End the attachment; input that was to come once has come."""
        if self._input >= 0:
            self._stop_waiting()
        self._container.clients.remove(self)
        self._server.unwatch(self._sock.fileno())
        self._sock.close()
        if self.stdin:
            self._end_input()


def attach(server: Server, container: Container, fd: int, stdin: bool) -> None:
    """Attach the client at the other end of the socket `fd`, which is this function's from here on."""
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    container.clients.append(Client(server, container, sock, stdin))


def detach_all(container: Container) -> None:
    """The container has ended, and so do its attachments."""
    for client in list(container.clients):
        client.end()

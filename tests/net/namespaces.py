"""Network namespaces for tests: sockets of every kind that live inside, without the test's process going there.

One small program enters the namespaces and passes descriptors back, as crib's monitors do for cribd.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from net import rtnetlink
from net.netlink import Channel, Reply
from net.netns import Pins
from net.network import NetNs
from runtime.linux.mount import mount, umount
from tests.limits import scaled

_PROGRAM = Path(__file__).with_name("namespace_program.py")
_RTMGRP_LINK = 1
_SO_RCVBUFFORCE = 33
_DEADLINE_S = scaled(10)


@dataclass
class Namespace:
    """A namespace that lives until `end` (or as long as a pin or a socket does)."""

    fd: int
    rtnl: socket.socket
    make_socket: Callable[[int, int, int, int], socket.socket]

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket inside, with a deadline on everything it does."""
        made = self.make_socket(self.fd, family, kind, protocol)
        made.settimeout(_DEADLINE_S)
        return made

    def netns(self) -> NetNs:
        return NetNs(path=f"/proc/self/fd/{self.fd}", fd=self.fd, rtnl=self.rtnl)

    def channel(self) -> Channel:
        return Channel(opened=self.rtnl)

    def links(self) -> dict[str, rtnetlink.Link]:
        return {link.name: link for link in rtnetlink.links(self.channel().dump(rtnetlink.all_links()))}

    def end(self) -> None:
        """Let go of it; again is harmless."""
        self.rtnl.close()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class Maker:
    """Makes namespaces; a context manager that ends its program."""

    def __enter__(self) -> Self:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_DEADLINE_S)
        with other:
            arguments = [sys.executable, "-I", "-S", str(_PROGRAM), str(other.fileno())]
            self._process = subprocess.Popen(arguments, pass_fds=[other.fileno()])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()
        assert self._process.wait(_DEADLINE_S) == 0

    def new(self) -> Namespace:
        fd, rtnl = self._ask(b"new", [], 2)
        return Namespace(fd, socket.socket(fileno=rtnl), self._make_socket)

    def _make_socket(self, namespace: int, family: int, kind: int, protocol: int) -> socket.socket:
        (fd,) = self._ask(struct.pack("=iii", family, kind, protocol), [namespace], 1)
        return socket.socket(fileno=fd)

    def _ask(self, message: bytes, fds: list[int], count: int) -> list[int]:
        socket.send_fds(self._socket, [message], fds)
        _, received, _, _ = socket.recv_fds(self._socket, 1, count, socket.MSG_CMSG_CLOEXEC)
        assert len(received) == count
        return list(received)


class LinkWatch:
    """Sees links of this namespace go, from its creation on."""

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        self._socket.bind((0, _RTMGRP_LINK))
        self._socket.settimeout(_DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def gone(self, *names: str) -> None:
        """Wait until the links are gone."""
        waiting = set(names) & {name for _, name in socket.if_nameindex()}
        while waiting:
            data = self._socket.recv(1 << 16)
            length, kind = struct.unpack_from("=IH", data)
            if kind == rtnetlink.RTM_DELLINK:
                waiting -= {link.name for link in rtnetlink.links([Reply(kind, data[16:length])])}


@contextmanager
def pinned(namespace: Namespace, name: str) -> Iterator[str]:
    """The namespace as ip(8) and nsenter(1) find it; yields the path."""
    pins = Pins(mount, umount)
    path = pins.pin(namespace.fd, name)
    try:
        yield path
    finally:
        pins.unpin(path)


def talk(server: Namespace | None, client: Namespace | None, address: str, family: int = socket.AF_INET) -> str:
    """Send bytes both ways over TCP from `client` to `address` of `server` (None: here); the client's address there."""

    def make(namespace: Namespace | None) -> socket.socket:
        if namespace:
            return namespace.socket(family)
        made = socket.socket(family)
        made.settimeout(_DEADLINE_S)
        return made

    with make(server) as listener, make(client) as caller:
        listener.bind((address, 0))
        listener.listen(1)
        caller.connect((address, listener.getsockname()[1]))
        accepted, peer = listener.accept()
        with accepted:
            accepted.settimeout(_DEADLINE_S)
            caller.sendall(b"ping" * 1000)
            caller.shutdown(socket.SHUT_WR)
            accepted.sendall(accepted.makefile("rb").read())
            accepted.shutdown(socket.SHUT_WR)
            assert caller.makefile("rb").read() == b"ping" * 1000
    return str(peer[0])

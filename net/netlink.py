"""Netlink: framing, attributes and a socket that answers or raises, for rtnetlink and nfnetlink alike.

Messages are packed by hand because a pod's start waits for them: a general library takes five times as long for the
same requests, and longer to import than a pod takes to start. Sources: netlink(7), rtnetlink(7), linux/netlink.h.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

NETLINK_NETFILTER: Final = 12
TIMEOUT_S: Final = 5.0  # the kernel answers while it sends; only a lost or blocked reply takes long

NLM_F_REQUEST: Final = 0x01
NLM_F_ACK: Final = 0x04
NLM_F_DUMP_INTR: Final = 0x10
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
NLM_F_APPEND: Final = 0x800
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLMSGERR_ATTR_MSG: Final = 1
_NLA_F_NESTED: Final = 0x8000
_NLA_TYPE_MASK: Final = 0x3FFF
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NETLINK_DROP_MEMBERSHIP: Final = 2
_NETLINK_CAP_ACK: Final = 10
_NETLINK_EXT_ACK: Final = 11
_RECEIVE_BYTES: Final = 1 << 17  # a dump's datagrams are at most 32 KiB

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTR: Final = struct.Struct("=HH")


class NetlinkError(OSError):
    """The kernel refused a request: `index` is its place among those sent together."""

    def __init__(self, number: int, text: str, index: int) -> None:
        super().__init__(number, text)
        self.index = index

    def __str__(self) -> str:
        return str(self.strerror)


@dataclass(frozen=True, slots=True)
class Request:
    """One message without its frame: type, flags beyond REQUEST and ACK, and the body."""

    kind: int
    flags: int
    body: bytes


class Reply(NamedTuple):
    """One message of a dump."""

    kind: int
    body: bytes


def attr(kind: int, value: bytes) -> bytes:
    """An attribute with its padding."""
    return _ATTR.pack(len(value) + 4, kind) + value + bytes(-len(value) & 3)


def text(kind: int, value: str) -> bytes:
    """A string attribute with the final zero that the kernel expects."""
    return attr(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """A number in the host's byte order (rtnetlink's way)."""
    return attr(kind, value.to_bytes(4, sys.byteorder))


def be32(kind: int, value: int) -> bytes:
    """A number in network byte order (nfnetlink's way)."""
    return attr(kind, value.to_bytes(4, "big"))


def nest(kind: int, *values: bytes) -> bytes:
    """An attribute of attributes."""
    return attr(kind | _NLA_F_NESTED, b"".join(values))


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes packed in `data`; of a repeated type the last one. Stops at the first that makes no sense."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTR.unpack_from(data, at)
        if length < 4:
            break
        found[kind & _NLA_TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


class Channel:
    """A netlink socket for one thread at a time; a context manager that closes what it opened itself."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE, *, opened: socket.socket | None = None) -> None:
        """Opens a socket in this thread's network namespace, or uses `opened`, which stays the caller's.

        Raises OSError; EPROTONOSUPPORT where the kernel lacks the protocol.
        """
        self._owned = opened is None
        self._socket = opened or socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._sequence = int.from_bytes(os.urandom(3), "big")  # replies to an earlier user of `opened` don't match

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self._socket.close()

    def send(self, requests: Sequence[Request], *, batch: tuple[Request, Request] | None = None) -> list[NetlinkError]:
        """Send the requests at once and wait for every acknowledgement; returns the errors, in order.

        `batch` frames them in nfnetlink's begin and end: then either all or none take effect.
        Raises TimeoutError, and NetlinkError when the batch itself is refused.
        """
        if not requests:
            return []  # the kernel refuses an empty datagram
        first = self._sequence + 1
        frames = [self._frame(request, NLM_F_ACK) for request in requests]
        waiting = set(range(first, self._sequence + 1))
        if batch:
            frames = [self._frame(batch[0], 0), *frames, self._frame(batch[1], 0)]
        self._socket.send(b"".join(frames))
        errors: list[NetlinkError] = []
        while waiting:
            for sequence, flags, kind, body in self._receive():
                if kind != _NLMSG_ERROR or not first <= sequence <= self._sequence:
                    continue
                error = _error(flags, body, sequence - first)
                if sequence not in waiting and error:
                    raise error  # of the batch's own frame
                waiting.discard(sequence)
                if error:
                    errors.append(error)
        return errors

    def do(self, *requests: Request) -> None:
        """Like `send`, and raises the first error."""
        for error in self.send(requests):
            raise error

    def get(self, request: Request) -> list[Reply]:
        """The one object that the request names; empty when there is none. Raises NetlinkError, TimeoutError."""
        self._socket.send(self._frame(request, 0))
        while True:
            for sequence, flags, kind, body in self._receive():
                if sequence != self._sequence:
                    continue
                if kind != _NLMSG_ERROR:
                    return [Reply(kind, body)]
                error = _error(flags, body, 0)
                if error and error.errno in (errno.ENODEV, errno.ENOENT):
                    return []
                raise error or NetlinkError(errno.EPROTO, "an answer without an object", 0)

    def dump(self, request: Request) -> list[Reply]:
        """All objects that the request asks for. Raises NetlinkError, TimeoutError."""
        for _ in range(8):
            replies, interrupted = self._dump(request)
            if not interrupted:
                break
        return replies

    @contextmanager
    def watch(self, group: int) -> Iterator[None]:
        """Let `notified` see what happens to the objects of a multicast group."""
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        try:
            yield
        finally:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_DROP_MEMBERSHIP, group)

    def notified(self, timeout_s: float) -> bool:
        """Wait for a notification; False when the time is over. Which it is, the caller finds out by asking."""
        self._socket.settimeout(max(timeout_s, 0.001))
        try:
            self._socket.recv(_RECEIVE_BYTES)
        except TimeoutError:
            return False
        finally:
            self._socket.settimeout(TIMEOUT_S)
        return True

    def _dump(self, request: Request) -> tuple[list[Reply], bool]:
        """One pass; the second value tells that the objects changed meanwhile (NLM_F_DUMP_INTR)."""
        self._socket.send(self._frame(request, NLM_F_DUMP))
        replies: list[Reply] = []
        interrupted = False
        while True:
            for sequence, flags, kind, body in self._receive():
                if sequence != self._sequence:
                    continue
                interrupted |= bool(flags & NLM_F_DUMP_INTR)
                if kind == _NLMSG_DONE:
                    return replies, interrupted
                if kind == _NLMSG_ERROR:
                    raise _error(flags, body, 0) or NetlinkError(errno.EPROTO, "a dump ended early", 0)
                replies.append(Reply(kind, body))

    def _frame(self, request: Request, flags: int) -> bytes:
        self._sequence += 1
        length = _HEADER.size + len(request.body)
        flags |= request.flags | NLM_F_REQUEST
        return _HEADER.pack(length, request.kind, flags, self._sequence, 0) + request.body + bytes(-length & 3)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Sequence, flags, type and body of each message in the next datagram from the kernel."""
        data, sender = self._socket.recvfrom(_RECEIVE_BYTES)
        if sender != (0, 0):
            return  # a notification, or not of the kernel: any process may send to a netlink socket
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size:
                return
            yield sequence, flags, kind, data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3


def _error(flags: int, body: bytes, index: int) -> NetlinkError | None:
    """The error in an NLMSG_ERROR's body (None: an acknowledgement), with the kernel's own words if any."""
    number = -int.from_bytes(body[:4], sys.byteorder, signed=True)
    if number == 0:
        return None
    message = os.strerror(number).lower()
    if flags & _NLM_F_ACK_TLVS:
        quoted = 0 if flags & _NLM_F_CAPPED else int.from_bytes(body[4:8], sys.byteorder) - _HEADER.size
        words = attributes(body[4 + _HEADER.size + ((quoted + 3) & ~3) :]).get(_NLMSGERR_ATTR_MSG, b"")
        if words:
            message += f" ({words.rstrip(bytes(1)).decode(errors='replace')})"
    return NetlinkError(number, message, index)

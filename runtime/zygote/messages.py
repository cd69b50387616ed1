"""The closed set of messages between cribd, the zygote and the monitors.

Each travels as one datagram of a SOCK_SEQPACKET socket: a mapping of plain values in the interpreter's own marshal
format, with descriptors beside it. What is larger than a datagram may be goes as a sealed memfd, the last descriptor.
Format 4 is written whatever the interpreter, so that a cribd on a newer Python talks to the monitors of an older one.
Both ends are root's, of one installation; what arrives is still checked (size, shape, kind) before it is used.

A monitor lives as long as its pod, so a later cribd has to talk to it. Within one VERSION fields are only added: to a
request such as an older monitor can do without, to an answer such as a later cribd does without. Plans are part of it:
an older monitor's child runs them, so a step's name and fields never change within one VERSION; a new step is one that
only new requests need. Any other change raises VERSION; then the two can't talk, and say so.

marshal and plain strings, not json and an enum: those run Python code, and each object that a monitor's code touches
is a page of memory of that monitor's own (0.2 MiB, measured).
"""

from __future__ import annotations

import array
import errno
import fcntl
import marshal
import os
import socket

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

VERSION: Final = 5
LIMIT_BYTES: Final = 4 << 20
_FORMAT: Final = 4
# Small, since the buffer to receive one is as large, and what a monitor allocates is memory of its own.
DATAGRAM_BYTES: Final = 8192
_INLINE_BYTES: Final = 8000
_MAX_FDS: Final = 16
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_CMSG_BYTES: Final = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)


class Kind:
    """What a message is. Requests carry `n`; their reply repeats it as `re`."""

    SPAWN = "spawn"  # cribd → zygote: fork a monitor; fds: its end of a socket pair
    RUNNER = "runner"  # cribd → zygote: fork a process that runs hooks; fds: its end of a socket pair
    HOOKS = "hooks"  # cribd → that process: run these
    POD = "pod"  # cribd → monitor: make the pod's namespaces; reply fds: net namespace, netlink socket
    SYSCTLS = "sysctls"  # cribd → monitor: set kernel parameters of the pod's namespaces
    PREPARE = "prepare"  # cribd → monitor: clone the process of a START to come, which waits for that
    START = "start"  # cribd → monitor: start a container by its plan
    EXEC = "exec"  # cribd → monitor: run a process in a container by its plan; fds: stdin, stdout, stderr
    # where it gets no terminal; reply fd: the terminal's master. A quiet one is only answered by FAILED
    ATTACH = "attach"  # cribd → monitor: share a container's streams; fd: a socket for runtime.zygote.attach's packets
    SOCKET = "socket"  # cribd → monitor: make a socket in the pod's network namespace; reply fd: that
    SIGNAL = "signal"
    KILL = "kill"  # kill a whole container, or an exec's process
    RESIZE = "resize"
    REOPEN = "reopen"  # cribd → monitor: go on with a log in a new file; fd: that
    PAUSED = "paused"  # monitor → cribd: a start waits for hooks
    RESUME = "resume"  # cribd → monitor: it may go on, or `detail` is wrong
    FORGET = "forget"  # drop the record of an exited container
    FACTS = "facts"  # what runs and what ended
    END = "end"  # the pod is over: kill what is left and exit
    OK = "ok"
    FAILED = "failed"
    EXITED = "exited"  # monitor → cribd: a container ended
    EXEC_EXITED = "exec-exited"
    LOG = "log"  # monitor → cribd: a container's log loses output, or has grown to its limit


KINDS: Final = frozenset(value for name, value in vars(Kind).items() if name.isupper())


class ProtocolError(Exception):
    """A message that is none of ours."""


class OtherVersion(ProtocolError):
    """A message of another build's; `number` is the request's, or of the request that it answers."""

    def __init__(self, version: object, number: int) -> None:
        super().__init__(f"it speaks version {version} of the messages, this process version {VERSION}")
        self.number = number


def send(sock: socket.socket, kind: str, fds: tuple[int, ...] = (), **fields: Any) -> None:
    """Send one message. Raises OSError: BlockingIOError when the peer's buffer is full, EMSGSIZE beyond LIMIT_BYTES."""
    fields["v"] = VERSION
    fields["k"] = kind
    data = pack(fields)
    if len(data) <= _INLINE_BYTES:
        if fds:
            socket.send_fds(sock, [data], fds)
        else:
            sock.send(data)
        return
    if len(data) > LIMIT_BYTES:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    memfd = os.memfd_create("crib-message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(memfd, view) :]
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
        big = pack({"v": VERSION, "k": kind, "big": len(data)})
        socket.send_fds(sock, [big], (*fds, memfd))
    finally:
        os.close(memfd)


def receive(sock: socket.socket) -> tuple[str, dict[str, Any], list[int]] | None:
    """Receive one message and its descriptors, which the caller owns; None at the end of the stream.

    Raises ProtocolError, or OSError.
    """
    data, ancillary, flags, _ = sock.recvmsg(DATAGRAM_BYTES, _CMSG_BYTES, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    received = list(fds)
    if not data and not received:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("truncated message")
        fields = _decode(data)
        if "big" in fields:
            fields = _decode(_read_memfd(received.pop(), fields["big"]))
        kind = fields.pop("k")
        if kind not in KINDS:
            raise ProtocolError(f"unknown kind {kind!r}")
        return kind, fields, received
    except (ValueError, KeyError, IndexError, TypeError, EOFError) as error:
        close_all(received)
        raise ProtocolError(f"bad message: {error}") from error
    except ProtocolError:
        close_all(received)
        raise


def pack(value: Any) -> bytes:
    """Plain values (None, numbers, strings, bytes, lists, tuples, mappings) as bytes; `marshal.loads` reads them."""
    return marshal.dumps(value, _FORMAT)


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def _decode(data: bytes) -> dict[str, Any]:
    fields = marshal.loads(data)
    if not isinstance(fields, dict):
        raise ProtocolError("not a mapping")
    version = fields.pop("v", None)
    if version != VERSION:
        raise OtherVersion(version, fields.get("n", 0))
    return fields


def _read_memfd(fd: int, size: int) -> bytes:
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ProtocolError("memfd is not sealed")
        if not 0 < size <= LIMIT_BYTES or os.fstat(fd).st_size != size:
            raise ProtocolError(f"memfd of {size} bytes")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)

"""News of nftables: that somebody has changed the ruleset, whoever it was and whatever in it.

The kernel ends its telling of each transaction with the ruleset's new number; the rest of it is filtered out before it
is queued, so that a big transaction costs its listener no more than a small one.

Sources: linux/netfilter/nf_tables.h (NFT_MSG_NEWGEN), socket(7) (SO_ATTACH_FILTER), linux/filter.h.
"""

import array
import socket
import struct
from typing import Final

from net.errors import Unsupported
from net.netlink import NETLINK_NETFILTER

_GROUP: Final = 7  # NFNLGRP_NFTABLES
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_SO_ATTACH_FILTER: Final = 26
_NEW_GENERATION: Final = 10 << 8 | 15
_TYPE_AT: Final = 4  # in nlmsghdr

_INSTRUCTION: Final = struct.Struct("=HBBI")  # code, jumps when true and false, constant
_LOAD_HALF: Final = 0x28
_JUMP_IF_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_PROGRAM: Final = (
    (_LOAD_HALF, 0, 0, _TYPE_AT),
    (_JUMP_IF_EQUAL, 0, 1, socket.htons(_NEW_GENERATION)),
    (_RETURN, 0, 0, 0xFFFFFFFF),
    (_RETURN, 0, 0, 0),
)


class Transactions:
    """Readable (`fileno`, for a selector) once there was a transaction that `drain` has not taken note of."""

    def __init__(self) -> None:
        """Listens from now on, in this thread's network namespace. Raises Unsupported."""
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
            )
        except OSError as error:
            raise Unsupported(f"the kernel has no nftables: {error.strerror}") from error
        try:
            program = array.array("B", b"".join(_INSTRUCTION.pack(*one) for one in _PROGRAM))
            filter_ = struct.pack("@HP", len(_PROGRAM), program.buffer_info()[0])
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
            self._socket.bind((0, 0))  # the kernel leaves out those without a number
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
        except OSError as error:
            self._socket.close()
            raise Unsupported(f"the kernel tells nothing of nftables: {error.strerror}") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> None:
        """Take note of all that there were."""
        while True:
            try:
                self._socket.recv(4096)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: more than the queue holds, and nobody asks how many
                continue

    def close(self) -> None:
        self._socket.close()

"""Makes network namespaces, and sockets inside given ones, for the process at the other end of a socket pair."""

import ctypes
import os
import socket
import struct
import sys

_CLONE_NEWNET = 0x40000000


def serve(control: socket.socket) -> None:
    """The program: answer until the other end closes."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    while True:
        message, fds, _, _ = socket.recv_fds(control, 16, 1)
        if not message:
            return
        if message == b"new":
            assert libc.unshare(_CLONE_NEWNET) == 0
            answer = [os.open("/proc/self/ns/net", os.O_RDONLY)]
            kept = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        else:
            assert libc.setns(fds[0], _CLONE_NEWNET) == 0
            answer = []
            kept = socket.socket(*struct.unpack("=iii", message))
        assert libc.setns(home, _CLONE_NEWNET) == 0
        socket.send_fds(control, [b"."], [*answer, kept.fileno()])
        kept.close()
        for fd in (*answer, *fds):
            os.close(fd)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

"""What went through a pod's interfaces, asked from outside: nobody enters the namespace.

The kernel answers about the links of another namespace by the id that this one knows it by (Linux 4.20); an id that
was given stays for as long as the namespace. Sources: rtnetlink(7), linux/net_namespace.h, linux/if_link.h.
"""

import errno
import os
import struct
from dataclasses import dataclass
from typing import Final

from net import rtnetlink
from net.errors import NotFound, Unavailable
from net.netlink import Channel, NetlinkError, Request, attr, attributes, u32

_NEW_NSID: Final = 88
_GET_NSID: Final = 90
_NSID: Final = 1
_NSID_FD: Final = 3
_IFNAME: Final = 3
_STATS64: Final = 23
_TARGET_NSID: Final = 46
_ANY: Final = struct.pack("=i", -1)
_RTGENMSG: Final = bytes(4)
_IFINFO: Final = bytes(16)
_COUNTERS: Final = struct.Struct("=8Q")  # packets, bytes, errors and drops: of each first received, then sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """One interface's, since it was made; as seen from inside the pod."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


def counters(netns_path: str) -> list[Counters]:
    """The counters of every interface in the pinned namespace but lo, in the order of their making.

    Raises NotFound when the namespace is gone, Unavailable.
    """
    try:
        fd = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"namespace {netns_path}: gone") from error
    except OSError as error:
        raise Unavailable(f"namespace {netns_path}: {error.strerror}") from error
    try:
        with Channel() as channel:
            wanted = Request(rtnetlink.RTM_GETLINK, 0, _IFINFO + attr(_TARGET_NSID, _id(channel, fd)))
            replies = channel.dump(wanted)
    except OSError as error:
        raise Unavailable(f"namespace {netns_path}: {error}") from error
    finally:
        os.close(fd)
    found = []
    for reply in replies:
        values = attributes(reply.body[len(_IFINFO) :])
        name = values[_IFNAME].rstrip(b"\0").decode(errors="replace")
        if name != "lo" and _STATS64 in values:
            rx_packets, tx_packets, rx_bytes, tx_bytes, *rest = _COUNTERS.unpack_from(values[_STATS64])
            rx_errors, tx_errors, rx_dropped, tx_dropped = rest
            found.append(
                Counters(
                    name=name,
                    rx_bytes=rx_bytes,
                    rx_packets=rx_packets,
                    rx_errors=rx_errors,
                    rx_dropped=rx_dropped,
                    tx_bytes=tx_bytes,
                    tx_packets=tx_packets,
                    tx_errors=tx_errors,
                    tx_dropped=tx_dropped,
                )
            )
    return found


def _id(channel: Channel, fd: int) -> bytes:
    """The id that this namespace knows the other by; gives it one if need be."""
    try:
        channel.do(Request(_NEW_NSID, 0, _RTGENMSG + attr(_NSID, _ANY) + u32(_NSID_FD, fd)))
    except NetlinkError as error:
        if error.errno != errno.EEXIST:
            raise
    (reply,) = channel.get(Request(_GET_NSID, 0, _RTGENMSG + u32(_NSID_FD, fd)))
    return attributes(reply.body[len(_RTGENMSG) :])[_NSID]

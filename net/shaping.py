"""Rates of links as netlink requests: a token bucket at the end that sends. Pure packing, no sockets.

Both ends of a pod's pair send: the host's what the pod receives, the pod's own what it sends. There a full queue holds
up the process that fills it, where a limit further on could only drop; and it goes with the namespace. A container
with CAP_NET_ADMIN could take it away, but then its pod asked for the limit as well.

Sources: linux/rtnetlink.h, linux/pkt_sched.h, tc-tbf(8).
"""

import struct
from typing import Final

from net.netlink import NLM_F_CREATE, NLM_F_REPLACE, Request, attr, nest, text, u32

RTM_NEWQDISC: Final = 36

_TCMSG: Final = struct.Struct("=BxxxiIII")  # family, interface, handle, parent, info
_HANDLE: Final = 1 << 16
_ROOT: Final = 0xFFFFFFFF
_TCA_KIND: Final = 1
_TCA_OPTIONS: Final = 2
_TBF_PARAMETERS: Final = 1
_TBF_RATE64: Final = 4
_TBF_BURST: Final = 6
_ETHERNET: Final = 1
_RATE: Final = struct.Struct(
    "=BBHhHI"
)  # tc_ratespec: cell log, link layer, overhead, cell align, mpu, bytes per second
_NO_PEAK: Final = bytes(_RATE.size)
_LIMITS: Final = struct.Struct("=III")  # bytes in the queue, bucket in ticks and mtu: the last two are given otherwise

_FRAME_BYTES: Final = 18  # Ethernet header and a VLAN tag
_BURST_S: Final = 0.01
_BURST_FRAMES: Final = 4
_QUEUE_S: Final = 0.1
_QUEUE_FRAMES: Final = 16
_MOST: Final = 0xFFFFFFFF


def limit_rate(index: int, bits_per_second: int, mtu: int) -> Request:
    """Let link `index` send no more than that, whatever rate it had before.

    A burst of 10 ms passes unhindered, a tenth of a second waits, and more is dropped; of a slow link some frames each.
    """
    rate = max(bits_per_second // 8, 1)
    frame = mtu + _FRAME_BYTES
    burst = min(max(int(rate * _BURST_S), _BURST_FRAMES * frame), _MOST)
    queue = min(burst + max(int(rate * _QUEUE_S), _QUEUE_FRAMES * frame), _MOST)
    parameters = _RATE.pack(0, _ETHERNET, 0, 0, 0, min(rate, _MOST)) + _NO_PEAK + _LIMITS.pack(queue, 0, 0)
    options = [attr(_TBF_PARAMETERS, parameters), u32(_TBF_BURST, burst)]
    if rate > _MOST:
        options.append(attr(_TBF_RATE64, struct.pack("=Q", rate)))
    return Request(
        RTM_NEWQDISC,
        NLM_F_CREATE | NLM_F_REPLACE,
        _TCMSG.pack(0, index, _HANDLE, _ROOT, 0) + text(_TCA_KIND, "tbf") + nest(_TCA_OPTIONS, *options),
    )

"""nftables objects and expressions as netlink requests, and a transaction of them. Knows no rule of crib's.

Sources: linux/netfilter/nf_tables.h, nft(8); `nft --debug=netlink` shows what a rule of nft's is made of.
"""

import errno
import struct
import sys
from collections.abc import Sequence
from typing import Final

from net.errors import Unavailable, Unsupported
from net.netlink import (
    NETLINK_NETFILTER,
    NLM_F_APPEND,
    NLM_F_CREATE,
    Channel,
    NetlinkError,
    Request,
    attr,
    attributes,
    be32,
    nest,
    text,
)
from net.rtnetlink import IpNetwork

# Hooks and priorities of chains.
PRE_ROUTING: Final = 0
FORWARD: Final = 2
LOCAL_OUT: Final = 3
POST_ROUTING: Final = 4
PRIORITY_RAW: Final = -300
PRIORITY_DESTINATION_NAT: Final = -100
PRIORITY_SOURCE_NAT: Final = 100

EQUAL: Final = 0
NOT_EQUAL: Final = 1
DROP: Final = 0

# Keys of `meta`.
META_IIF: Final = 4
META_OIFNAME: Final = 7
META_NFPROTO: Final = 15
META_L4PROTO: Final = 16

NETWORK_HEADER: Final = 1
TRANSPORT_HEADER: Final = 2
SOURCE: Final = {4: (12, 4), 6: (8, 16)}  # offset and length of the address in the IP header
DESTINATION: Final = {4: (16, 4), 6: (24, 16)}
NFPROTO: Final = {4: 2, 6: 10}
FAMILIES: Final = {1: "inet", 2: "ip", 10: "ip6"}

# Registers: the first 16 bytes wide, and 4 bytes wide ones, which cover the same room, in the order of a concatenation.
REGISTER: Final = 1
_WORDS: Final = 8

# Types of a set's parts, as nft(8) numbers them.
IPV4: Final = 7
IPV6: Final = 8
PROTOCOL: Final = 12
PORT: Final = 13
_TYPE_BITS: Final = 6
_LENGTHS: Final = {IPV4: 4, IPV6: 16, PROTOCOL: 4, PORT: 4}  # padded to words

_SUBSYSTEM: Final = 10
_BATCH_BEGIN: Final = 16
_BATCH_END: Final = 17
_NEW_TABLE: Final = 0
_GET_TABLE: Final = 1
_DEL_TABLE: Final = 2
_NEW_CHAIN: Final = 3
_GET_CHAIN: Final = 4
_NEW_RULE: Final = 6
_GET_RULE: Final = 7
_NEW_SET: Final = 9
_NEW_ELEMENT: Final = 12
_DEL_ELEMENT: Final = 14
_PARTS: Final = {_NEW_CHAIN: "chain", _NEW_RULE: "rule", _NEW_SET: "set", _NEW_ELEMENT: "element"}

_INET: Final = 1
_SET_MAP: Final = 0x8
_JUMP: Final = -3
_POLICY_DROP: Final = bytes(4)
_RANDOM_FULLY: Final = 1 << 4  # two connections at once can't choose the same source port
_CT_STATUS: Final = 2
_CT_DESTINATION_TRANSLATED: Final = 1 << 5
_FIB_ADDRESS_TYPE: Final = 3
_FIB_DESTINATION: Final = 2
_LOCAL: Final = 2  # RTN_LOCAL
_DESTINATION_NAT: Final = 1
_COMMENT: Final = 0  # NFTNL_UDATA_RULE_COMMENT
_ELEMENTS_AT_ONCE: Final = 256  # an attribute holds at most 64 KiB

_HEADER: Final = struct.Struct("!BBH")  # nfgenmsg: family, version, resource


# Objects


def replace_table(table: str) -> list[Request]:
    """An empty table of that name, whatever there was before."""
    return [make_table(table), delete_table(table), make_table(table)]


def make_table(table: str) -> Request:
    return _request(_NEW_TABLE, NLM_F_CREATE, text(1, table))


def delete_table(table: str) -> Request:
    return _request(_DEL_TABLE, 0, text(1, table))


def chain(table: str, name: str) -> Request:
    """A chain to jump to."""
    return _request(_NEW_CHAIN, NLM_F_CREATE, text(1, table), text(3, name))


def base_chain(table: str, name: str, kind: str, hook: int, priority: int) -> Request:
    """A chain that packets go through by themselves; accepts what no rule speaks of."""
    where = nest(4, be32(1, hook), be32(2, priority & 0xFFFFFFFF))
    return _request(_NEW_CHAIN, NLM_F_CREATE, text(1, table), text(3, name), where, text(7, kind))


def rule(table: str, name: str, comment: str, *expressions: bytes) -> Request:
    """A rule at the end of the chain; nft(8) shows the comment, of at most 127 bytes."""
    said = comment.encode() + b"\0"
    shown = attr(7, bytes([_COMMENT, len(said)]) + said)
    flags = NLM_F_CREATE | NLM_F_APPEND
    return _request(_NEW_RULE, flags, text(1, table), text(2, name), nest(4, *expressions), shown)


def make_set(table: str, name: str, number: int, key: Sequence[int], data: Sequence[int] = ()) -> Request:
    """A set, or with `data` a map; both of concatenated types. `number` tells it from others of this transaction."""
    values = [text(1, table), text(2, name), be32(3, _SET_MAP if data else 0)]
    values += [be32(4, _type(key)), be32(5, _length(key))]
    if data:
        values += [be32(6, _type(data)), be32(7, _length(data))]
    return _request(_NEW_SET, NLM_F_CREATE, *values, be32(10, number))


def add_elements(table: str, name: str, elements: Sequence[tuple[bytes, bytes]]) -> list[Request]:
    """Keys and data (b"" in a set), each part of them padded to words."""
    return _elements(_NEW_ELEMENT, NLM_F_CREATE, table, name, elements)


def delete_elements(table: str, name: str, elements: Sequence[tuple[bytes, bytes]]) -> list[Request]:
    """The elements must be there, or the transaction fails: add them before to be sure."""
    return _elements(_DEL_ELEMENT, 0, table, name, elements)


def _elements(kind: int, flags: int, table: str, name: str, elements: Sequence[tuple[bytes, bytes]]) -> list[Request]:
    requests = []
    for at in range(0, len(elements), _ELEMENTS_AT_ONCE):
        listed = [
            nest(1, nest(1, attr(1, key)), nest(2, attr(1, data)) if data else b"")
            for key, data in elements[at : at + _ELEMENTS_AT_ONCE]
        ]
        requests.append(_request(kind, flags, text(1, table), text(2, name), nest(3, *listed)))
    return requests


def _type(parts: Sequence[int]) -> int:
    value = 0
    for part in parts:
        value = value << _TYPE_BITS | part
    return value


def _length(parts: Sequence[int]) -> int:
    return sum(_LENGTHS[part] for part in parts)


def _request(kind: int, flags: int, *values: bytes) -> Request:
    return Request(_SUBSYSTEM << 8 | kind, flags, _HEADER.pack(_INET, 0, 0) + b"".join(values))


# Expressions


def native(value: int) -> bytes:
    """A number as the kernel has it in a register."""
    return value.to_bytes(4, sys.byteorder)


def word(offset_bytes: int) -> int:
    """The register at that place of a concatenation that starts in REGISTER."""
    return _WORDS + offset_bytes // 4


def meta(key: int, register: int = REGISTER) -> bytes:
    return _expression("meta", be32(1, register), be32(2, key))


def payload(header: int, offset: int, length: int, register: int = REGISTER) -> bytes:
    return _expression("payload", be32(1, register), be32(2, header), be32(3, offset), be32(4, length))


def compare(comparison: int, value: bytes) -> bytes:
    return _expression("cmp", be32(1, REGISTER), be32(2, comparison), nest(3, attr(1, value)))


def masked(mask: bytes) -> bytes:
    parts = (nest(4, attr(1, mask)), nest(5, attr(1, bytes(len(mask)))))
    return _expression("bitwise", be32(1, REGISTER), be32(2, REGISTER), be32(3, len(mask)), *parts)


def version_is(version: int) -> list[bytes]:
    """Only packets of this IP version."""
    return [meta(META_NFPROTO), compare(EQUAL, bytes([NFPROTO[version]]))]


def address_in(subnet: IpNetwork, field: dict[int, tuple[int, int]], comparison: int = EQUAL) -> list[bytes]:
    """Only packets whose address (SOURCE or DESTINATION) is in the subnet; the IP version is checked before."""
    offset, length = field[subnet.version]
    load = payload(NETWORK_HEADER, offset, length)
    return [load, masked(subnet.netmask.packed), compare(comparison, subnet.network_address.packed)]


def destination_is_local() -> list[bytes]:
    """Only packets to an address of this node."""
    fib = _expression("fib", be32(1, REGISTER), be32(2, _FIB_ADDRESS_TYPE), be32(3, _FIB_DESTINATION))
    return [fib, compare(EQUAL, native(_LOCAL))]


def destination_was_translated() -> list[bytes]:
    """Only packets of connections whose destination somebody has changed."""
    status = _expression("ct", be32(1, REGISTER), be32(2, _CT_STATUS))
    return [status, masked(native(_CT_DESTINATION_TRANSLATED)), compare(NOT_EQUAL, bytes(4))]


def look_up(name: str, *, data: bool = False) -> bytes:
    """Only what is in the set; with `data`, what the map has for it takes the place of the key."""
    return _expression("lookup", text(1, name), be32(2, REGISTER), be32(3, REGISTER) if data else b"")


def translate_destination(version: int) -> bytes:
    """To the address and port in the registers."""
    port = word(4 if version == 4 else 16)
    return _expression("nat", be32(1, _DESTINATION_NAT), be32(2, NFPROTO[version]), be32(3, REGISTER), be32(5, port))


def masquerade() -> bytes:
    return _expression("masq", be32(1, _RANDOM_FULLY))


def jump(name: str) -> bytes:
    return _expression("immediate", be32(1, 0), nest(2, nest(2, be32(1, _JUMP & 0xFFFFFFFF), text(2, name))))


def verdict(code: int) -> bytes:
    return _expression("immediate", be32(1, 0), nest(2, nest(2, be32(1, code))))


def _expression(name: str, *values: bytes) -> bytes:
    return nest(1, text(1, name), nest(2, *values))


# Transactions and questions


def commit(table: str, requests: Sequence[Request]) -> None:
    """All of the requests or none.

    Raises Unsupported where the kernel lacks what they need, Unavailable when it refuses them; the cause is then the
    NetlinkError.
    """
    frame = _HEADER.pack(0, 0, _SUBSYSTEM)
    with _channel() as channel:
        try:
            errors = channel.send(requests, batch=(Request(_BATCH_BEGIN, 0, frame), Request(_BATCH_END, 0, frame)))
        except NetlinkError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                raise Unsupported(f"the kernel has no nftables: {error}") from error
            raise Unavailable(f"nftables table inet {table}: {error}") from error
    for refused in errors:
        kind = requests[refused.index].kind & 0xFF
        part = _PARTS.get(kind, "table")
        lacking = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, *((errno.ENOENT,) if kind in (_NEW_CHAIN, _NEW_RULE) else ()))
        if refused.errno in lacking:  # ENOENT: a module is missing
            raise Unsupported(f"the kernel lacks a part of nftables: {part}: {refused}") from refused
        raise Unavailable(f"nftables table inet {table}: {part}: {refused}") from refused


def exists(table: str) -> bool:
    """Whether the table is there (another program may flush the whole ruleset); False where the kernel has none."""
    try:
        with _channel() as channel:
            return bool(channel.get(_request(_GET_TABLE, 0, text(1, table))))
    except (NetlinkError, Unsupported):
        return False


def rules(table: str) -> list[tuple[str, str]]:
    """Chain and comment of each of the table's rules; none where it is gone. Raises Unsupported, OSError."""
    found = []
    with _channel() as channel:
        replies = channel.dump(_request(_GET_RULE, 0, text(1, table)))
    for reply in replies:
        listed = attributes(reply.body[_HEADER.size :])
        if listed[1] == table.encode() + b"\0":
            said = listed.get(7, b"")
            comment = said[2 : 2 + said[1]] if said[:1] == bytes([_COMMENT]) else b""
            found.append(tuple(value.rstrip(b"\0").decode(errors="replace") for value in (listed[2], comment)))
    return [(chain, comment) for chain, comment in found]


def forward_drops() -> list[str]:
    """Chains of any table that drop forwarded packets by default: "ip filter FORWARD"."""
    found = []
    with _channel() as channel:
        replies = channel.dump(Request(_SUBSYSTEM << 8 | _GET_CHAIN, 0, _HEADER.pack(0, 0, 0)))
    for reply in replies:
        family, _, _ = _HEADER.unpack_from(reply.body)
        listed = attributes(reply.body[_HEADER.size :])
        hook = attributes(listed.get(4, b"")).get(1)
        if family in FAMILIES and hook == FORWARD.to_bytes(4, "big") and listed.get(5) == _POLICY_DROP:
            names = (listed[key].rstrip(b"\0").decode(errors="replace") for key in (1, 3))
            found.append(" ".join((FAMILIES[family], *names)))
    return found


def _channel() -> Channel:
    try:
        return Channel(NETLINK_NETFILTER)
    except OSError as error:
        raise Unsupported(f"the kernel has no nftables: {error.strerror}") from error

"""Masquerading: crib's own nftables table, written in one transaction over nfnetlink.

Nobody else's table is touched, and no verdict here can overrule another table's drop (nftables has no such verdict);
chains that would drop pods' traffic are reported instead. Sources: linux/netfilter/nf_tables.h, nft(8).
"""

import errno
import struct
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

_SUBSYSTEM: Final = 10
_BATCH_BEGIN: Final = 16
_BATCH_END: Final = 17
_NEW_TABLE: Final = 0
_GET_TABLE: Final = 1
_DEL_TABLE: Final = 2
_NEW_CHAIN: Final = 3
_GET_CHAIN: Final = 4
_NEW_RULE: Final = 6

_PARTS: Final = {_NEW_CHAIN: "nat chain", _NEW_RULE: "masquerade rule"}

_INET: Final = 1
_FAMILIES: Final = {1: "inet", 2: "ip", 10: "ip6"}
_NFPROTO: Final = {4: 2, 6: 10}
_TABLE_NAME: Final = 1
_CHAIN_TABLE: Final = 1
_CHAIN_NAME: Final = 3
_CHAIN_HOOK: Final = 4
_CHAIN_POLICY: Final = 5
_CHAIN_TYPE: Final = 7
_HOOK_NUMBER: Final = 1
_HOOK_PRIORITY: Final = 2
_RULE_TABLE: Final = 1
_RULE_CHAIN: Final = 2
_RULE_EXPRESSIONS: Final = 4
_LIST_ELEMENT: Final = 1
_EXPRESSION_NAME: Final = 1
_EXPRESSION_DATA: Final = 2
_FORWARD: Final = 2
_POST_ROUTING: Final = 4
_PRIORITY_SOURCE_NAT: Final = 100
_POLICY_DROP: Final = bytes(4)
_REGISTER: Final = 1
_META_NFPROTO: Final = 15
_NETWORK_HEADER: Final = 1
_EQUAL: Final = 0
_NOT_EQUAL: Final = 1
_RANDOM_FULLY: Final = 1 << 4  # two connections at once can't choose the same source port

_HEADER: Final = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_SOURCE: Final = {4: (12, 4), 6: (8, 16)}  # offset and length of the address in the IP header
_DESTINATION: Final = {4: (16, 4), 6: (24, 16)}


def install(table: str, subnets: Sequence[IpNetwork]) -> None:
    """Masquerade what comes from a subnet and leaves it. Replaces the table as a whole, atomically.

    Raises Unsupported where the kernel has no nftables, Unavailable when it refuses the table.
    """
    chain = "postrouting"
    name = text(_TABLE_NAME, table)
    requests = [
        _request(_NEW_TABLE, NLM_F_CREATE, name),  # so that the removal finds one
        _delete(table),
        _request(_NEW_TABLE, NLM_F_CREATE, name),
        _request(
            _NEW_CHAIN,
            NLM_F_CREATE,
            text(_CHAIN_TABLE, table),
            text(_CHAIN_NAME, chain),
            nest(_CHAIN_HOOK, be32(_HOOK_NUMBER, _POST_ROUTING), be32(_HOOK_PRIORITY, _PRIORITY_SOURCE_NAT)),
            text(_CHAIN_TYPE, "nat"),
        ),
    ]
    for subnet in subnets:
        expressions = [
            _expression("meta", be32(1, _REGISTER), be32(2, _META_NFPROTO)),
            _compare(_EQUAL, bytes([_NFPROTO[subnet.version]])),
            *_address_in(subnet, _SOURCE, _EQUAL),
            *_address_in(subnet, _DESTINATION, _NOT_EQUAL),
            _expression("masq", be32(1, _RANDOM_FULLY)),
        ]
        requests.append(
            _request(
                _NEW_RULE,
                NLM_F_CREATE | NLM_F_APPEND,
                text(_RULE_TABLE, table),
                text(_RULE_CHAIN, chain),
                nest(_RULE_EXPRESSIONS, *expressions),
            )
        )
    _commit(table, requests)


def remove(table: str) -> None:
    """Delete the table; succeeds when it is gone, and where the kernel has no nftables."""
    try:
        _commit(table, [_request(_NEW_TABLE, NLM_F_CREATE, text(_TABLE_NAME, table)), _delete(table)])
    except Unsupported:
        pass


def installed(table: str) -> bool:
    """Whether the table is there (another program may flush the whole ruleset); why it can't be, `install` tells."""
    try:
        with _channel() as channel:
            return bool(channel.get(_request(_GET_TABLE, 0, text(_TABLE_NAME, table))))
    except (NetlinkError, Unsupported):
        return False


def forward_drops() -> list[str]:
    """Chains of any table that drop forwarded packets by default: "ip filter FORWARD"."""
    found = []
    with _channel() as channel:
        replies = channel.dump(Request(_SUBSYSTEM << 8 | _GET_CHAIN, 0, _HEADER.pack(0, 0, 0)))
    for reply in replies:
        family, _, _ = _HEADER.unpack_from(reply.body)
        chain = attributes(reply.body[_HEADER.size :])
        hook = attributes(chain.get(_CHAIN_HOOK, b"")).get(_HOOK_NUMBER)
        if family in _FAMILIES and hook == _FORWARD.to_bytes(4, "big") and chain.get(_CHAIN_POLICY) == _POLICY_DROP:
            names = (chain[key].rstrip(b"\0").decode(errors="replace") for key in (_CHAIN_TABLE, _CHAIN_NAME))
            found.append(" ".join((_FAMILIES[family], *names)))
    return found


def _commit(table: str, requests: Sequence[Request]) -> None:
    """All of the requests or none."""
    frame = _HEADER.pack(0, 0, _SUBSYSTEM)
    with _channel() as channel:
        try:
            errors = channel.send(requests, batch=(Request(_BATCH_BEGIN, 0, frame), Request(_BATCH_END, 0, frame)))
        except NetlinkError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                raise Unsupported(f"the kernel has no nftables: {error}") from error
            raise Unavailable(f"nftables table inet {table}: {error}") from error
    for refused in errors:
        part = _PARTS.get(requests[refused.index].kind & 0xFF, "table")
        if refused.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):  # ENOENT: a module is missing
            raise Unsupported(f"the kernel has no nftables with masquerading: {part}: {refused}")
        raise Unavailable(f"nftables table inet {table}: {part}: {refused}")


def _channel() -> Channel:
    try:
        return Channel(NETLINK_NETFILTER)
    except OSError as error:
        raise Unsupported(f"the kernel has no nftables: {error.strerror}") from error


def _request(kind: int, flags: int, *values: bytes) -> Request:
    return Request(_SUBSYSTEM << 8 | kind, flags, _HEADER.pack(_INET, 0, 0) + b"".join(values))


def _delete(table: str) -> Request:
    return _request(_DEL_TABLE, 0, text(_TABLE_NAME, table))


def _expression(name: str, *values: bytes) -> bytes:
    return nest(_LIST_ELEMENT, text(_EXPRESSION_NAME, name), nest(_EXPRESSION_DATA, *values))


def _address_in(subnet: IpNetwork, field: dict[int, tuple[int, int]], comparison: int) -> list[bytes]:
    """Load the address that `field` describes, mask it and compare it with the subnet's."""
    offset, length = field[subnet.version]
    return [
        _expression("payload", be32(1, _REGISTER), be32(2, _NETWORK_HEADER), be32(3, offset), be32(4, length)),
        _expression(
            "bitwise",
            be32(1, _REGISTER),
            be32(2, _REGISTER),
            be32(3, length),
            nest(4, attr(1, subnet.netmask.packed)),
            nest(5, attr(1, bytes(length))),
        ),
        _compare(comparison, subnet.network_address.packed),
    ]


def _compare(comparison: int, value: bytes) -> bytes:
    return _expression("cmp", be32(1, _REGISTER), be32(2, comparison), nest(3, attr(1, value)))

"""Which subnet a bridge gets: pure choice, from what the host already uses."""

import hashlib
import ipaddress
from collections.abc import Iterable
from typing import Final

from net.errors import InvalidSpec, Unavailable
from net.rtnetlink import IpNetwork

_POOL: Final = tuple(
    ipaddress.IPv4Network(cidr)
    for cidr in (*(f"10.{n}.0.0/16" for n in range(88, 128)), *(f"172.{n}.0.0/16" for n in range(24, 32)))
)


def choose(instance: str, taken: Iterable[IpNetwork]) -> ipaddress.IPv4Network:
    """A subnet of the pool that overlaps nothing in `taken`. Raises Unavailable.

    The instance named "crib" tries the pool from its start, others from a place of their own: two that start at
    once would otherwise see the same one free.
    """
    taken = list(taken)
    start = 0 if instance == "crib" else int(hashlib.sha256(instance.encode()).hexdigest()[:8], 16) % len(_POOL)
    for subnet in _POOL[start:] + _POOL[:start]:
        if not any(subnet.overlaps(other) for other in taken if isinstance(other, ipaddress.IPv4Network)):
            return subnet
    raise Unavailable(f"no free subnet between {_POOL[0]} and {_POOL[-1]}: set network.subnet")


def configured(key: str, cidr: str, version: int) -> IpNetwork:
    """The subnet that the configuration names. Raises InvalidSpec when it is none or has no room for a pod."""
    try:
        subnet = ipaddress.ip_network(cidr)
    except ValueError as error:
        raise InvalidSpec(f"{key} {cidr!r}: {error}") from error
    if subnet.version != version:
        raise InvalidSpec(f"{key} {cidr!r}: not IPv{version}")
    if subnet.num_addresses < 4:
        raise InvalidSpec(f"{key} {cidr!r}: no room for a gateway and a pod")
    return subnet

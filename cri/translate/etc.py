"""The text of the files under /etc that crib writes for a pod."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from cri.api import cri_pb2 as pb
from cri.translate.field import show
from runtime.errors import InvalidSpec

SERVERS_LIMIT = 16
SEARCHES_LIMIT = 32
SEARCHES_LIMIT_BYTES = 2048
"""The kubelet's own limits on search domains; name servers it cuts to three, the resolver's number."""
OPTIONS_LIMIT = 32
HOSTNAME_LIMIT = 64  # __NEW_UTS_LEN

_WORD = re.compile(r"[!-~]{1,255}")
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")


def hostname(value: str) -> str:
    """`value`, which is fit for sethostname, /etc/hosts and an environment variable: no newline can add a line
    to a file (GHSA-cm9x-c3rh-7rc4)."""
    if len(value) > HOSTNAME_LIMIT or not _HOSTNAME.fullmatch(value):
        raise InvalidSpec(f"hostname {show(value)}: not 1 to {HOSTNAME_LIMIT} letters, digits, '-', '_' and '.'")
    return value


def resolv_conf(dns: pb.DNSConfig) -> str | None:
    """The pod's /etc/resolv.conf; None where the request names nothing: the host's file is copied then."""
    for server in dns.servers:
        try:
            ipaddress.ip_address(server)
        except ValueError:
            raise InvalidSpec(f"dns_config.servers {show(server)}: not an IP address") from None
        if not _WORD.fullmatch(server):
            raise InvalidSpec(f"dns_config.servers {show(server)}: not an IP address")
    for field, words in (("searches", dns.searches), ("options", dns.options)):
        for word in words:
            if not _WORD.fullmatch(word):
                raise InvalidSpec(f"dns_config.{field} {show(word)}: not one word of 1 to 255 printable characters")
    searches = " ".join(dns.searches)
    for field, count, limit in (
        ("servers", len(dns.servers), SERVERS_LIMIT),
        ("searches", len(dns.searches), SEARCHES_LIMIT),
        ("options", len(dns.options), OPTIONS_LIMIT),
    ):
        if count > limit:
            raise InvalidSpec(f"dns_config.{field}: {count} entries, the limit is {limit}")
    if len(searches) > SEARCHES_LIMIT_BYTES:
        raise InvalidSpec(f"dns_config.searches: {len(searches)} characters, the limit is {SEARCHES_LIMIT_BYTES}")
    lines = [f"search {searches}"] if searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines) or None


def hosts(name: str, addresses: Iterable[str]) -> str:
    """The /etc/hosts of a pod with its own network; one on the host's network gets a copy of the host's file."""
    lines = [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "fe00::\tip6-localnet",
        "ff00::\tip6-mcastprefix",
        "ff02::1\tip6-allnodes",
        "ff02::2\tip6-allrouters",
    ]
    lines += [f"{address}\t{name}" for address in addresses]
    return "".join(f"{line}\n" for line in lines)

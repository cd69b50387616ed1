"""Which proxy the environment names: http_proxy, https_proxy and no_proxy, in either case, as Go programs read them."""

from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies

from runtime.images.hosts import is_loopback

_PORTS = {"http": 80, "https": 443}


def proxy_of(url: str) -> str | None:
    """The URL of the proxy for `url`; never one for loopback."""
    parts, named = urlsplit(url), getproxies()
    host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
    proxy = named.get(parts.scheme)
    if not proxy or is_loopback(parts.netloc) or any(_names(e, host, port) for e in named.get("no", "").split(",")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _names(entry: str, host: str, port: int) -> bool:
    """Whether an entry of no_proxy (`*`, an address, a range of them, a domain with all below it, the latter with or
    without a port) is about the host."""
    entry = entry.strip().lower()
    try:
        return ip_address(host) in ip_network(entry, strict=False)
    except ValueError:
        pass  # one of them is a name
    name, colon, only = entry.rpartition(":")
    if colon and only.isdecimal():
        if int(only) != port:
            return False
        entry = name
    domain = entry.removeprefix("*").lstrip(".").strip("[]")
    return entry == "*" or (domain != "" and f".{host}".endswith(f".{domain}"))

"""What a plugin answers to ADD: from any version of the specification to any other, and to an Attachment.

Up to 0.2.0 a result has `ip4` and `ip6`; from 0.3.0 on `interfaces` and `ips`, each of which says its version until
1.0.0 does without; 1.1.0 adds fields to interfaces and routes. Converting down drops what the older one can't say.
"""

import ipaddress
from typing import Final

from net.cni.conf import VERSIONS, Json
from net.cni.invoke import PluginFailed
from net.network import Attachment

_OLD: Final = ("", "0.1.0", "0.2.0")
_WITH_1_1: Final = {
    "interfaces": ("mtu", "socketPath", "pciID"),
    "routes": ("mtu", "advmss", "priority", "table", "scope"),
}


def convert(result: Json, version: str) -> Json:
    """The result as of another version. Raises PluginFailed for one that isn't a result."""
    told = str(result.get("cniVersion", ""))
    if told in _OLD:
        found = _from_old(result)
    elif told in VERSIONS:
        found = dict(result)
    else:
        raise PluginFailed(f"result of version {told}: crib knows up to {VERSIONS[-1]}")
    _check(found)
    found["cniVersion"] = version
    at = VERSIONS.index(version)
    found["ips"] = [_ip(one, with_version=at < VERSIONS.index("1.0.0")) for one in _objects(found, "ips")]
    if at < VERSIONS.index("1.1.0"):
        for key, fields in _WITH_1_1.items():
            if key in found:
                stripped = [{k: v for k, v in one.items() if k not in fields} for one in _objects(found, key)]
                found[key] = stripped
    return found


def _from_old(result: Json) -> Json:
    found: Json = {"dns": result["dns"]} if "dns" in result else {}
    ips, routes = [], []
    for key in ("ip4", "ip6"):
        one = result.get(key)
        if isinstance(one, dict):
            ips.append({to: one[name] for name, to in (("ip", "address"), ("gateway", "gateway")) if one.get(name)})
            routes += [route for route in one.get("routes") or () if isinstance(route, dict)]
    return found | {"ips": ips, **({"routes": routes} if routes else {})}


def _ip(one: Json, *, with_version: bool) -> Json:
    found = {key: value for key, value in one.items() if key != "version"}
    if with_version:
        found["version"] = str(ipaddress.ip_interface(str(one["address"])).version)
    return found


def _check(result: Json) -> None:
    """What this room relies on; the rest is between plugins."""
    for key in ("interfaces", "ips", "routes"):
        value = result.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise PluginFailed(f"result: {key}: not a list of objects")
    count = len(_objects(result, "interfaces"))
    for one in _objects(result, "ips"):
        try:
            ipaddress.ip_interface(str(one.get("address")))
        except ValueError as error:
            raise PluginFailed(f"result: ips: address {one.get('address')!r}: {error}") from error
        index = one.get("interface")
        if index is not None and not (isinstance(index, int) and 0 <= index < count):
            raise PluginFailed(f"result: ips: interface {index!r}: there are {count}")


def _objects(result: Json, key: str) -> list[Json]:
    value = result.get(key)
    return value if isinstance(value, list) else []


def attachment(result: Json, interface: str) -> Attachment:
    """What the pod got: the addresses of `interface` inside, or all where the result names no interfaces.

    Raises PluginFailed when there are none: a pod without an address is of no use to anybody.
    """
    interfaces = _objects(result, "interfaces")
    own = [index for index, one in enumerate(interfaces) if one.get("sandbox") and one.get("name") == interface]
    ips = [one for one in _objects(result, "ips") if one.get("interface") is None or one["interface"] in own]
    if not ips and not own:
        ips = _objects(result, "ips")
    if not ips:
        raise PluginFailed(f"result: no address of {interface}")
    outside = [str(one.get("name", "")) for one in interfaces if not one.get("sandbox")]
    return Attachment(
        interface=interface,
        addresses=tuple(str(one["address"]) for one in ips),
        gateway=str(ips[0].get("gateway") or ""),
        mac=str(interfaces[own[0]].get("mac", "")) if own else "",
        host_interface=next((name for name in outside if name.startswith("veth")), ""),
    )

"""What a pod asks of its network: its request and annotations, as the network room takes them."""

from __future__ import annotations

import decimal
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from net import Dns, HostPort, Wants, netns
from runtime.errors import InvalidSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cri.sandbox.pod import Pod

MAC_ANNOTATION: Final = "crib/mac-address"
INFINIBAND_ANNOTATION: Final = "crib/infiniband-guid"
_INGRESS: Final = "kubernetes.io/ingress-bandwidth"
_EGRESS: Final = "kubernetes.io/egress-bandwidth"
_QUANTITY: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,9})?)(|m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi|[eE][0-9]{1,2})")
_UNITS: Final = {"": Decimal(1), "m": Decimal("0.001")} | {
    unit: value
    for power, letter in enumerate("kMGTP", 1)
    for unit, value in ((letter, Decimal(1000) ** power), (f"{letter.upper()}i", Decimal(1024) ** power))
}
_LEAST_BITS: Final = 1000
_MOST_BITS: Final = 10**15
_MAC: Final = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_GUID: Final = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){7}")


def pin_of(sandbox_id: str) -> str:
    """Where a pod's network namespace is pinned."""
    return str(netns.DIRECTORY / f"crib-{sandbox_id[:32]}")


def wants(pod: Pod, conf_dir: str = "") -> Wants:
    """What the pod asks for; `conf_dir` is what its handler adds. Raises InvalidSpec, naming the annotation."""
    config = pod.config
    annotations = dict(config.annotations)
    dns = config.dns_config
    return Wants(
        host_ports=tuple(
            HostPort(port.protocol, port.host_port, port.container_port, port.host_ip) for port in pod.plan.host_ports
        ),
        ingress_bits=_bits(annotations, _INGRESS),
        egress_bits=_bits(annotations, _EGRESS),
        mac=_address(annotations, MAC_ANNOTATION, _MAC),
        infiniband_guid=_address(annotations, INFINIBAND_ANNOTATION, _GUID),
        aliases=(config.metadata.name,),
        dns=Dns(servers=tuple(dns.servers), searches=tuple(dns.searches), options=tuple(dns.options)),
        cgroup_path=config.linux.cgroup_parent,
        annotations=annotations,
        conf_dir=conf_dir,
    )


def _bits(annotations: Mapping[str, str], key: str) -> int:
    """A rate in bits per second, as Kubernetes writes quantities; 0 without the annotation."""
    value = annotations.get(key, "")
    if not value:
        return 0
    match = _QUANTITY.fullmatch(value)
    bits = 0
    if match:
        unit = match[2]
        with decimal.localcontext(prec=60):
            factor = Decimal(10) ** int(unit[1:]) if unit[:1] in ("e", "E") else _UNITS[unit]
            bits = int(Decimal(match[1]) * factor)
    if not _LEAST_BITS <= bits <= _MOST_BITS:
        raise InvalidSpec(f"annotations {key} {value[:64]!r}: not a rate like 10M, from 1k to 1P bits per second")
    return bits


def _address(annotations: Mapping[str, str], key: str, form: re.Pattern[str]) -> str:
    value = annotations.get(key, "")
    if value and not form.fullmatch(value):
        raise InvalidSpec(f"annotations {key} {value[:64]!r}: not an address of that kind")
    return value

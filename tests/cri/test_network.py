"""What a pod asks of its network, from its request and annotations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from cri.sandbox.network import wants
from net import Wants
from runtime.errors import InvalidSpec


def of(**annotations: str) -> Wants:
    named = {
        {"ingress": "kubernetes.io/ingress-bandwidth", "egress": "kubernetes.io/egress-bandwidth"}.get(key)
        or f"crib/{key.replace('_', '-')}": value
        for key, value in annotations.items()
    }
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="p"), annotations=named)
    pod: Any = SimpleNamespace(config=config, plan=SimpleNamespace(host_ports=()))
    return wants(pod)


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        ("10M", 10_000_000),
        ("1k", 1000),
        ("1Ki", 1024),
        ("1.5G", 1_500_000_000),
        ("2e6", 2_000_000),
        ("1000", 1000),
        ("1P", 10**15),
    ],
)
def test_rates(value: str, bits: int) -> None:
    assert of(ingress=value).ingress_bits == bits
    assert of(egress=value).egress_bits == bits
    assert of().ingress_bits == of().egress_bits == 0


@pytest.mark.parametrize("value", ["0", "999", "2P", "-5M", "10 M", "10MB", "M", "1e99", "nan", "9" * 100, "1\n"])
def test_rates_that_cannot_be(value: str) -> None:
    with pytest.raises(InvalidSpec, match=r"kubernetes\.io/ingress-bandwidth .*: not a rate like 10M"):
        of(ingress=value)


def test_addresses() -> None:
    assert of(mac_address="02:00:00:00:00:07").mac == "02:00:00:00:00:07"
    with pytest.raises(InvalidSpec, match="crib/mac-address '02:00'"):
        of(mac_address="02:00")
    with pytest.raises(InvalidSpec, match="crib/infiniband-guid"):
        of(infiniband_guid="02:00:00:00:00:07")

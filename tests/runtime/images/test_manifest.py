"""Indexes, manifests, configurations."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime.errors import NotFound, Unsupported
from runtime.images.errors import BadImage
from runtime.images.manifest import Index, Manifest, chain_ids, digest_of, parse, parse_config, select
from runtime.images.platform import machine, this_machine
from tests.runtime.images.given import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Built, build, index, layer

EMPTY = "sha256:" + "0" * 64


def changed(built: Built, **changes: Any) -> bytes:
    document = json.loads(built.manifest) | changes
    return json.dumps({key: value for key, value in document.items() if value is not None}).encode()


@pytest.fixture
def built() -> Built:
    return build(layer(a="1"), layer(a="2"))


@pytest.mark.parametrize("docker", [False, True])
def test_a_manifest(docker: bool) -> None:
    built = build(layer(a="1"), docker=docker)
    manifest = parse(built.manifest, built.media_type)
    assert isinstance(manifest, Manifest)
    assert manifest.config.digest == built.id
    assert parse(changed(built, mediaType=None), "application/octet-stream") == manifest


def test_what_is_no_manifest(built: Built) -> None:
    for data in (b"", b"<html>", b"[]", b"{}", b'{"schemaVersion": 2}', b"\xff", b"[" * 100_000):
        with pytest.raises(BadImage, match="manifest"):
            parse(data)


def test_documents_that_could_be_two_things(built: Built) -> None:
    entries = [{"mediaType": OCI_MANIFEST, "digest": EMPTY, "size": 1}]
    for data, kind in (
        (changed(built, manifests=entries), OCI_MANIFEST),
        (changed(built), OCI_INDEX),
        (changed(built), DOCKER_MANIFEST),
        (changed(built, mediaType=None), OCI_INDEX),
        (json.dumps({"schemaVersion": 2, "manifests": entries}).encode(), OCI_MANIFEST),
    ):
        with pytest.raises(BadImage, match="manifest"):
            parse(data, kind)


def test_what_can_not_run(built: Built) -> None:
    config = json.loads(built.manifest)["config"]
    layers = json.loads(built.manifest)["layers"]
    for data in (
        changed(built, schemaVersion=1),
        changed(built, config=config | {"mediaType": "application/vnd.cncf.helm.config.v1+json"}),
        changed(built, layers=[layers[0] | {"mediaType": "application/wasm"}]),
        changed(built, layers=[layers[0] | {"mediaType": layers[0]["mediaType"] + "+encrypted"}]),
        changed(built, layers=layers * 300),
        changed(built, mediaType="application/vnd.example+json"),
    ):
        with pytest.raises(Unsupported):
            parse(data)
    with pytest.raises(BadImage, match="digest"):
        parse(changed(built, layers=[layers[0] | {"digest": "sha256:../../etc"}]))
    with pytest.raises(BadImage, match="size -1"):
        parse(changed(built, layers=[layers[0] | {"size": -1}]))


def platform(architecture: str, variant: str = "", os: str = "linux") -> dict[str, str]:
    return {"architecture": architecture, "os": os} | ({"variant": variant} if variant else {})


V2 = set("cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 fpu".split())
V3 = V2 | set("abm avx avx2 bmi1 bmi2 f16c fma movbe xsave".split())
LSE = set("fp asimd asimdrdm atomics crc32".split())


@pytest.mark.parametrize(
    ("name", "features", "offers", "wanted"),
    [
        ("x86_64", set(), ["amd64", "amd64/v2", "amd64/v3"], "amd64"),
        ("x86_64", V2, ["amd64", "amd64/v2", "amd64/v3"], "amd64/v2"),
        ("x86_64", V2, ["amd64/v3", "amd64/v1"], "amd64/v1"),
        ("x86_64", V3, ["amd64/v3", "amd64/v4"], "amd64/v3"),
        ("x86_64", V3 - {"ssse3"}, ["amd64/v3", "amd64"], "amd64"),
        ("x86_64", V3, ["arm64", "386", "amd64/v9", "amd64"], "amd64"),
        ("aarch64", set(), ["amd64", "arm64/v9", "arm64/v8"], "arm64/v8"),
        ("aarch64", set(), ["arm64/v8.1", "arm64"], "arm64"),
        ("aarch64", LSE, ["arm64/v8.0", "arm64/v8.1", "arm64/v8.2"], "arm64/v8.1"),
        ("armv7l", set(), ["arm/v5", "arm/v6", "arm/v7", "arm64"], "arm/v7"),
        ("armv6l", set(), ["arm/v5", "arm/v6", "arm/v7", "arm"], "arm/v6"),
        ("riscv64", set(), ["amd64", "riscv64"], "riscv64"),
    ],
)
def test_selection(name: str, features: set[str], offers: list[str], wanted: str) -> None:
    """The best that the processor can run, in whatever order they are listed."""
    built = {offer: build(layer(a=offer)) for offer in offers}
    pairs = [(image, platform(*offer.split("/"))) for offer, image in built.items()]
    others = [platform("unknown", os="unknown"), platform("amd64", os="windows"), platform("arm64", os="windows")]
    pairs += [(build(layer(b=str(number))), other) for number, other in enumerate(others)]
    for ordered in (pairs, pairs[::-1]):
        parsed = parse(index(*ordered), OCI_INDEX)
        assert isinstance(parsed, Index)
        assert select(parsed, machine(name, features)).digest == built[wanted].digest


def test_selection_without_a_match(built: Built) -> None:
    parsed = parse(index((built, platform("s390x")), (built, platform("unknown", os="unknown"))))
    assert isinstance(parsed, Index)
    with pytest.raises(NotFound, match=r"no manifest for linux/amd64/v1, it has linux/s390x$"):
        select(parsed, machine("x86_64", set()))
    for name, features, told in (("x86_64", V2, "amd64/v2"), ("aarch64", LSE, "arm64/v8.1")):
        newer = parse(index((built, platform("amd64", "v3")), (built, platform("arm64", "v9"))))
        assert isinstance(newer, Index)
        with pytest.raises(NotFound, match=rf"no manifest for linux/{told}, it has linux/amd64/v3, linux/arm64/v9$"):
            select(newer, machine(name, features))
    unmarked = parse(index((built, None)))
    assert isinstance(unmarked, Index)
    assert select(unmarked).digest == built.digest


def test_this_machine() -> None:
    here = this_machine()
    assert here.rank(here.architecture, "") == 0
    assert here.rank("mips", "") is None


def test_a_configuration(built: Built) -> None:
    image = build(
        layer(a="1"),
        User="1000:1000",
        Env=["A=1", "B=2"],
        Entrypoint=["/e"],
        Cmd=None,
        WorkingDir="/w",
        StopSignal="SIGINT",
        Volumes={"/v": {}},
        Labels={"k": "v"},
        ExposedPorts={"80/tcp": {}},
    )
    config = parse_config(image.blobs[image.id], 1)
    assert config.image.user == "1000:1000"
    assert config.image.env == ("A=1", "B=2")
    assert config.image.entrypoint == ("/e",)
    assert config.image.cmd == ()
    assert config.image.volumes == ("/v",)
    assert config.image.exposed == ("80/tcp",)
    assert config.diff_ids == tuple(image.diff_ids)
    assert config.created == "2026-01-02T03:04:05Z"


def test_malformed_configurations(built: Built) -> None:
    good = json.loads(built.blobs[built.id])
    with pytest.raises(BadImage, match="names 2 layers, the manifest 1"):
        parse_config(json.dumps(good).encode(), 1)
    for bad in (b"{}", b"x", json.dumps(good | {"rootfs": {"type": "x", "diff_ids": []}}).encode()):
        with pytest.raises(BadImage, match="configuration"):
            parse_config(bad, 2)
    with pytest.raises(BadImage):
        parse_config(json.dumps(good | {"rootfs": {"type": "layers", "diff_ids": ["x", "y"]}}).encode(), 2)
    with pytest.raises(Unsupported, match="windows"):
        parse_config(json.dumps(good | {"os": "windows"}).encode(), 2)


def test_chain_ids() -> None:
    first, second = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    assert chain_ids((first, second)) == (first, digest_of(f"{first} {second}".encode()))

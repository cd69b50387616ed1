"""Programs that must accept an image; credentials from a file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import Cancelled, InvalidSpec
from runtime.images import Auth
from runtime.images.authfile import credentials
from runtime.images.errors import SignatureValidationFailed
from runtime.images.reference import parse
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore, Served
from tests.runtime.images.given import OCI_MANIFEST, Liar, build, layer

Left = Callable[[], list[str]]


def program(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


@requires("root")
def test_what_a_verifier_is_told(open_store: OpenStore, liar: Liar, tmp_path: Path) -> None:
    verifiers = tmp_path / "verifiers"
    images = open_store(verifiers=verifiers)
    assert images.pull(f"{liar.host}/app").id == liar.built.id, "without the directory everything is accepted"
    program(verifiers, "one", f'echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/stdin')
    images.pull(f"{liar.host}/app:1")
    assert (tmp_path / "arguments").read_text().split() == [
        "-name", f"{liar.host}/app:1", "-digest", liar.built.digest,
        "-stdin-media-type", "application/vnd.oci.descriptor.v1+json",
    ]  # fmt: skip
    descriptor = json.loads((tmp_path / "stdin").read_text())
    assert descriptor == {"mediaType": OCI_MANIFEST, "digest": liar.built.digest, "size": len(liar.built.manifest)}


@requires("root")
@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("echo not signed by us; exit 1", "two refuses sha256:.*: not signed by us$"),
        ("exit 3", "exit status 3"),
        ("sleep 60", r"no verdict in 0\.5 s"),
        ("sleep 60 & wait", r"no verdict in 0\.5 s"),
        ("head -c 1000000 /dev/zero; exit 1", "two refuses"),
    ],
)
def test_a_refusal(open_store: OpenStore, liar: Liar, tmp_path: Path, left: Left, text: str, match: str) -> None:
    program(tmp_path / "v", "one", "exit 0")
    program(tmp_path / "v", "two", text)
    images = open_store(verifiers=tmp_path / "v", verifier_timeout_s=0.5)
    with pytest.raises(SignatureValidationFailed, match=f"^SignatureValidationFailed: .*{match}"):
        images.pull(f"{liar.host}/app")
    assert images.list() == []
    assert left() == []
    assert not liar.asked_for("/blobs/")


@requires("root")
def test_what_can_not_be_run_refuses(open_store: OpenStore, liar: Liar, tmp_path: Path) -> None:
    program(tmp_path / "v", "one", "exit 0")
    (tmp_path / "v/one").chmod(0o644)
    with pytest.raises(SignatureValidationFailed, match="can't be run: permission denied"):
        open_store(verifiers=tmp_path / "v").pull(f"{liar.host}/app")


@requires("root")
def test_cancelled_while_a_verifier_thinks(open_store: OpenStore, liar: Liar, tmp_path: Path) -> None:
    program(tmp_path / "v", "one", f"touch {tmp_path}/begun; exec sleep 60")
    images = open_store(verifiers=tmp_path / "v", verifier_timeout_s=60)
    cancelled = threading.Event()

    def cancel() -> None:
        deadline = time.monotonic() + 30
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            cancelled.wait(0.01)
        cancelled.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(Cancelled):
        images.pull(f"{liar.host}/app", cancelled=cancelled)
    thread.join()
    began_s = time.monotonic()
    images.close()
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(
    ("auths", "wanted"),
    [
        ({}, None),
        ({"other": {"auth": "eDp5"}}, None),
        ({"host:5000": {"auth": "eDp5"}}, Auth(auth="eDp5")),
        ({"https://host:5000/v1/": {"username": "u", "password": "p"}}, Auth(username="u", password="p")),
        ({"host:5000": {"auth": "eDp5", "identitytoken": "t"}}, Auth(identity_token="t")),
        ({"host:5000": {"username": "<token>", "password": "t"}}, Auth(identity_token="t")),
        ({"host:5000": {"registrytoken": "t"}}, Auth(registry_token="t")),
        ({"host:5000": {"auth": "YTpi"}, "host:5000/a": {"auth": "eDp5"}, "host:5000/a/bc": {}}, Auth(auth="eDp5")),
    ],
)
def test_credentials_of_a_file(auths: dict[str, object], wanted: Auth | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert credentials(path, parse("host:5000/a/b")) is None
    path.write_text(json.dumps({"auths": auths, "HttpHeaders": {}, "credsStore": ""}))
    assert credentials(path, parse("host:5000/a/b")) == wanted


def test_credentials_for_docker_io(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"auths": {"https://index.docker.io/v1/": {"auth": "eDp5"}}}')
    assert credentials(path, parse("busybox")) == Auth(auth="eDp5")
    path.write_text('{"auths": {"x": {"auth": "c2VjcmV0"')
    with pytest.raises(InvalidSpec, match=r"config\.json: not a docker config\.json") as raised:
        credentials(path, parse("busybox"))
    assert "c2Vj" not in str(raised.value)


@requires("root")
def test_a_pull_with_them(open_store: OpenStore, tls_registry: Served, tmp_path: Path) -> None:
    built = build(layer(a="trusted"))
    tls_registry.pusher.push("trust/file", "1", built)
    (tmp_path / tls_registry.host).mkdir()
    (tmp_path / tls_registry.host / "hosts.toml").write_text(
        f'server = "https://{tls_registry.host}"\nca = "{tls_registry.ca}"\n'
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {tls_registry.host: {"auth": "dXNlcjpzZWNyZXQ="}}}))
    images = open_store(hosts_dir=tmp_path, auth_file=file)
    assert images.pull(f"{tls_registry.host}/trust/file:1").id == built.id

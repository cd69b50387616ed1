"""Stores of a test's own, and registries on loopback: Debian's docker-registry."""

from __future__ import annotations

import base64
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runtime.images import Images, ImagesConfig
from tests.limits import scaled
from tests.requires import need
from tests.runtime.images.given import Built, Liar, Pusher, free_port, layer, serving

OpenStore = Callable[..., Images]
SETTINGS = ImagesConfig(attempts=3, backoff_s=0.01, connect_timeout_s=5, progress_timeout_s=5)


@pytest.fixture
def open_store(run_dir: Path) -> Iterator[OpenStore]:
    """Opens a store, in a directory of the test's own unless told otherwise; closed at the end."""
    opened: list[Images] = []

    def open_one(root: Path | None = None, **settings: object) -> Images:
        images = Images(root or run_dir / "store", replace(SETTINGS, **settings))  # type: ignore[arg-type]
        images.open()
        opened.append(images)
        return images

    yield open_one
    for images in opened:
        images.close()


@pytest.fixture
def images(open_store: OpenStore) -> Images:
    return open_store()


def tree_of(images_root: Path) -> list[str]:
    """Everything of a store that belongs to images and containers; empty when nothing is left."""
    return sorted(
        str(path.relative_to(images_root))
        for name in ("layers", "rootfs", "spool")
        for path in (images_root / name).iterdir()
    )


@pytest.fixture
def left(run_dir: Path) -> Callable[[], list[str]]:
    return lambda: tree_of(run_dir / "store")


@dataclass
class Served:
    """A registry that runs: `host` as it stands in a reference."""

    host: str
    pusher: Pusher
    ca: Path | None = None


@contextmanager
def docker_registry(directory: Path, tls: tuple[Path, Path] | None = None, password: str = "") -> Iterator[str]:
    """Debian's docker-registry with its storage in `directory`; gives its host and port."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    lines = [
        "version: 0.1",
        "log: {level: error, accesslog: {disabled: true}}",
        "storage: {delete: {enabled: true}, filesystem: {rootdirectory: " + str(directory / "data") + "}}",
        f"http:\n  addr: 127.0.0.1:{port}\n  secret: x",
    ]
    if tls:
        lines.append(f"  tls: {{certificate: {tls[0]}, key: {tls[1]}}}")
    if password:
        (directory / "htpasswd").write_text(password + "\n")
        lines.append(f"auth: {{htpasswd: {{realm: test, path: {directory / 'htpasswd'}}}}}")
    settings = directory / "registry.yml"
    settings.write_text("\n".join(lines) + "\n")
    with open(directory / "log", "wb") as output:
        process = subprocess.Popen(["docker-registry", "serve", str(settings)], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=scaled(5)).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"docker-registry does not start: {(directory / 'log').read_text()}")
                time.sleep(0.02)  # noqa: TID251 - it has no way to say that it listens
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Plain HTTP, for the whole session; tests use repositories of their own."""
    need("registry")
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield Served(host, Pusher(f"http://{host}"))


@dataclass
class Authority:
    """A private CA and a certificate of its for 127.0.0.1."""

    ca: Path
    certificate: Path
    key: Path


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if not shutil.which("openssl"):
        pytest.skip("no openssl")
    directory = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    usage = ["-addext", "keyUsage=critical,keyCertSign"]
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "30", "-subj", "/CN=test ca", *usage
    )
    openssl("req", *new_key, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=registry")
    (directory / "extensions").write_text("subjectAltName = IP:127.0.0.1\nauthorityKeyIdentifier = keyid\n")
    signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30", "-extfile", "extensions"]
    openssl("x509", "-req", "-in", "request.pem", *signing, "-out", "certificate.pem")
    return Authority(directory / "ca.pem", directory / "certificate.pem", directory / "key.pem")


# htpasswd's bcrypt of "secret".
HTPASSWD = "user:$2b$05$/s8YNbWw/utFoXSy5hkHwunb64hxYla/fyv3XkH9hjtgqlDQuy6qe"
BASIC = {"Authorization": "Basic " + base64.b64encode(b"user:secret").decode()}


@pytest.fixture(scope="session")
def tls_registry(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Served]:
    """TLS by a private CA; user `user` with password `secret`."""
    need("registry")
    directory = tmp_path_factory.mktemp("tls-registry")
    with docker_registry(directory, (authority.certificate, authority.key), HTPASSWD) as host:
        context = ssl.create_default_context(cafile=str(authority.ca))
        yield Served(host, Pusher(f"https://{host}", BASIC, context), authority.ca)


@pytest.fixture
def small() -> Built:
    """An image of two small layers."""
    from tests.runtime.images.given import build

    return build(layer(a="lower", b="lower"), layer(b="upper"), Cmd=["sh"])


@pytest.fixture
def liar(small: Built) -> Iterator[Liar]:
    with serving(small) as server:
        yield server

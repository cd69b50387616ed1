"""Images made in the test, and what serves them: archives, a push to a registry, an HTTP server that lies."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import zstandard

from tests.limits import scaled

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layer:
    """A layer's entries, added one by one."""

    def __init__(self, format: int = tarfile.PAX_FORMAT) -> None:
        self._out = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._out, mode="w", format=format)  # noqa: SIM115

    def add(self, name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> Layer:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mode, info.mtime = kind, len(data), 0o644, 1_000_000_000
        for key, value in fields.items():
            setattr(info, key, value)
        self._tar.addfile(info, io.BytesIO(data))
        return self

    def file(self, name: str, data: bytes | str = b"", **fields: Any) -> Layer:
        return self.add(name, data=data.encode() if isinstance(data, str) else data, **fields)

    def directory(self, name: str, mode: int = 0o755, **fields: Any) -> Layer:
        return self.add(name, tarfile.DIRTYPE, mode=mode, **fields)

    def symlink(self, name: str, target: str, **fields: Any) -> Layer:
        return self.add(name, tarfile.SYMTYPE, linkname=target, **fields)

    def hardlink(self, name: str, target: str, **fields: Any) -> Layer:
        return self.add(name, tarfile.LNKTYPE, linkname=target, **fields)

    def tar(self) -> bytes:
        self._tar.close()
        return self._out.getvalue()


def layer(**files: str) -> bytes:
    """A layer of small files in the root directory."""
    made = Layer()
    for name, text in files.items():
        made.file(name, text)
    return made.tar()


@dataclass
class Built:
    """An image: its blobs by digest, its manifest among them."""

    manifest: bytes
    media_type: str
    id: str
    diff_ids: list[str]
    blobs: dict[str, bytes] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest(self.manifest)


def compressed(plain: bytes, how: str) -> bytes:
    match how:
        case "gzip":
            return gzip.compress(plain, 1, mtime=0)
        case "gzip-members":  # as pigz and estargz write it
            half = len(plain) // 2
            return gzip.compress(plain[:half], 1, mtime=0) + gzip.compress(plain[half:], 1, mtime=0)
        case "zstd":
            return zstandard.compress(plain)
    return plain


def build(*layers: bytes, how: str = "gzip", docker: bool = False, **config: Any) -> Built:
    """An image of plain tars; `config` is the configuration's own `config` object."""
    blobs: dict[str, bytes] = {}

    def blob(data: bytes, media_type: str) -> dict[str, Any]:
        blobs[digest(data)] = data
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    suffix = {"gzip": "+gzip", "gzip-members": "+gzip", "zstd": "+zstd"}.get(how, "")
    layer_type = DOCKER_LAYER if docker else OCI_LAYER + suffix
    diff_ids = [digest(plain) for plain in layers]
    document = {
        "architecture": ARCHITECTURE,
        "os": "linux",
        "created": "2026-01-02T03:04:05Z",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    described = blob(json.dumps(document).encode(), DOCKER_CONFIG if docker else OCI_CONFIG)
    media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": described,
        "layers": [blob(compressed(plain, how), layer_type) for plain in layers],
    }
    data = json.dumps(manifest).encode()
    blobs[digest(data)] = data
    return Built(data, media_type, described["digest"], diff_ids, blobs)


def index(*entries: tuple[Built, dict[str, str] | None]) -> bytes:
    """An index of images and their platforms."""
    manifests = []
    for built, platform in entries:
        entry = {"mediaType": built.media_type, "digest": built.digest, "size": len(built.manifest)}
        manifests.append(entry | ({"platform": platform} if platform else {}))
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


def oci_archive(built: Built, name: str | None, compress: bool = False) -> bytes:
    entry: dict[str, Any] = {"mediaType": built.media_type, "digest": built.digest, "size": len(built.manifest)}
    if name:
        entry["annotations"] = {"org.opencontainers.image.ref.name": name}
    top = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    files = Layer().file("oci-layout", '{"imageLayoutVersion": "1.0.0"}').file("index.json", top)
    for key, data in built.blobs.items():
        files.file("blobs/" + key.replace(":", "/"), data)
    return gzip.compress(files.tar()) if compress else files.tar()


def docker_archive(built: Built, layers: list[bytes], *tags: str) -> bytes:
    """As `docker save` wrote it before it knew of OCI layouts."""
    files = Layer().file("config.json", built.blobs[built.id])
    names = []
    for number, plain in enumerate(layers):
        names.append(f"{number}/layer.tar")
        files.file(names[-1], plain)
    entry = {"Config": "config.json", "RepoTags": list(tags) or None, "Layers": names}
    return files.file("manifest.json", json.dumps([entry])).tar()


class Pusher:
    """Fills a registry over its HTTP API."""

    def __init__(self, base: str, headers: dict[str, str] | None = None, context: Any = None) -> None:
        self._base = base
        self._headers = headers or {}
        self._context = context

    def _send(self, method: str, url: str, body: bytes = b"", content_type: str = "") -> tuple[int, str]:
        parts = urlsplit(url if "://" in url else self._base + url)
        port = parts.port
        assert parts.hostname
        connection = (
            HTTPSConnection(parts.hostname, port, timeout=scaled(30), context=self._context)
            if parts.scheme == "https"
            else HTTPConnection(parts.hostname, port, timeout=scaled(30))
        )
        headers = self._headers | ({"Content-Type": content_type} if content_type else {})
        try:
            connection.request(method, f"{parts.path}?{parts.query}", body, headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.headers.get("Location", "")
        finally:
            connection.close()

    def push(self, repository: str, tag: str, built: Built, manifest: bytes | None = None) -> None:
        """Blobs, then the manifest, as `tag`; with `manifest`, an index, that as well and it gets the tag."""
        for key, data in built.blobs.items():
            if data != built.manifest:
                status, location = self._send("POST", f"/v2/{repository}/blobs/uploads/")
                assert status == 202, status
                join = "&" if "?" in location else "?"
                status, _ = self._send("PUT", f"{location}{join}digest={key}", data, "application/octet-stream")
                assert status == 201, status
        name = built.digest if manifest is not None else tag
        status, _ = self._send("PUT", f"/v2/{repository}/manifests/{name}", built.manifest, built.media_type)
        assert status == 201, status
        if manifest is not None:
            status, _ = self._send("PUT", f"/v2/{repository}/manifests/{tag}", manifest, OCI_INDEX)
            assert status == 201, status


Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request to a Liar; `reply` sends a whole answer."""

    protocol_version = "HTTP/1.1"
    # A client that leaves connections open makes its test slow, not endless.
    timeout = 20
    server: Liar

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length is not None and length != len(body):
            self.close_connection = True

    def _handle(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        try:
            self.server.answer(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = _handle

    def log_message(self, format: str, *args: object) -> None:
        pass


class Liar(ThreadingHTTPServer):
    """Serves an image as a registry does, but for the paths that `lies` answers otherwise (by a part of the path)."""

    daemon_threads = False
    block_on_close = True

    def __init__(self, built: Built, address: str = "127.0.0.1") -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), Request)
        self.built = built
        self.lies: dict[str, Answer] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.release = threading.Event()

    @property
    def host(self) -> str:
        name = str(self.server_address[0])
        return f"{f'[{name}]' if ':' in name else name}:{self.server_address[1]}"

    def answer(self, request: Request) -> None:
        for part, lie in self.lies.items():
            if part in request.path:
                lie(request)
                return
        self.honest(request)

    def honest(self, request: Request) -> None:
        name = urlsplit(request.path).path.rpartition("/")[2]
        if "/manifests/" in request.path:
            request.reply(200, self.built.manifest, Content_Type=self.built.media_type)
        elif name in self.built.blobs:
            body = self.built.blobs[name]
            wanted = request.headers.get("Range", "")
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), int(last or len(body) - 1)
                request.reply(206, body[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(body)}")
            else:
                request.reply(200, body)
        else:
            request.reply(404, b"{}")

    def asked_for(self, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose path holds `part`."""
        return [headers for path, headers in self.seen if part in path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away is what some tests are about


@contextmanager
def serving(built: Built, address: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Liar]:
    liar = Liar(built, address)
    if tls is not None:
        liar.socket = tls.wrap_socket(liar.socket, server_side=True)
    thread = threading.Thread(target=liar.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield liar
    finally:
        liar.release.set()
        liar.shutdown()
        thread.join()
        liar.server_close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])

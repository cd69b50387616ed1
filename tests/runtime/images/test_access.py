"""Who is asked, with what: certificates, tokens, proxies, and credentials for the host that they are for alone."""

from __future__ import annotations

import base64
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from runtime.images import Auth, Images
from runtime.images.errors import RegistryDenied, RegistryUnavailable
from tests.requires import requires
from tests.runtime.images.conftest import Authority, OpenStore
from tests.runtime.images.given import Built, Layer, Liar, Request, build, digest, serving

pytestmark = requires("root")

USER = Auth(username="user", password="secret")
BASIC = "Basic " + base64.b64encode(b"user:secret").decode()


def hosts(directory: Path, registry: str, text: str) -> Path:
    """The directory of all registries' configuration, with that of one."""
    (directory / registry).mkdir(parents=True)
    (directory / registry / "hosts.toml").write_text(text)
    return directory


def server_context(authority: Authority, client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority.ca)
    return context


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_ipv6_host(images: Images, small: Built) -> None:
    with serving(small, "::1") as liar:
        image = images.pull(f"{liar.host}/app:1")
        assert image.repo_tags == (f"[::1]:{liar.server_address[1]}/app:1",)


def test_a_client_certificate(open_store: OpenStore, small: Built, authority: Authority, tmp_path: Path) -> None:
    with serving(small, tls=server_context(authority, client=True)) as liar:
        text = f'server = "https://{liar.host}"\nca = "{authority.ca}"\n'
        directory = hosts(tmp_path / "certs", liar.host, text)
        images = open_store(hosts_dir=directory)
        with pytest.raises(RegistryUnavailable, match="RegistryUnavailable: 127"):
            images.pull(f"{liar.host}/app")
        text += f'client = [["{authority.certificate}", "{authority.key}"]]\n'
        (directory / liar.host / "hosts.toml").write_text(text)  # read live
        assert images.pull(f"{liar.host}/app").id == small.id


def test_a_client_certificate_is_not_for_whom_a_redirect_names(
    open_store: OpenStore, small: Built, authority: Authority, tmp_path: Path
) -> None:
    asking = server_context(authority, client=True)
    asking.verify_mode = ssl.CERT_OPTIONAL
    shown: list[object] = []

    def look(request: Request) -> None:
        shown.append(request.connection.getpeercert())
        request.server.honest(request)

    with serving(small, tls=server_context(authority, client=True)) as liar, serving(small, tls=asking) as elsewhere:
        liar.lies["/blobs/"] = lambda request: request.reply(307, Location=f"https://{elsewhere.host}{request.path}")
        elsewhere.lies["/"] = look
        text = f'server = "https://{liar.host}"\nca = "{authority.ca}"\n'
        text += f'client = [["{authority.certificate}", "{authority.key}"]]\n'
        images = open_store(hosts_dir=hosts(tmp_path / "certs", liar.host, text))
        assert images.pull(f"{liar.host}/app").id == small.id
        assert shown == [None] * 3


@contextmanager
def connect_proxy(port: int, seen: list[bytes]) -> Iterator[str]:
    """A proxy that leads every CONNECT to a port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            request = b""
            while b"\r\n\r\n" not in request:
                request += client.recv(4096)
            seen.append(request)
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            other = {client: server, server: client}
            while True:
                for one in select.select([client, server], [], [], 30)[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    other[one].sendall(data)

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(client,)))
            threads[-1].start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for thread in threads:
            thread.join()


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")  # `skip_verify`; pytest undoes that crib ignores it
def test_a_proxy_for_https(
    open_store: OpenStore, small: Built, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees a name and its own password, and nothing of what is said to the registry."""
    seen: list[bytes] = []
    directory = hosts(tmp_path, "registry.invalid", 'server = "https://registry.invalid"\nskip_verify = true\n')
    with serving(small, tls=server_context(authority)) as liar, connect_proxy(liar.server_address[1], seen) as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:p%40ss@{proxy}")
        images = open_store(hosts_dir=directory)
        assert images.pull("registry.invalid/app", auth=USER).id == small.id
        images.close()
    assert seen and all(request.startswith(b"CONNECT registry.invalid:443 ") for request in seen)
    assert all(base64.b64encode(b"me:p@ss") in request for request in seen)
    assert BASIC.encode() not in b"".join(seen)


def test_a_mirror_gets_none_of_the_registrys_credentials(
    open_store: OpenStore, small: Built, liar: Liar, tmp_path: Path
) -> None:
    """Not even when it asks for them, which makes it one mirror less."""

    def ask(request: Request) -> None:
        if request.headers.get("Authorization") != BASIC:
            request.reply(401, WWW_Authenticate="Basic realm=x")
        else:
            request.server.honest(request)

    with serving(small) as mirror:
        text = f'server = "http://{liar.host}"\n[host."http://{mirror.host}/prefix/v2"]\noverride_path = true\n'
        images = open_store(hosts_dir=hosts(tmp_path, liar.host, text))
        mirror.lies["/"] = liar.lies["/"] = ask
        assert images.pull(f"{liar.host}/app", auth=USER).id == small.id
        assert mirror.seen and all(path.startswith("/prefix/v2/app/") for path, _ in mirror.seen)
        assert all("Authorization" not in headers for _, headers in mirror.seen)
        assert any(headers.get("Authorization") == BASIC for _, headers in liar.seen)


def test_nobody_is_asked_at_the_urls_of_a_layer(images: Images, small: Built) -> None:
    with serving(small) as foreign:
        manifest = json.loads(small.manifest)
        for layer in manifest["layers"]:
            layer["urls"] = [f"http://{foreign.host}/v2/app/blobs/{layer['digest']}"]
        data = json.dumps(manifest).encode()
        built = Built(data, small.media_type, small.id, small.diff_ids, small.blobs | {digest(data): data})
        with serving(built) as liar:
            assert images.pull(f"{liar.host}/app", auth=USER).id == built.id
        assert foreign.seen == []


def tokens(liar: Liar, uses: int) -> list[tuple[str, dict[str, list[str]]]]:
    """Each token serves so many requests; gives how each was asked for: the method and its parameters."""
    asked: list[tuple[str, dict[str, list[str]]]] = []
    left: dict[str, int] = {}

    def token(request: Request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", "0"))).decode()
        asked.append((request.command, parse_qs(body or request.path.partition("?")[2])))
        name = f"token{len(asked)}"
        left[name] = uses
        request.reply(200, json.dumps({"access_token": name, "expires_in": 3600}).encode())

    def registry(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if left.get(given, 0) > 0:
            left[given] -= 1
            liar.honest(request)
        else:
            realm = f'Bearer realm="http://{liar.host}/token?a=b",service="liar",scope="repository:app:pull"'
            request.reply(401, WWW_Authenticate=realm + ',error="invalid_token"')

    liar.lies = {"/token": token, "/v2/": registry}
    return asked


def test_tokens_that_end_in_the_middle(images: Images, tmp_path: Path) -> None:
    built = build(*(Layer().file(f"f{number}", "x").tar() for number in range(6)))
    with serving(built) as liar:
        asked = tokens(liar, uses=3)
        assert images.pull(f"{liar.host}/app").id == built.id
        assert 3 <= len(asked) <= 8, "a new one when the last is refused"
        assert asked[0] == ("GET", {"a": ["b"], "service": ["liar"], "scope": ["repository:app:pull"]})


def test_a_token_service_that_wants_to_be_asked_later(images: Images, liar: Liar) -> None:
    asked_s: list[float] = []

    def token(request: Request) -> None:
        asked_s.append(time.monotonic())
        if len(asked_s) == 1:
            request.reply(429, Retry_After="1")
        else:
            request.reply(200, b'{"token": "t"}')

    def guarded(request: Request) -> None:
        if request.headers.get("Authorization") == "Bearer t":
            liar.honest(request)
        else:
            request.reply(401, WWW_Authenticate=f'Bearer realm="http://{liar.host}/token"')

    liar.lies = {"/token": token, "/v2/": guarded}
    assert images.pull(f"{liar.host}/app").id == liar.built.id
    assert asked_s[1] - asked_s[0] >= 1


def guard(liar: Liar, wait: Callable[[], object] = lambda: None) -> None:
    """Only USER gets anything."""

    def guarded(request: Request) -> None:
        if request.headers.get("Authorization") == BASIC:
            liar.honest(request)
        else:
            wait()
            request.reply(401, WWW_Authenticate='Basic realm="x"')

    liar.lies["/v2/"] = guarded


def test_many_blobs_meet_who_wants_a_password(open_store: OpenStore, tmp_path: Path) -> None:
    """The mirror has no layers, so that the registry is first asked for several at once, and refuses them together."""
    built = build(*(Layer().file(str(number)).tar() for number in range(3)))
    together = threading.Barrier(3)
    with serving(built) as mirror, serving(built) as liar:
        guard(liar, lambda: together.wait(20))
        mirror.lies = {built.id: mirror.honest, "/blobs/": lambda request: request.reply(404)}
        text = f'server = "http://{liar.host}"\n[host."http://{mirror.host}"]'
        images = open_store(hosts_dir=hosts(tmp_path, "registry.invalid", text))
        assert images.pull("registry.invalid/app", auth=USER).id == built.id


def test_empty_credentials_are_none(open_store: OpenStore, liar: Liar, tmp_path: Path) -> None:
    """What a client sends that has none; those of the file are used."""
    guard(liar)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {liar.host: {"auth": BASIC.removeprefix("Basic ")}}}))
    images = open_store(auth_file=file)
    assert images.pull(f"{liar.host}/app", auth=Auth(server_address=liar.host)).id == liar.built.id


def test_an_identity_token(images: Images, liar: Liar) -> None:
    asked = tokens(liar, uses=100)
    assert images.pull(f"{liar.host}/app", auth=Auth(identity_token="refresh me")).id == liar.built.id
    [(method, told)] = asked
    assert method == "POST"
    assert (told["grant_type"], told["refresh_token"]) == (["refresh_token"], ["refresh me"])


def test_a_token_that_never_serves(images: Images, liar: Liar) -> None:
    asked = tokens(liar, uses=0)
    with pytest.raises(RegistryDenied, match="answers 401"):
        images.pull(f"{liar.host}/app")
    assert len(asked) == 1

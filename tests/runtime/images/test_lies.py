"""Registries that fail, lie or stall: a clear error of the right class, in bounded time, and nothing left."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import Cancelled, CribError, Exhausted, NotFound
from runtime.images import Auth, Images
from runtime.images.errors import BadContent, BadImage, RegistryDenied, RegistryUnavailable
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore, Served
from tests.runtime.images.given import Answer, Built, Layer, Liar, Request, build, compressed, digest, layer, serving

pytestmark = requires("root")

Left = Callable[[], list[str]]


def fails(images: Images, liar: Liar, error: type[CribError], match: str, left: Left, **pull: object) -> None:
    with pytest.raises(error, match=match) as raised:
        images.pull(f"{liar.host}/app", **pull)  # type: ignore[arg-type]
    assert type(raised.value) is error
    assert left() == []
    assert images.list() == []


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda request: request.reply(code, body, None, **headers)


def big_layer(built: Built) -> str:
    """The digest of the blob of the largest layer."""
    return max(
        (key for key in built.blobs if key not in (built.digest, built.id)), key=lambda key: len(built.blobs[key])
    )


def test_the_honest_one(images: Images, liar: Liar) -> None:
    assert images.pull(f"{liar.host}/app").id == liar.built.id


@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        (401, RegistryDenied, "answers 401: it wants credentials"),
        (403, RegistryDenied, "answers 403"),
        (404, NotFound, "not found at 127"),
        (418, BadContent, "answers 418"),
        (429, RegistryUnavailable, "^RegistryUnavailable: 127.* answers 429"),
        (500, RegistryUnavailable, "^RegistryUnavailable: 127.* answers 500"),
        (503, RegistryUnavailable, "^RegistryUnavailable: 127.* answers 503"),
    ],
)
def test_statuses(
    images: Images, liar: Liar, left: Left, where: str, code: int, error: type[CribError], match: str
) -> None:
    liar.lies[where] = status(code)
    fails(images, liar, error, match, left)


def test_what_passes_is_tried_again(images: Images, liar: Liar) -> None:
    answers = [status(500), status(429, Retry_After="0")]

    def sometimes(request: Request) -> None:
        (answers.pop() if answers else liar.honest)(request)

    liar.lies["/manifests/"] = sometimes
    assert images.pull(f"{liar.host}/app").id == liar.built.id
    assert len(liar.asked_for("/manifests/")) == 3


def test_a_wait_that_is_no_number(images: Images, liar: Liar, left: Left) -> None:
    liar.lies["/manifests/"] = status(429, Retry_After="\xb2")
    fails(images, liar, RegistryUnavailable, "answers 429", left)


def test_a_manifest_that_breaks_off_comes_again(images: Images, liar: Liar) -> None:
    """Without a length only the connection tells."""

    def cut(request: Request) -> None:
        liar.lies.clear()
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"5\r\n" + liar.built.manifest[:5] + b"\r\n")
        request.close_connection = True

    liar.lies["/manifests/"] = cut
    assert images.pull(f"{liar.host}/app").id == liar.built.id


def test_a_wait_that_is_too_long(images: Images, liar: Liar, left: Left) -> None:
    liar.lies["/manifests/"] = status(429, b"slow down, please", Retry_After="3600")
    fails(images, liar, RegistryUnavailable, r"answers 429 \(slow down, please\)", left)
    assert len(liar.asked_for("/manifests/")) == 1


def test_no_registry_at_all(images: Images, liar: Liar, left: Left) -> None:
    liar.lies["/v2/"] = status(200, b"<html>Welcome</html>", Content_Type="text/html; charset=utf-8")
    fails(images, liar, BadContent, "arrives as text/html: that is no registry", left)
    liar.lies["/v2/"] = status(200, b"<html>Welcome</html>", Content_Type="application/json")
    fails(images, liar, BadContent, "not a manifest", left)


def test_another_manifest_than_was_asked_for(images: Images, liar: Liar, left: Left) -> None:
    liar.lies["/manifests/"] = lambda request: request.reply(
        200, liar.built.manifest, Content_Type=liar.built.media_type, Docker_Content_Digest=digest(b"x")
    )
    fails(images, liar, BadContent, f"instead of {digest(b'x')}", left)
    liar.lies.clear()
    with pytest.raises(BadContent, match="instead of"):
        images.pull(f"{liar.host}/app@{digest(b'x')}")


def test_a_manifest_without_end(images: Images, liar: Liar, left: Left) -> None:
    liar.lies["/manifests/"] = status(200, b" " * (5 << 20))
    fails(images, liar, Exhausted, "manifest latest of more than 4194304 bytes", left)


def lines(first: bytes, then: bytes) -> Answer:
    """`then`, again and again, until the client goes."""

    def answer(request: Request) -> None:
        try:
            request.wfile.write(first)
            while True:
                request.wfile.write(then * 1000)
        except ConnectionError:
            request.close_connection = True

    return answer


@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"Trailer: x\r\n"),
    ],
)
def test_an_answer_without_end(
    open_store: OpenStore, liar: Liar, left: Left, where: str, first: bytes, then: bytes
) -> None:
    images = open_store(attempts=1)
    liar.lies[where] = lines(first, then)
    fails(images, liar, RegistryUnavailable, "bytes around the body|connection ends", left)


def test_an_index_that_names_itself(images: Images, liar: Liar, left: Left) -> None:
    nested = json.dumps(
        {
            "schemaVersion": 2,
            "manifests": [
                {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest(b""), "size": 300},
            ],
        }
    ).encode()
    liar.lies["/manifests/"] = status(200, nested)
    fails(images, liar, BadContent, f"instead of {digest(b'')}", left)


@pytest.mark.parametrize("what", ["config", "layer"])
def test_wrong_bytes(images: Images, liar: Liar, left: Left, what: str) -> None:
    key = liar.built.id if what == "config" else big_layer(liar.built)
    right = liar.built.blobs[key]
    liar.lies[key] = status(200, bytes([right[0] ^ 1]) + right[1:])
    with pytest.raises(CribError) as raised:
        images.pull(f"{liar.host}/app")
    assert isinstance(raised.value, BadContent)
    assert key in str(raised.value)
    assert left() == []


def test_too_many_bytes(images: Images, liar: Liar, left: Left) -> None:
    key = big_layer(liar.built)
    liar.lies[key] = status(200, liar.built.blobs[key] + b"more")
    fails(images, liar, BadContent, "is larger than", left)


def test_a_body_that_always_ends_early(images: Images, liar: Liar, left: Left) -> None:
    key = big_layer(liar.built)
    liar.lies[key] = lambda request: request.reply(200, b"", length=len(liar.built.blobs[key]))
    fails(images, liar, RegistryUnavailable, "connection ends after 0 of", left)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_resumed(open_store: OpenStore, ranges: bool) -> None:
    built = build(Layer().file("big", bytes(range(256)) * 20_000).tar(), how="plain")
    key = big_layer(built)
    whole = built.blobs[key]

    def cut(request: Request) -> None:
        """Each megabyte ends the connection."""
        start = int(request.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
        end = start + (1 << 20) if ranges else (len(liar.asked_for(key))) << 20
        headers = {"Content_Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"} if start else {}
        request.reply(206 if start else 200, whole[start:end], length=len(whole) - start, **headers)

    images = open_store()
    with serving(built) as liar:
        liar.lies[key] = cut
        image = images.pull(f"{liar.host}/app")
        assert images.read_file(image.id, "big", 1 << 23) == bytes(range(256)) * 20_000
        assert len(liar.asked_for(key)) == 1 + len(whole) // (1 << 20)


def test_a_layer_that_unpacks_to_something_else(images: Images, liar: Liar, left: Left) -> None:
    claimed, other = layer(a="claimed"), layer(a="other")
    built = build(claimed)
    manifest = json.loads(built.manifest)
    blob = compressed(other, "gzip")
    manifest["layers"][0] |= {"digest": digest(blob), "size": len(blob)}
    built.manifest = json.dumps(manifest).encode()
    built.blobs |= {digest(blob): blob, built.digest: built.manifest}
    liar.built = built
    fails(images, liar, BadContent, f"unpacks to {digest(other)}, the image wants {digest(claimed)}", left)


def test_one_bad_layer_among_good_ones(images: Images, left: Left) -> None:
    built = build(*(layer(**{f"f{number}": "x" * 10_000}) for number in range(8)))
    with serving(built) as liar:
        last = json.loads(built.manifest)["layers"][-1]["digest"]
        liar.lies[last] = status(404)
        fails(images, liar, NotFound, "not found", left)
        liar.lies.clear()
        assert images.pull(f"{liar.host}/app").id == built.id, "and then all is well"


def stall(liar: Liar, key: str) -> Answer:
    def answer(request: Request) -> None:
        body = liar.built.blobs[key]
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2])
        request.wfile.flush()
        liar.release.wait(scaled(60))

    return answer


def test_a_stalled_socket(open_store: OpenStore, liar: Liar, left: Left) -> None:
    images = open_store(progress_timeout_s=0.3)
    key = big_layer(liar.built)
    liar.lies[key] = stall(liar, key)
    fails(images, liar, RegistryUnavailable, r"no data for 0\.3 s", left)


def silence(liar: Liar, key: str) -> Answer:
    def answer(request: Request) -> None:
        liar.release.wait(scaled(60))

    return answer


@pytest.mark.parametrize("how", [stall, silence])
def test_cancelled_while_nothing_comes(
    images: Images, liar: Liar, left: Left, how: Callable[[Liar, str], Answer]
) -> None:
    key = big_layer(liar.built)
    liar.lies[key] = how(liar, key)
    cancelled = threading.Event()
    ended_s: list[float] = []

    def pull() -> None:
        with pytest.raises(Cancelled):
            images.pull(f"{liar.host}/app", cancelled=cancelled)
        ended_s.append(time.monotonic())

    thread = threading.Thread(target=pull)
    thread.start()
    deadline = time.monotonic() + 30
    while not liar.asked_for(key) and time.monotonic() < deadline:
        thread.join(0.01)
    at_s = time.monotonic()
    cancelled.set()
    thread.join()
    assert ended_s[0] - at_s < 1
    images.close()
    assert time.monotonic() - at_s < 2, "the transfer ends as well"
    assert left() == []


def test_one_of_two_gives_up(images: Images, liar: Liar) -> None:
    key = big_layer(liar.built)

    def late(request: Request) -> None:
        liar.release.wait(scaled(60))
        liar.honest(request)

    liar.lies[key] = late
    cancelled = threading.Event()
    results: list[object] = []

    def pull(event: threading.Event) -> None:
        try:
            results.append(images.pull(f"{liar.host}/app", cancelled=event).id)
        except Cancelled:
            results.append("cancelled")

    threads = [threading.Thread(target=pull, args=(event,)) for event in (cancelled, threading.Event())]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while not liar.asked_for(key) and time.monotonic() < deadline:
        threads[0].join(0.01)
    cancelled.set()
    threads[0].join()
    assert results == ["cancelled"]
    liar.release.set()
    threads[1].join()
    assert results == ["cancelled", liar.built.id]
    assert len(liar.asked_for("/manifests/")) == 1, "one transfer for both"


def test_redirects(images: Images, liar: Liar, small: Built, open_store: OpenStore, tmp_path: Path) -> None:
    """Blobs often lie elsewhere; what is secret stays behind."""
    (tmp_path / liar.host).mkdir()
    (tmp_path / liar.host / "hosts.toml").write_text(
        f'[host."http://{liar.host}"]\nheader = {{X-Secret = "configured"}}\n'
    )
    images = open_store(tmp_path / "store", hosts_dir=tmp_path)
    with serving(small) as elsewhere:

        def away(request: Request) -> None:
            if "Authorization" not in request.headers:
                request.reply(401, WWW_Authenticate="Basic realm=x")
            else:
                request.reply(307, Location=f"http://{elsewhere.host}{request.path}")

        liar.lies["/blobs/"] = away
        image = images.pull(f"{liar.host}/app", auth=Auth(username="user", password="secret"))
        assert image.id == small.id
        assert any("Authorization" in headers for headers in liar.asked_for("/blobs/"))
        assert all(headers["X-Secret"] == "configured" for headers in liar.asked_for(""))
        assert len(elsewhere.seen) == 3
        for _, headers in elsewhere.seen:
            assert "Authorization" not in headers
            assert "X-Secret" not in headers


@pytest.mark.parametrize(
    ("location", "match"),
    [("/v2/app/manifests/latest", "redirects more than 5 times"), ("file:///etc/passwd", "redirects to a 'file' URL")],
)
def test_bad_redirects(images: Images, liar: Liar, left: Left, location: str, match: str) -> None:
    liar.lies["/manifests/"] = status(302, Location=location)
    fails(images, liar, BadContent, match, left)


def token_service(liar: Liar, answer: Answer) -> None:
    def registry(request: Request) -> None:
        if request.headers.get("Authorization") == "Bearer good":
            liar.honest(request)
        else:
            challenge = f'Bearer realm="http://{liar.host}/token",service="liar",scope="repository:app:pull"'
            request.reply(401, WWW_Authenticate=challenge)

    liar.lies = {"/token": answer, "/v2/": registry}


def test_bearer_tokens(images: Images, liar: Liar) -> None:
    def token(request: Request) -> None:
        given = request.headers.get("Authorization", "")
        right = given == "Basic " + base64.b64encode(b"user:secret").decode()
        request.reply(200 if right else 401, json.dumps({"token": "good", "expires_in": 300}).encode())

    token_service(liar, token)
    with pytest.raises(RegistryDenied):
        images.pull(f"{liar.host}/app")
    assert images.pull(f"{liar.host}/app", auth=Auth(username="user", password="secret")).id == liar.built.id
    assert "service=liar" in next(path for path, _ in liar.seen if path.startswith("/token"))
    assert len([path for path, _ in liar.seen if path.startswith("/token")]) == 2, "a token serves the whole pull"


def test_a_registry_token(images: Images, liar: Liar) -> None:
    token_service(liar, status(500))
    assert images.pull(f"{liar.host}/app", auth=Auth(registry_token="good")).id == liar.built.id


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (status(200, b"<html>"), BadContent, "answers with something else than a token"),
        (status(200, b"{}"), BadContent, "without a token"),
        (status(500), RegistryUnavailable, "token service 127.* answers 500"),
        (status(200, b'{"token": "bad"}'), RegistryDenied, "answers 401"),
    ],
)
def test_bad_token_services(
    images: Images, liar: Liar, left: Left, answer: Answer, error: type[CribError], match: str
) -> None:
    token_service(liar, answer)
    fails(images, liar, error, match, left)


def test_a_proxy(open_store: OpenStore, liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The liar is asked for whole URLs; it looks at the path's end alone."""
    (tmp_path / "registry.invalid").mkdir()
    (tmp_path / "registry.invalid" / "hosts.toml").write_text('server = "http://registry.invalid"')
    images = open_store(hosts_dir=tmp_path)
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@{liar.host}")
    assert images.pull("registry.invalid/app").id == liar.built.id
    assert all(path.startswith("http://registry.invalid/v2/") for path, _ in liar.seen)
    secret = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert all(headers["proxy-authorization"] == secret for _, headers in liar.seen)
    liar.seen.clear()
    monkeypatch.setenv("no_proxy", "invalid")
    with pytest.raises(RegistryUnavailable):
        images.pull("registry.invalid/app:2")
    assert liar.seen == []


def test_indexes_in_indexes(images: Images, liar: Liar, left: Left) -> None:
    """A true cycle would need a digest that holds itself; an endless chain is one to the client."""
    documents = [liar.built.manifest]
    for _ in range(6):
        inner = documents[-1]
        kind = "application/vnd.oci.image.index.v1+json" if len(documents) > 1 else liar.built.media_type
        entry = {"mediaType": kind, "digest": digest(inner), "size": len(inner)}
        documents.append(json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
    by_digest = {digest(document): document for document in documents}

    def answer(request: Request) -> None:
        request.reply(200, by_digest.get(request.path.rpartition("/")[2], documents[-1]))

    liar.lies["/manifests/"] = answer
    fails(images, liar, BadImage, "indexes more than 3 deep", left)


def test_a_storm_of_429(images: Images, liar: Liar, left: Left) -> None:
    liar.lies["/blobs/"] = status(429, Retry_After="0")
    fails(images, liar, RegistryUnavailable, "answers 429", left)
    assert len(liar.asked_for("/blobs/")) <= 9


def test_a_certificate_for_another_name(
    open_store: OpenStore, tls_registry: Served, tmp_path: Path, left: Left
) -> None:
    port = tls_registry.host.rpartition(":")[2]
    (tmp_path / f"localhost:{port}").mkdir()
    (tmp_path / f"localhost:{port}" / "hosts.toml").write_text(
        f'server = "https://localhost:{port}"\nca = "{tls_registry.ca}"\n'
    )
    images = open_store(hosts_dir=tmp_path)
    with pytest.raises(RegistryUnavailable, match=r"^RegistryUnavailable: localhost.*(match|valid)"):
        images.pull(f"localhost:{port}/app")
    assert left() == []


def test_layers_that_race(images: Images, tmp_path: Path, left: Left) -> None:
    """CVE-2025-47290: what one layer puts in another's way while both are unpacked leads nowhere outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    layers = []
    for number in range(12):
        made = Layer()
        if number % 2:
            for name in ("a", "b"):
                made.directory(name).file(f"{name}/written", "x" * 5000).file(f"{name}/sub/written", "x")
        else:
            made.symlink("a", str(outside)).symlink("b", "../" * 12 + str(outside)[1:])
        layers.append(made.file(f"n{number}", "x").tar())
    built = build(*layers)
    with serving(built) as liar:
        image = images.pull(f"{liar.host}/app")
        assert images.read_file(image.id, "a/written", 10_000) == b"x" * 5000
    assert list(outside.iterdir()) == []

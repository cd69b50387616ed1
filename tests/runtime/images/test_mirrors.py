"""Several hosts for one registry: dead ones, lying ones; and one layer in several requests."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.errors import NotFound
from runtime.images import Images, ImagesConfig
from runtime.images.errors import BadContent, BadImage, RegistryUnavailable
from runtime.images.health import Health
from runtime.images.manifest import Descriptor
from runtime.images.reference import parse
from runtime.images.registry import Registry
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore
from tests.runtime.images.given import Built, Layer, Liar, Request, build, serving

pytestmark = requires("root")

Left = Callable[[], list[str]]


def hosts(directory: Path, *urls: str) -> Path:
    """A configuration by which images of registry.invalid come from `urls`, in that order."""
    (directory / "registry.invalid").mkdir()
    lines = [f'server = "{urls[-1]}"', *(f'[host."{url}"]' for url in urls)]
    (directory / "registry.invalid" / "hosts.toml").write_text("\n".join(lines))
    return directory


@pytest.fixture
def mirror(small: Built) -> Iterator[Liar]:
    with serving(small) as server:
        yield server


def biggest(built: Built) -> str:
    return max(
        (key for key in built.blobs if key not in (built.digest, built.id)), key=lambda key: len(built.blobs[key])
    )


@pytest.mark.parametrize("how", ["changed", "longer", "nonsense"])
def test_wrong_content_is_fetched_elsewhere(
    open_store: OpenStore, liar: Liar, mirror: Liar, tmp_path: Path, left: Left, how: str
) -> None:
    """Also when a mirror's bytes make no layer at all."""
    images = open_store(hosts_dir=hosts(tmp_path, f"http://{mirror.host}", f"http://{liar.host}"))
    key = biggest(liar.built)
    right = liar.built.blobs[key]
    wrong = {
        "changed": right[:-9] + bytes([right[-9] ^ 1]) + right[-8:],
        "longer": right + b"x",
        "nonsense": b"\1" * len(right),
    }
    mirror.lies[key] = lambda request: request.reply(200, wrong[how])
    image = images.pull("registry.invalid/app")
    assert image.id == liar.built.id
    assert images.read_file(image.id, "b", 10) == b"upper"
    assert len(mirror.asked_for(key)) == len(liar.asked_for(key)) == 1
    images.remove(image.id)
    liar.lies[key] = mirror.lies[key]
    with pytest.raises(BadContent):
        images.pull("registry.invalid/app")
    assert left() == []


def test_a_bad_image_is_bad_everywhere(open_store: OpenStore, tmp_path: Path, left: Left) -> None:
    built = build(Layer().file("../out", os.urandom(3 << 20)).tar())
    with serving(built) as one, serving(built) as other:
        images = open_store(hosts_dir=hosts(tmp_path, f"http://{one.host}", f"http://{other.host}"))
        with pytest.raises(BadImage, match="leads out of the layer"):
            images.pull("registry.invalid/app")
        assert not other.asked_for("/blobs/")
        assert left() == []


def test_a_dead_mirror_costs_its_time_out_once(open_store: OpenStore, liar: Liar, tmp_path: Path) -> None:
    """It takes connections and never answers: neither the next blob nor the next pull waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as dead:
        url = f"http://127.0.0.1:{dead.getsockname()[1]}"
        images = open_store(hosts_dir=hosts(tmp_path, url, f"http://{liar.host}"), progress_timeout_s=1)
        began_s = time.monotonic()
        image = images.pull("registry.invalid/app")
        assert 1 <= time.monotonic() - began_s < 5
        images.remove(image.id)
        dead.setblocking(False)
        dead.accept()[0].close()
        images.pull("registry.invalid/app")
        with pytest.raises(BlockingIOError):
            dead.accept()


def test_a_dead_mirror_is_not_asked_for_what_the_registry_does_not_have(
    open_store: OpenStore, liar: Liar, tmp_path: Path
) -> None:
    liar.lies["/manifests/gone"] = lambda request: request.reply(404)
    with socket.create_server(("127.0.0.1", 0)) as dead:
        url = f"http://127.0.0.1:{dead.getsockname()[1]}"
        images = open_store(hosts_dir=hosts(tmp_path, url, f"http://{liar.host}"), progress_timeout_s=1)
        with pytest.raises(NotFound):
            images.pull("registry.invalid/app:gone")
        dead.setblocking(False)
        dead.accept()[0].close()
        with pytest.raises(NotFound):
            images.pull("registry.invalid/app:gone")
        with pytest.raises(BlockingIOError):
            dead.accept()


def test_a_mirror_that_is_back_is_asked_when_nobody_else_has_it(
    open_store: OpenStore, liar: Liar, mirror: Liar, tmp_path: Path
) -> None:
    """The registry itself, found dead, comes last, and a mirror's word is not its own."""
    liar.lies["/manifests/1"] = lambda request: request.reply(503)
    mirror.lies["/manifests/"] = lambda request: request.reply(404)
    images = open_store(hosts_dir=hosts(tmp_path, f"http://{mirror.host}", f"http://{liar.host}"))
    with pytest.raises(RegistryUnavailable):
        images.pull("registry.invalid/app:1")
    assert images.pull("registry.invalid/app:2").id == liar.built.id


def test_nobody_listens_at_the_mirror(open_store: OpenStore, liar: Liar, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    images = open_store(hosts_dir=hosts(tmp_path, url, f"http://{liar.host}"), backoff_s=30)
    began_s = time.monotonic()
    assert images.pull("registry.invalid/app").id == liar.built.id
    assert time.monotonic() - began_s < 20, "it isn't tried again while there is somebody else"


@pytest.fixture
def large() -> Built:
    return build(Layer().file("big", os.urandom(5 << 20)).tar(), how="plain")


RANGES = {"range_bytes": 1 << 20, "max_ranges": 3}
FIRST = "bytes=0-1048575"


def slowly(request: Request, body: bytes) -> None:
    """The first piece of `body`, by a network that takes a second for its second half."""
    request.reply(206, body[: 1 << 19], length=1 << 20, Content_Range=f"bytes 0-1048575/{len(body)}")
    request.wfile.flush()
    threading.Event().wait(1)
    request.wfile.write(body[1 << 19 : 1 << 20])
    request.close_connection = False


def test_large_layers_come_in_parallel(open_store: OpenStore, large: Built, left: Left) -> None:
    images = open_store(**RANGES)
    key = biggest(large)
    with serving(large) as liar:
        together = threading.Barrier(3, timeout=scaled(30))

        def held(request: Request) -> None:
            """The first three pieces after the first are asked for before one of them is answered."""
            if request.headers["Range"] == FIRST:
                slowly(request, large.blobs[key])
                return
            if 2 <= len(liar.asked_for(key)) <= 4 and not together.broken:
                together.wait()
            liar.honest(request)

        liar.lies[key] = held
        image = images.pull(f"{liar.host}/app")
        assert len(images.read_file(image.id, "big", 6 << 20)) == 5 << 20
        assert sorted(h["Range"] for h in liar.asked_for(key))[:2] == [FIRST, "bytes=1048576-2097151"]
        assert len(liar.asked_for(key)) == 6


def test_who_takes_slowly_gets_one_connection(large: Built, tmp_path: Path) -> None:
    """More connections would not make it faster."""
    config = ImagesConfig(range_bytes=1 << 20, max_ranges=3)
    key = biggest(large)
    taken = []
    with serving(large) as liar:
        registry = Registry(parse(f"{liar.host}/app"), None, config, Health(1))

        def take(data: bytes) -> None:
            taken.append(data)
            if sum(map(len, taken)) == 1 << 20:
                threading.Event().wait(1)

        registry.blob(Descriptor("", key, len(large.blobs[key])), take, tmp_path)
        registry.close()
        assert b"".join(taken) == large.blobs[key]
        assert [headers["Range"] for headers in liar.asked_for(key)] == [FIRST, "bytes=1048576-"]


def test_ranges_that_the_server_does_not_know(open_store: OpenStore, large: Built) -> None:
    images = open_store(**RANGES)
    key = biggest(large)
    with serving(large) as liar:
        liar.lies[key] = lambda request: request.reply(200, large.blobs[key])
        assert images.pull(f"{liar.host}/app").id == large.id
        assert len(liar.asked_for(key)) == 1


def test_pieces_that_break_off(open_store: OpenStore, large: Built, left: Left) -> None:
    images = open_store(**RANGES)
    key = biggest(large)
    cut: set[str] = set()
    with serving(large) as liar:

        def half(request: Request) -> None:
            wanted = request.headers["Range"]
            if wanted == FIRST:
                slowly(request, large.blobs[key])
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last or len(large.blobs[key]) - 1)
            if wanted in cut:
                liar.honest(request)
                return
            cut.add(wanted)
            body = large.blobs[key][start : (start + end) // 2]
            place = f"bytes {start}-{end}/{len(large.blobs[key])}"
            request.reply(206, body, length=end - start + 1, Content_Range=place)
            request.close_connection = True

        liar.lies[key] = half
        image = images.pull(f"{liar.host}/app")
        assert image.id == large.id
        images.remove(image.id)
        liar.lies[key] = lambda request: request.reply(503)
        with pytest.raises(RegistryUnavailable):
            images.pull(f"{liar.host}/app")
        assert left() == []


def test_wrong_bytes_in_one_piece(open_store: OpenStore, large: Built, images: Images, left: Left) -> None:
    images.close()
    images = open_store(**RANGES)
    key = biggest(large)
    right = large.blobs[key]
    with serving(large) as liar:
        large.blobs[key] = right[: 3 << 20] + b"?" + right[(3 << 20) + 1 :]

        def wrong(request: Request) -> None:
            if request.headers["Range"] == FIRST:
                slowly(request, right)
            else:
                liar.honest(request)

        liar.lies[key] = wrong
        with pytest.raises(BadContent, match="arrives with other content"):
            images.pull(f"{liar.host}/app")
        assert left() == []

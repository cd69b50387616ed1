"""Pulls from a real registry."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.errors import Cancelled, InvalidSpec, NotFound, Unsupported
from runtime.images import Auth, Image, Images, Progress
from runtime.images.errors import BadContent, RegistryDenied, RegistryUnavailable
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore, Served
from tests.runtime.images.given import (
    ARCHITECTURE,
    Layer,
    Pusher,
    Request,
    build,
    digest,
    free_port,
    index,
    layer,
    serving,
)

pytestmark = requires("root", "registry")


def content(images: Images, image: Image, *names: str) -> list[bytes]:
    return [images.read_file(image.id, name, 1000) for name in names]


@pytest.mark.parametrize("how", ["gzip", "gzip-members", "zstd", "plain"])
@pytest.mark.parametrize("docker", [False, True])
def test_every_format(images: Images, registry: Served, how: str, docker: bool) -> None:
    if docker and how != "gzip":
        pytest.skip("docker's layers are gzip")
    built = build(layer(a="lower", b="lower"), layer(b="upper"), how=how, docker=docker, Cmd=["sh"], Env=["A=1"])
    registry.pusher.push(f"formats/{how}", f"v{docker}", built)
    name = f"{registry.host}/formats/{how}"
    image = images.pull(f"{name}:v{docker}")
    assert image.id == built.id
    assert image.repo_tags == (f"{name}:v{docker}",)
    assert image.repo_digests == (f"{name}@{built.digest}",)
    assert image.config.cmd == ("sh",)
    assert image.manifest_digest == built.digest
    assert content(images, image, "/a", "b") == [b"lower", b"upper"]
    assert images.list() == [image]


def test_by_digest(images: Images, registry: Served) -> None:
    built = build(layer(a="digest"))
    registry.pusher.push("by-digest", "latest", built)
    name = f"{registry.host}/by-digest"
    image = images.pull(f"{name}@{built.digest}")
    assert image.repo_tags == ()
    assert image.repo_digests == (f"{name}@{built.digest}",)
    with pytest.raises(NotFound):
        images.get(name)
    both = images.pull(f"{name}:other@{built.digest}")
    assert both == image, "the digest decides"
    tagged = images.pull(name)
    assert (tagged.id, tagged.repo_tags) == (image.id, (f"{name}:latest",))
    for ref in (
        name,
        f"{name}@{built.digest}",
        f"{name}:x@{built.digest}",
        image.id,
        image.id[7:],
        image.id[7:20],
        image.id[:19],
    ):
        assert images.get(ref) == tagged, ref


def test_an_index(images: Images, registry: Served) -> None:
    here, elsewhere, claim = build(layer(a="here")), build(layer(a="elsewhere")), build(layer(a="claim"))
    platform = {"os": "linux", "architecture": "s390x"}
    own = {"os": "linux", "architecture": ARCHITECTURE}
    for other in (elsewhere, claim):
        registry.pusher.push("index", other.digest.replace(":", "-"), other)
    both = index((claim, {"os": "unknown", "architecture": "unknown"}), (elsewhere, platform), (here, own))
    registry.pusher.push("index", "latest", here, both)
    name = f"{registry.host}/index"
    image = images.pull(name)
    assert image.id == here.id
    assert image.repo_digests == (f"{name}@{digest(both)}",), "what was asked for is the index"
    assert image.manifest_digest == here.digest
    registry.pusher.push("index", "foreign", elsewhere, index((elsewhere, platform)))
    with pytest.raises(NotFound, match="linux/s390x"):
        images.pull(f"{name}:foreign")


def test_layers_are_shared(images: Images, registry: Served, left: Callable[[], list[str]]) -> None:
    base = layer(a="shared", pad="x" * 100_000)
    one, two = build(base, layer(b="one")), build(base, layer(b="two"))
    registry.pusher.push("shared", "one", one)
    registry.pusher.push("shared", "two", two)
    first = images.pull(f"{registry.host}/shared:one")
    states: dict[str, list[str]] = {}
    second = images.pull(
        f"{registry.host}/shared:two", progress=lambda p: states.setdefault(p.digest, []).append(p.state)
    )
    assert first.layers[0] == second.layers[0]
    assert sorted(state[-1] for state in states.values()) == ["done", "exists"]
    assert len(left()) == 3
    images.remove(first.id)
    assert content(images, second, "a", "b") == [b"shared", b"two"]
    assert len(left()) == 2
    images.remove(f"{registry.host}/shared:two")
    assert left() == []
    assert images.list() == []


def test_the_same_layer_twice(images: Images, registry: Served) -> None:
    top = layer(a="twice")
    registry.pusher.push("twice", "latest", build(top, layer(a="between"), top))
    image = images.pull(f"{registry.host}/twice")
    assert len(image.layers) == 3
    assert content(images, image, "a") == [b"twice"]
    rootfs = images.prepare("c", image.id)
    assert len(rootfs.lowers) == 2
    images.discard("c")


def test_the_same_layer_twice_that_needs_those_below(images: Images, registry: Served) -> None:
    """Each time it takes what it doesn't list from what is below it there."""
    top = Layer().file("d/f", "twice").tar()
    between = Layer().directory("d", mode=0o2700, uid=7).file("d/g", "between").tar()
    registry.pusher.push("twice", "implied", build(top, between, top))
    image = images.pull(f"{registry.host}/twice:implied")
    assert content(images, image, "d/f", "d/g") == [b"twice", b"between"]
    rootfs = images.prepare("c", image.id)
    found = [Path(rootfs.base, name, "d").stat() for name in rootfs.lowers]
    assert [(stat.S_IMODE(status.st_mode), status.st_uid) for status in found] == [(0o2700, 7), (0o2700, 7), (0o755, 0)]
    images.discard("c")
    assert not [finding for finding in images.check() if finding.problem]


def test_again(images: Images, registry: Served) -> None:
    built = build(layer(a="again"))
    registry.pusher.push("again", "latest", built)
    name = f"{registry.host}/again"
    first = images.pull(name)
    states: list[str] = []
    assert images.pull(name, progress=lambda p: states.append(p.state)) == first
    assert states == ["exists"]


def test_a_tag_that_moves(images: Images, registry: Served) -> None:
    old, new = build(layer(a="old")), build(layer(a="new"))
    name = f"{registry.host}/moving"
    registry.pusher.push("moving", "latest", old)
    first = images.pull(name)
    registry.pusher.push("moving", "latest", new)
    second = images.pull(name)
    assert images.get(name) == second
    assert images.get(first.id).repo_tags == ()
    assert images.get(first.id).repo_digests == (f"{name}@{old.digest}",)
    assert len(images.list()) == 2


def test_the_same_image_in_two_repositories(images: Images, registry: Served) -> None:
    built = build(layer(a="two repositories"))
    for repository in ("twin/a", "twin/b"):
        registry.pusher.push(repository, "v1", built)
    images.pull(f"{registry.host}/twin/b:v1")
    image = images.pull(f"{registry.host}/twin/a:v1")
    assert image.repo_tags == (f"{registry.host}/twin/a:v1", f"{registry.host}/twin/b:v1")
    assert len(image.repo_digests) == 2
    images.remove(f"{registry.host}/twin/a:v1")
    assert images.list() == [], "one name removes the image"


def test_two_pulls_are_one_transfer(images: Images, registry: Served) -> None:
    built = build(*(layer(**{f"f{n}": "x" * 50_000}) for n in range(4)))
    registry.pusher.push("together", "latest", built)
    gate = threading.Barrier(4, timeout=scaled(30))
    results: list[Image] = []

    def pull() -> None:
        gate.wait()
        results.append(images.pull(f"{registry.host}/together"))

    threads = [threading.Thread(target=pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len({result.id for result in results}) == 1
    assert len(set(images.get(results[0].id).layers)) == 4


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_private_ca_and_password(
    open_store: OpenStore, tls_registry: Served, tmp_path: Path, left: Callable[[], list[str]]
) -> None:
    built = build(layer(a="secret"))
    tls_registry.pusher.push("private", "latest", built)
    images = open_store(hosts_dir=tmp_path)
    directory = tmp_path / tls_registry.host
    directory.mkdir()
    name = f"{tls_registry.host}/private"
    good = Auth(username="user", password="secret")
    with pytest.raises(BadContent, match="HTTP request to an HTTPS server"):
        images.pull(name, auth=good)
    hosts = directory / "hosts.toml"
    hosts.write_text(f'server = "https://{tls_registry.host}"\n')
    with pytest.raises(RegistryUnavailable, match="certificate verify failed"):
        images.pull(name, auth=good)
    hosts.write_text(f'server = "https://{tls_registry.host}"\nca = "{tls_registry.ca}"\n')
    with pytest.raises(RegistryDenied, match="answers 401: it wants credentials"):
        images.pull(name)
    with pytest.raises(RegistryDenied, match="the credentials are refused") as refused:
        images.pull(name, auth=Auth(username="user", password="hunter2"))
    assert "hunter2" not in str(refused.value)
    with pytest.raises(RegistryDenied):
        images.pull(name, auth=Auth(username="user", password="secret", server_address="elsewhere.example"))
    assert left() == []
    image = images.pull(name, auth=good)
    assert image.id == built.id
    images.remove(name)
    hosts.write_text(f'server = "https://{tls_registry.host}"\nskip_verify = true\n')
    assert images.pull(name, auth=Auth(auth="dXNlcjpzZWNyZXQ=")).id == built.id
    images.remove(name)
    hosts.write_text(
        f'server = "https://{tls_registry.host}"\nca = "{tls_registry.ca}"\n'
        'header = {Authorization = "Basic dXNlcjpzZWNyZXQ="}\n'
    )
    assert images.pull(name).id == built.id


def test_mirrors_in_order(open_store: OpenStore, registry: Served, tmp_path: Path) -> None:
    built = build(layer(a="mirrored"), layer(b="mirrored"))
    registry.pusher.push("mirrored/app", "v1", built)
    (tmp_path / "registry.invalid").mkdir()
    (tmp_path / "registry.invalid" / "hosts.toml").write_text(
        f"""
        server = "http://127.0.0.1:{free_port()}"
        [host."http://127.0.0.1:{free_port()}"]
        [host."http://{registry.host}"]
          capabilities = ["pull", "resolve"]
        """
    )
    images = open_store(hosts_dir=tmp_path, attempts=1)
    image = images.pull("registry.invalid/mirrored/app:v1")
    assert image.repo_tags == ("registry.invalid/mirrored/app:v1",)
    with pytest.raises(RegistryUnavailable, match="refused"):
        images.pull("registry.invalid/mirrored/app:v2")


def test_what_is_not_there(images: Images, registry: Served, left: Callable[[], list[str]]) -> None:
    built = build(layer(a="there"))
    registry.pusher.push("there", "latest", built)
    for name in ("there:missing", "not-there", f"there@{digest(b'x')}"):
        with pytest.raises(NotFound, match=f"not found at {registry.host}"):
            images.pull(f"{registry.host}/{name}")
    with pytest.raises(InvalidSpec):
        images.pull("no such/image")
    with pytest.raises(RegistryUnavailable, match="refused"):
        images.pull(f"127.0.0.1:{free_port()}/a")
    assert left() == []


def test_an_artifact(images: Images, registry: Served) -> None:
    built = build(layer(a="x"))
    wasm = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":' + (
        b'{"mediaType":"application/vnd.wasm.config.v0+json","digest":"%s","size":%d},"layers":[]}'
        % (built.id.encode(), len(built.blobs[built.id]))
    )
    built.blobs.pop(built.digest)
    built.manifest = wasm
    registry.pusher.push("artifact", "latest", built)
    with pytest.raises(Unsupported, match=r"vnd\.wasm\.config"):
        images.pull(f"{registry.host}/artifact")


def test_progress(images: Images, registry: Served) -> None:
    built = build(Layer().file("big", bytes(5_000_000)).tar(), how="plain")
    registry.pusher.push("progress", "latest", built)
    seen: list[Progress] = []
    images.pull(f"{registry.host}/progress", progress=seen.append)
    states = [progress.state for progress in seen]
    assert states[0] == "waiting"
    assert states[-1] == "done"
    assert [state for number, state in enumerate(states) if state not in states[:number]] == [
        "waiting",
        "downloading",
        "unpacking",
        "done",
    ]
    assert {progress.total_bytes for progress in seen} == {
        len(next(b for b in built.blobs.values() if len(b) > 10_000))
    }
    currents = [progress.current_bytes for progress in seen]
    assert currents == sorted(currents)


def test_cancelled_before_it_began(images: Images, registry: Served) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled, match="was cancelled"):
        images.pull(f"{registry.host}/whatever", cancelled=cancelled)


def test_two_stores_side_by_side(open_store: OpenStore, registry: Served, run_dir: Path) -> None:
    registry.pusher.push("side-by-side", "latest", build(layer(a="1")))
    name = f"{registry.host}/side-by-side"
    one, two = open_store(run_dir / "one"), open_store(run_dir / "two")
    image = one.pull(name)
    assert two.list() == []
    two.pull(name)
    two.remove(name)
    assert one.read_file(image.id, "a", 10) == b"1"


def test_pusher_reports(registry: Served) -> None:
    """The tests' own push checks each answer."""
    with pytest.raises(AssertionError):
        Pusher(f"http://{registry.host}").push("UPPER", "latest", build(layer(a="1")))


def test_layers_come_side_by_side_and_are_unpacked_as_they_arrive(open_store: OpenStore) -> None:
    built = build(*(layer(**{f"f{number}": "x" * number}) for number in range(3)))
    *small, last = [key for key in built.blobs if key not in (built.id, built.digest)]
    together = threading.Barrier(3, timeout=scaled(30))
    done = threading.Event()

    def answer(request: Request) -> None:
        together.wait()
        if last in request.path:  # the others are there by now, or never
            assert done.wait(scaled(30))
        server.honest(request)

    def told(progress: Progress) -> None:
        finished.update({progress.digest} if progress.state == "done" else ())
        if finished >= set(small):
            done.set()

    finished: set[str] = set()
    with serving(built) as server:
        server.lies |= dict.fromkeys((*small, last), answer)
        open_store(max_parallel=3).pull(f"{server.host}/app", progress=told)


LATELY_NS = time.time_ns() - 3600 * 1_000_000_000


def attributes(root: Path) -> dict[str, object]:
    """All there is to know of everything below; times of what nobody lists are those of its making."""
    found: dict[str, object] = {}
    first: dict[int, str] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status, name = path.lstat(), str(path.relative_to(root))
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        data: object = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        time_ns = min(status.st_mtime_ns, LATELY_NS)
        kind = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, time_ns)
        found[name] = (kind, xattrs, data, first.setdefault(status.st_ino, name))
    return found


def test_parallel_and_serial_unpacking_give_the_same(open_store: OpenStore, run_dir: Path) -> None:
    """With the lowest layer the last to arrive, every attribute of what depends on it."""
    low = Layer().directory(
        "d", mode=0o2750, uid=3, gid=(1 << 32) - 2, mtime=5.25, pax_headers={"SCHILY.xattr.user.k": "v"}
    )
    low.file("d/f", "f", mode=0o4755, uid=7, mtime=6).directory("e", mode=0o700).file("e/x").symlink("to", "d").file(
        "g"
    )
    middle = Layer().file("d/new/deep/f", "1").hardlink("d/again", "d/f").file("e/.wh.x").file("to/through", "2")
    top = (
        Layer()
        .directory("e", mode=0o711)
        .file("e/.wh..wh..opq")
        .file("e/y")
        .file("d/new/h", "3")
        .hardlink("l", "d/again")
    )
    top.file(".wh.g").add("null", b"3", devmajor=1, devminor=3).add("p", b"6").file("s", "x", mode=0o2755, gid=5)
    built = build(low.tar(), middle.tar(), top.tar())
    first, *others = [key for key in built.blobs if key not in (built.id, built.digest)]
    asked = threading.Event()

    def late(request: Request) -> None:
        assert asked.wait(scaled(30))
        server.honest(request)

    def noted(request: Request) -> None:
        server.honest(request)
        if all(map(server.asked_for, others)):
            asked.set()

    trees = []
    with serving(built) as server:
        for name, parallel in (("parallel", 3), ("serial", 1)):
            server.lies = {first: late, **dict.fromkeys(others, noted)} if parallel > 1 else {}
            image = open_store(run_dir / name, max_parallel=parallel).pull(f"{server.host}/app")
            trees.append([attributes(run_dir / name / "layers" / layer) for layer in image.layers])
    assert trees[0] == trees[1]
    assert [len(tree) for tree in trees[0]] == [7, 9, 11]


def test_what_an_image_says_of_itself_changes_nothing(images: Images) -> None:
    """Labels and annotations are data."""
    said = {
        "io.cri-containerd.pinned": "pinned",
        "io.cri-containerd.image": "managed",
        "org.opencontainers.image.ref.name": "docker.io/library/busybox:latest",
        "containerd.io/gc.root": "1",
    }
    built = build(layer(a="1"), Labels=said)
    manifest = json.loads(built.manifest)
    manifest["annotations"] = said
    for part in manifest["layers"]:
        part["annotations"] = said
    data = json.dumps(manifest).encode()
    with serving(replace(built, manifest=data)) as server:
        image = images.pull(f"{server.host}/app:1")
        assert not image.pinned
        assert image.repo_tags == (f"{server.host}/app:1",)
        images.remove(image.id)
    assert images.list() == []

"""Hostile layers and documents, served by a real HTTP server and pulled by a process whose memory is watched.

Each ends in bounded time and memory with an error that says why, or harmlessly; nothing outside the store is touched
and, where the pull fails, nothing stays in it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zstandard

from tests.limits import scaled
from tests.requires import requires
from tests.runtime.images.conftest import tree_of
from tests.runtime.images.given import Answer, Built, Layer, Liar, Request, build, digest, serving

pytestmark = requires("root")

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
# What the pulling process and its children may take together; some 60 MiB of it is Python.
MEMORY_LIMIT_BYTES = 200 * MIB
PULL = """
import json, sys
from pathlib import Path
from runtime.errors import CribError
from runtime.images import Images, ImagesConfig
images = Images(Path(sys.argv[1]), ImagesConfig(attempts=3, backoff_s=0.01, **json.loads(sys.argv[3])))
images.open()
try:
    print(json.dumps(["", images.pull(sys.argv[2]).id]))
except CribError as error:
    print(json.dumps([type(error).__name__, str(error)]))
images.close()
"""


@dataclass
class Victim:
    """Something outside of the store that must not change."""

    directory: Path
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.file = self.directory / "file"
        self.file.write_text("mine")
        self.file.chmod(0o600)
        self.before = self.look()

    def look(self) -> object:
        return [
            (path.name, path.lstat().st_mode, path.lstat().st_uid, path.lstat().st_ctime_ns, path.lstat().st_nlink)
            for path in (self.directory, *sorted(self.directory.iterdir()))
        ]


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    victim = Victim(tmp_path / "victim")
    yield victim
    assert victim.look() == victim.before
    assert victim.file.read_text() == "mine"


@dataclass
class Outcome:
    error: str
    message: str
    peak_bytes: int
    cpu_s: float


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from descendants(int(child))


def resident_bytes(pid: int) -> int:
    total = 0
    try:
        for one in descendants(pid):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has just ended
    return total


def attempt(liar: Liar, store: Path, **settings: object) -> Outcome:
    """Pull what the liar serves, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", PULL, str(store), f"{liar.host}/app", json.dumps(settings)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, resident_bytes(process.pid))
            time.sleep(0.01)  # noqa: TID251 - samples
        assert process.stdout
        error, message = json.loads(process.stdout.read())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Outcome(error, message, peak_bytes, cpu_s)


def refused(liar: Liar, store: Path, error: str, match: str, **settings: object) -> Outcome:
    outcome = attempt(liar, store, **settings)
    assert outcome.error == error, outcome
    assert re.search(match, outcome.message), outcome
    assert outcome.peak_bytes < MEMORY_LIMIT_BYTES, f"{outcome.peak_bytes / MIB:.0f} MiB"
    assert outcome.cpu_s < scaled(20)
    assert tree_of(store) == []
    assert list((store / "recipes").iterdir()) == []
    return outcome


def repeated(blocks: bytes, times: int) -> bytes:
    """A layer that is a small blob: `blocks` of a tar, again and again."""
    thousand = zstandard.compress(blocks * 1000)
    return thousand * (times // 1000)


def header(name: str) -> bytes:
    return Layer().file(name).tar()[:512]


def of_blob(blob: bytes) -> Built:
    """An image whose layer is this blob; nobody gets as far as its diff id."""
    built = build(b"")
    manifest = json.loads(built.manifest)
    manifest["layers"][0] |= {"digest": digest(blob), "size": len(blob)}
    data = json.dumps(manifest).encode()
    return Built(
        data, built.media_type, built.id, built.diff_ids, built.blobs | {digest(blob): blob, digest(data): data}
    )


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (Layer().file("../escape", "x"), "leads out of the layer"),
        (Layer().file("/../../escape", "x"), "leads out of the layer"),
        (Layer().file("a/../../escape", "x"), "leads out of the layer"),
        (Layer().directory(".."), "leads out of the layer"),
        (Layer().symlink("../escape", "x"), "leads out of the layer"),
        (Layer().file("a", "x").hardlink("b", "../../../etc/passwd"), "leads out of the layer"),
        (Layer().hardlink("stolen", "/etc/passwd"), "which neither the layer nor those below hold"),
        (Layer().symlink("etc", "/etc").hardlink("stolen", "etc/passwd"), "too many levels"),
        (Layer().file("a/.wh..."), "whiteout of b'..'"),
        (Layer().symlink("l", "l").file("l/f"), "too many levels"),
        (Layer().file("p/" * 2100 + "f"), "file name too long"),
        (Layer().file("u", uid=(1 << 32) - 1), "has owner 4294967295:0"),
    ],
)
def test_refused_tars(layer: Layer, match: str, run_dir: Path, victim: Victim) -> None:
    with serving(build(layer.tar())) as liar:
        refused(liar, run_dir / "store", "BadImage", match)


def absolute(victim: Path) -> Layer:
    return Layer().file(f"{victim}/file", "theirs", mode=0o4777, uid=5)


def through_a_symlink(victim: Path) -> Layer:
    up = "../" * 30
    layer = Layer().symlink("a", str(victim)).file("a/file", "theirs").file("a/new", "theirs")
    return layer.symlink("b", f"{up}{victim}").file("b/file", "theirs").symlink("c", f"{victim}/file").file("c", "x")


def attributes_through_links(victim: Path) -> Layer:
    """CVE-2021-32760: mode and owner of what a link leads to."""
    up = "../" * 30
    layer = Layer().symlink("l", f"{victim}/file").file("l", "x", mode=0o4777, uid=5)
    layer.symlink("m", f"{up}{victim}/file").hardlink("n", "m").file("n", "x", mode=0o4777, uid=5)
    return layer.symlink("d", str(victim)).directory("d", mode=0o777, uid=5)


def twice(victim: Path) -> Layer:
    """A directory, then a link in its place, then what goes into the directory."""
    layer = Layer().directory("d").file("d/file", "1").symlink("d", str(victim)).file("d/file", "theirs")
    return layer.file("d/file", "again").directory("d").file("d/file", "last")


def strange_names(victim: Path) -> Layer:
    return Layer().file("new\nline", "x").file("esc\x1b[2J", "x").file("-rf", "x").file("d/\udcff", "x")


def devices(victim: Path) -> Layer:
    """They are made, in a directory that is root's alone; a container's device rules are what keeps it from them."""
    disk = os.stat("/")
    layer = Layer().add("disk", b"4", devmajor=os.major(disk.st_dev), devminor=os.minor(disk.st_dev), mode=0o666)
    return layer.add("mem", b"3", devmajor=1, devminor=1, mode=0o666).add("p", b"6").file("f", "x")


@pytest.mark.parametrize("make", [absolute, through_a_symlink, attributes_through_links, twice, strange_names, devices])
def test_contained_tars(make: Callable[[Path], Layer], run_dir: Path, victim: Victim) -> None:
    built = build(make(victim.directory).tar())
    with serving(built) as liar:
        outcome = attempt(liar, run_dir / "store")
    assert (outcome.error, outcome.message) == ("", built.id)
    assert outcome.peak_bytes < MEMORY_LIMIT_BYTES
    assert (run_dir / "store").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("how", ["gzip", "zstd"])
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"unpacked_limit_bytes": 20 * MIB}, "unpacks to more than 20971520 bytes"),
        ({"ratio_from_bytes": 20 * MIB, "ratio_limit": 100}, "unpacks to more than 100 times its size"),
        ({"layer_limit_bytes": 100}, "bytes, the limit is 100"),
    ],
)
def test_bombs(settings: dict[str, object], match: str, how: str, run_dir: Path) -> None:
    with serving(build(Layer().file("zeros", bytes(100 * MIB)).tar(), how=how)) as liar:
        refused(liar, run_dir / "store", "Exhausted", match, **settings)


def test_ten_million_entries(run_dir: Path) -> None:
    with serving(of_blob(repeated(header("f"), 10_000_000))) as liar:
        settings = {"entries_limit": 20_000, "ratio_limit": 1 << 30}
        refused(liar, run_dir / "store", "Exhausted", "more than 20000 entries", **settings)


def test_extended_headers_without_end(run_dir: Path) -> None:
    """Before an entry that never comes."""
    headers = Layer().file("f", pax_headers={"SCHILY.xattr.user.x": "x" * 60_000}).tar()
    with serving(of_blob(repeated(headers[: headers.index(header("f")[:1] + bytes(99))], 20_000))) as liar:
        refused(liar, run_dir / "store", "BadImage", "extended headers of more than", ratio_limit=1 << 30)


def opaque_again_and_again() -> bytes:
    """GHSA-rp3h-jf77-q9p4: each mark cost a walk of the directory."""
    layer = Layer()
    for number in range(4000):
        layer.file(f"d/{number}")
    return layer.tar()[:-10240] + header("d/.wh..wh..opq") * 40_000 + bytes(1024)


def whited_out_again_and_again() -> bytes:
    return b"".join(header(f"d/{kind}{number % 50}") for number in range(10_000) for kind in ("", ".wh.")) + bytes(1024)


def deep_names_and_a_symlink_in_turns() -> bytes:
    layer = Layer()
    for number in range(200):
        layer.symlink("s", f"t{number}").file(f"{'d/' * 1000}f{number}")
    return layer.tar()


def a_tree_that_is_replaced_again_and_again() -> bytes:
    link = Layer().symlink("d", "x").tar()[:512]
    return b"".join(b"".join(header(f"d/{number}") for number in range(100)) + link for _ in range(200)) + bytes(1024)


@pytest.mark.parametrize(
    "make",
    [
        opaque_again_and_again,
        whited_out_again_and_again,
        deep_names_and_a_symlink_in_turns,
        a_tree_that_is_replaced_again_and_again,
    ],
)
def test_layers_built_to_take_time(make: Callable[[], bytes], run_dir: Path) -> None:
    """Work in proportion to the entries; what would take more counts as more of them."""
    with serving(build(make(), how="zstd")) as liar:
        outcome = attempt(liar, run_dir / "store", entries_limit=50_000)
    assert outcome.error in ("", "Exhausted"), outcome
    assert outcome.cpu_s < scaled(20)
    assert outcome.peak_bytes < MEMORY_LIMIT_BYTES, f"{outcome.peak_bytes / MIB:.0f} MiB"


def test_layers_that_take_time_together(run_dir: Path) -> None:
    """Entries that go where symlinks of the layer below lead, each of which is another."""
    below, above = Layer().directory("d"), Layer()
    for number in range(4000):
        below.symlink(f"l{number}", "d")
        above.file(f"l{number}/f{number}")
    with serving(build(below.tar(), above.tar(), how="zstd")) as liar:
        outcome = attempt(liar, run_dir / "store")
    assert outcome.error == "", outcome
    assert outcome.cpu_s < scaled(20)


def test_many_layers_that_imply_the_same_directories(run_dir: Path) -> None:
    layers = []
    for layer in range(20):
        made = Layer()
        for number in range(300):
            made.file(f"{number}/d/{layer}")
        layers.append(made.tar())
    with serving(build(*layers, how="zstd")) as liar:
        refused(
            liar, run_dir / "store", "Exhausted", "too many names lead through too many layers", entries_limit=30_000
        )


def endless(chunk: bytes) -> Answer:
    """A chunked body that never ends."""

    def answer(request: Request) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        while True:
            request.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    return answer


@pytest.mark.parametrize(
    ("where", "error"),
    [("manifest", "Exhausted"), ("config", "BadContent"), ("layer", "BadContent"), ("token", "BadContent")],
)
def test_a_body_without_end(where: str, error: str, run_dir: Path) -> None:
    built = build(Layer().file("f", os.urandom(100_000)).tar())
    with serving(built) as liar:
        layer = max(built.blobs, key=lambda key: len(built.blobs[key]))
        path = {"manifest": "/manifests/", "config": built.id, "layer": layer, "token": "/token"}[where]
        liar.lies[path] = endless(b"x" * 65536)
        if where == "token":
            challenge = f'Bearer realm="http://{liar.host}/token",service="liar"'
            liar.lies["/v2/"] = lambda request: request.reply(401, WWW_Authenticate=challenge)
        refused(liar, run_dir / "store", error, "larger|more than|is not|something else")


def test_a_manifest_of_100_mib(run_dir: Path) -> None:
    sent = []

    def large(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(100 * MIB))
        request.end_headers()
        for _ in range(100):
            request.wfile.write(b" " * MIB)
            sent.append(1)

    with serving(build(Layer().file("f").tar())) as liar:
        liar.lies["/manifests/"] = large
        refused(liar, run_dir / "store", "Exhausted", "manifest latest of more than 4194304 bytes")
    assert len(sent) < 50, "the rest isn't asked for"

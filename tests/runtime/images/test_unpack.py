"""Layers unpacked by the child process, hostile ones too; the overlay that the kernel makes of them."""

from __future__ import annotations

import os
import resource
import select
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import zstandard

from runtime.errors import Cancelled, Exhausted, Unavailable, WrongState
from runtime.images import Images, ImagesConfig
from runtime.images.errors import BadImage
from runtime.images.layers import Unpack, Unpacked, Unpacker, short_name
from runtime.images.manifest import LAYERS_LIMIT
from runtime.images.records import lock
from runtime.removal import remove_tree
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.images.given import Layer, build, compressed, digest, oci_archive

pytestmark = requires("root")

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def begun(unpacker: Unpacker, target: Path) -> Iterator[Unpack]:
    with tempfile.TemporaryFile() as recipe, closing(unpacker.fork()) as child:
        child.begin(target, recipe.fileno())
        yield child


def ended(pidfd: int) -> None:
    assert select.select([pidfd], [], [], scaled(20))[0]
    os.close(pidfd)


def unpack(target: Path, data: bytes, config: ImagesConfig | None = None) -> Unpacked:
    target.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryFile() as lock,
        closing(Unpacker(config or ImagesConfig(), lock.fileno())) as unpacker,
        begun(unpacker, target) as child,
    ):
        child.write(data)
        return child.finish()


@pytest.fixture
def target(run_dir: Path) -> Iterator[Path]:
    yield run_dir / "layer"
    remove_tree(run_dir / "layer")


def tree(root: Path) -> dict[str, str]:
    """Each path with all that can be seen of it; devices and links included, times but for directories'."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        text = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid} {status.st_mtime_ns}"
        if path.is_symlink():
            text += f" -> {os.readlink(path)}"
        elif path.is_file():
            text += f" {digest(path.read_bytes())} links={status.st_nlink}"
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            text += f" {os.major(status.st_rdev)},{os.minor(status.st_rdev)}"
        for key in os.listxattr(path, follow_symlinks=False):
            text += f" {key}={os.getxattr(path, key, follow_symlinks=False)!r}"
        found[str(path.relative_to(root))] = text
    return found


def keeps_user_attributes(directory: Path) -> bool:
    try:
        os.setxattr(directory, "user.probe", b"")
        os.removexattr(directory, "user.probe")
    except OSError:  # tmpfs before 6.6
        return False
    return True


def test_every_kind_of_entry(target: Path) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000").decode("latin-1")
    layer = Layer().directory("./", mode=0o751, uid=1, gid=2, mtime=5).directory("dir", mode=0o2775, gid=50, mtime=6)
    layer.file("dir/plain", "text", mode=0o640, uid=(1 << 32) - 2, gid=7, mtime=1.123456789)
    layer.file("dir/owned-by-root", mode=0o600).file("setuid", "x", mode=0o4755, uid=3)
    layer.hardlink("hard", "dir/plain").symlink("soft", "/dir/plain", uid=8, mtime=9)
    layer.add("null", b"3", devmajor=1, devminor=3, mode=0o666).add("disk", b"4", devmajor=8, devminor=1)
    layer.add("pipe", b"6", mode=0o622).file("capable", pax_headers={"SCHILY.xattr.security.capability": capability})
    layer.file("marked", pax_headers={"SCHILY.xattr.user.mark": "x", "SCHILY.xattr.trusted.overlay.opaque": "y"})
    layer.file("name\nwith\\strange \x01 bytes", "s")
    plain = layer.tar()
    unpacked = unpack(target, compressed(plain, "gzip"))
    assert unpacked.diff_id == digest(plain)
    assert (unpacked.implied, unpacked.lower_links) == ((), ())
    assert unpacked.inodes == 12
    seen = tree(target)
    second = 1_000_000_000
    usual = f"{second}000000000"
    text = digest(b"text")
    empty = digest(b"")
    mark = " user.mark=b'x'" if keeps_user_attributes(target) else ""
    assert seen == {
        ".": f"drwxr-x--x 1:2 {5 * second} trusted.crib.root=b'y'",
        "dir": f"drwxrwsr-x 0:50 {6 * second}",
        "dir/plain": f"-rw-r----- 4294967294:7 1123456789 {text} links=2",
        "dir/owned-by-root": f"-rw------- 0:0 {usual} {empty} links=1",
        "setuid": f"-rwsr-xr-x 3:0 {usual} {digest(b'x')} links=1",
        "hard": f"-rw-r----- 4294967294:7 1123456789 {text} links=2",
        "soft": f"lrwxrwxrwx 8:0 {9 * second} -> /dir/plain",
        "null": f"crw-rw-rw- 0:0 {usual} 1,3",
        "disk": f"brw-r--r-- 0:0 {usual} 8,1",
        "pipe": f"prw--w--w- 0:0 {usual}",
        "capable": f"-rw-r--r-- 0:0 {usual} {empty} links=1 security.capability={capability.encode('latin-1')!r}",
        "marked": f"-rw-r--r-- 0:0 {usual} {empty} links=1{mark}",
        "name\nwith\\strange \x01 bytes": f"-rw-r--r-- 0:0 {usual} {digest(b's')} links=1",
    }


def test_whiteouts_hide_what_is_below_and_never_their_own_layer(target: Path) -> None:
    layer = Layer()
    layer.file(".wh.gone").directory("o").file("o/.wh..wh..opq").file("o/kept", "1")
    layer.file("before", "1").file(".wh.before").file(".wh.after").file("after", "1")
    layer.directory("d-before").file("d-before/x").file(".wh.d-before").file(".wh.d-after").file("d-after/y")
    layer.file(".wh..wh.plnk").file(".wh..wh.aufs")
    unpack(target, layer.tar())
    seen = {name: text.split()[0] + text[-4:] for name, text in tree(target).items()}
    gone = (target / "gone").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert (target / "before").read_text() == (target / "after").read_text() == "1"
    for name in ("o", "d-before", "d-after"):
        assert os.getxattr(target / name, "trusted.overlay.opaque") == b"y"
    assert set(seen) == {
        ".", "gone", "o", "o/kept", "before", "after", "d-before", "d-before/x", "d-after", "d-after/y",
    }  # fmt: skip


def test_what_comes_twice(target: Path) -> None:
    layer = Layer().file("a", "1").file("a", "2").directory("a").file("a/b", "3").directory("a", mode=0o700)
    layer.directory("t").file("t/u/v/w", "x").symlink("t", "elsewhere")
    layer.file("f").hardlink("f", "f").hardlink("f", "a/b").file("g").file("g/h")
    unpacked = unpack(target, layer.tar())
    seen = tree(target)
    assert set(seen) == {".", "a", "a/b", "t", "f", "g", "g/h"}
    assert seen["a"].startswith("drwx------")
    assert seen["t"].endswith("-> elsewhere")
    assert (target / "f").read_text() == "3"
    assert unpacked.inodes == 6
    assert unpacked.implied == ("g",)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (Layer().file("../escape", "x"), "leads out of the layer"),
        (Layer().file("a/../../escape", "x"), "leads out of the layer"),
        (Layer().directory(".."), "leads out of the layer"),
        (Layer().file("a", "x").hardlink("b", "../../../etc/passwd"), "leads out of the layer"),
        (Layer().file("a/.wh..."), "whiteout of b'..'"),
        (Layer().file(".wh."), "whiteout of b''"),
        (Layer().file("./"), "the root is not a directory|system"),
        (Layer().directory("d").hardlink("l", "d"), "is a directory"),
        (Layer().file("d/.wh.f").hardlink("l", "d/f"), "b'l' to b'd/f', which the layer removes"),
        (Layer().file(".wh.d").hardlink("l", "d/e/f"), "which the layer removes"),
        (Layer().file(".wh.d").file("d/new").hardlink("l", "d/f"), "which the layer removes"),
        (Layer().file("d/.wh..wh..opq").hardlink("d/l", "d/e/f"), "which the layer removes"),
        (Layer().file(".wh..wh..opq").hardlink("l", "f"), "which the layer removes"),
        (Layer().symlink("l", "l").file("l/f"), "too many levels"),
        (Layer().file("n" * 300), "file name too long"),
        (Layer().file("p/" * 2100 + "f"), "file name too long"),
        (Layer().file("p/" * 1791 + "fff"), "file name too long"),
        (Layer().symlink("s", "t" * 5000), "file name too long"),
        (Layer().file("u", uid=(1 << 32) - 1), "has owner 4294967295:0"),
    ],
)
def test_hostile_layers(target: Path, layer: Layer, match: str) -> None:
    before = sorted(target.parent.iterdir())
    with pytest.raises(BadImage, match=match):
        unpack(target, layer.tar())
    assert sorted(target.parent.iterdir()) == sorted({*before, target})


def test_what_looks_like_an_escape_stays_inside(target: Path) -> None:
    """Absolute names and symlinks mean the layer's own root, as in the established runtimes."""
    outside = target.parent / "outside"
    outside.mkdir()
    up = "../" * 20
    layer = Layer().file("/absolute", "1").symlink("a", str(outside)).file("a/through", "2")
    layer.symlink("b", f"{up}{outside}").file("b/up", "3").symlink("c", f"{outside}/file").file("c", "4")
    layer.symlink("d", "/e").file("d/f", "5").directory("e", mode=0o711)
    unpacked = unpack(target, layer.tar())
    assert list(outside.iterdir()) == []
    inside = target / str(outside).lstrip("/")
    assert (target / "absolute").read_text() == "1"
    assert (inside / "through").read_text() == "2"
    assert (inside / "up").read_text() == "3"
    assert (target / "c").read_text() == "4"
    assert not (target / "c").is_symlink()
    assert (target / "e/f").read_text() == "5"
    assert unpacked.lower_links == ()
    outside.rmdir()


def test_nothing_to_take_from_the_host(target: Path) -> None:
    """A hard link to an absolute name is one inside; what isn't there is left to lower layers."""
    unpacked = unpack(target, Layer().hardlink("stolen", "/etc/passwd").tar())
    assert unpacked.lower_links == (("stolen", "etc/passwd"),)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (ImagesConfig(unpacked_limit_bytes=1 << 20), "unpacks to more than 1048576 bytes"),
        (ImagesConfig(ratio_from_bytes=1 << 20, ratio_limit=100), "unpacks to more than 100 times its size"),
        (ImagesConfig(entries_limit=10), "has more than 10 entries"),
    ],
)
@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_bombs(target: Path, settings: ImagesConfig, match: str, how: str) -> None:
    layer = Layer().file("zeros", bytes(50 << 20))
    for number in range(20 if settings.entries_limit == 10 else 0):
        layer.file(f"f{number}")
    with pytest.raises(Exhausted, match=match):
        unpack(target, compressed(layer.tar(), how), settings)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_an_attribute_that_no_file_system_takes(target: Path, kind: bytes) -> None:
    layer = Layer().add("f", kind, pax_headers={"SCHILY.xattr.trusted.k": "x" * 70_000})
    with pytest.raises(BadImage, match=r"'f/? \(attribute trusted.k of 70000 bytes\)': argument list too long"):
        unpack(target, layer.tar())


def test_deep_names_cost_entries(target: Path) -> None:
    layer = Layer().file("a/" * 100 + "f")
    with pytest.raises(Exhausted, match="more than 50 entries"):
        unpack(target, layer.tar(), ImagesConfig(entries_limit=50))


def test_layers_built_to_take_time(target: Path) -> None:
    """Deep names and a symlink in turns, which would be looked up from the root again each time."""
    layer = Layer()
    deep = "d/" * 1000
    for number in range(200):
        layer.symlink("s", f"t{number}").file(f"{deep}f{number}")
    began_s = time.monotonic()
    with pytest.raises(Exhausted, match="more than 20000 entries"):
        unpack(target, layer.tar(), ImagesConfig(entries_limit=20_000))
    assert time.monotonic() - began_s < 30


def test_links_to_deep_names_cost_entries(target: Path) -> None:
    """Whether a directory on the way was removed is looked up for each."""
    layer = Layer().file(".wh.other")
    for number in range(1000):
        layer.hardlink(f"l{number}", "d/" * 1000 + "f")
    with pytest.raises(Exhausted, match="more than 20000 entries"):
        unpack(target, layer.tar(), ImagesConfig(entries_limit=20_000))


def test_the_same_file_again_and_again(target: Path) -> None:
    layer = Layer()
    for number in range(2000):
        layer.file("a/b/c/f", str(number))
    assert unpack(target, layer.tar()).inodes == 5
    assert (target / "a/b/c/f").read_text() == "1999"


def test_ten_million_entries(target: Path) -> None:
    """Of which no more are made than the configuration allows."""
    header = Layer().file("f").tar()[:512]
    plain = header * 1000
    one = zstandard.compress(plain * 100)
    with pytest.raises(Exhausted, match="more than 10000 entries"):
        unpack(target, one * 100, ImagesConfig(entries_limit=10_000, ratio_limit=1 << 30))


def test_names_of_any_bytes(target: Path) -> None:
    names = ["new\nline", "tab\there", "esc\x1b[2J", " ", "-rf", "\u202egnp"]
    layer = Layer()
    for name in names:
        layer.file(f"d/{name}", name)
    layer.add("d/\udcff\udcfe", data=b"bytes")
    unpacked = unpack(target, layer.tar())
    assert {os.fsdecode(name) for name in os.listdir(os.fsencode(target / "d"))} == {*names, "\udcff\udcfe"}
    assert unpacked.implied == ("d",)


def test_chmod_and_chown_stay_inside(target: Path) -> None:
    """CVE-2021-32760: a mode that was set through a hard link or symlink that leads out."""
    victim = target.parent / "victim"
    victim.write_text("mine")
    victim.chmod(0o600)
    up = "../" * 20
    layer = Layer().symlink("l", str(victim)).file("l", "x", mode=0o4777, uid=5)
    layer.symlink("m", f"{up}{victim}").hardlink("n", "m").file("n", "x", mode=0o4777, uid=5)
    layer.symlink("d", str(target.parent)).directory("d", mode=0o777, uid=5)
    before = target.parent.stat()
    unpack(target, layer.tar())
    assert (victim.read_text(), victim.stat().st_mode & 0o7777, victim.stat().st_uid) == ("mine", 0o600, 0)
    after = target.parent.stat()
    assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)
    assert (target / "d").is_dir() and not (target / "d").is_symlink()
    victim.unlink()


@pytest.mark.parametrize("data", [b"\x1f\x8b" + bytes(100), b"x" * 2000, b"PK\x03\x04" + bytes(600)])
def test_no_archive(target: Path, data: bytes) -> None:
    with pytest.raises(BadImage, match="unpack: "):
        unpack(target, data)


def test_a_program_that_cannot_be_started(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says why, and the next layer tries again."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(Unavailable, match="No such file or directory: '/nowhere/python'"):
        unpack(target, b"")
    monkeypatch.undo()
    with pytest.raises(BadImage):
        unpack(target, b"x" * 1000)


def test_the_child_is_confined(target: Path, run_dir: Path) -> None:
    """What the process may do while it waits for bytes, as the kernel tells it."""
    target.mkdir()
    held = lock(run_dir / "lock")
    with (
        closing(Unpacker(ImagesConfig(), held)) as unpacker,
        begun(unpacker, target) as child,
    ):
        os.close(held)
        status: dict[str, str] = {}
        while status.get("Seccomp") != "2":
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
            assert "Z" not in status["State"]
        for there in ("root", "cwd", "root/..", "cwd/.."):
            assert os.path.samefile(f"/proc/{child.pid}/{there}", target)
        assert int(status["CapPrm"], 16).bit_count() == 8
        assert int(status["CapBnd"], 16).bit_count() == 8
        assert status["Seccomp"] == "2"
        for path in Path(f"/proc/{child.pid}/fd").iterdir():
            name = os.readlink(path).partition(":")[0]
            recipe_or_lock = name == str(run_dir / "lock") or name.endswith("(deleted)")
            assert name in ("/dev/null", "pipe", "socket") or recipe_or_lock or os.path.samefile(path, target)
        with pytest.raises(WrongState, match="in use by another process"):
            lock(run_dir / "lock")
        child.kill()
        with pytest.raises(Cancelled):
            child.finish()
    os.close(lock(run_dir / "lock"))


def test_a_program_that_has_ended_is_started_again(run_dir: Path) -> None:
    """It is one for all layers while they come, ends by itself when none does, and may be killed."""
    programs, pidfds = [], []

    def one(unpacker: Unpacker, name: str) -> None:
        (run_dir / name).mkdir()
        with begun(unpacker, run_dir / name) as child:
            programs.append(int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1]))
            pidfds.append(os.pidfd_open(programs[-1]))
            child.write(Layer().file("file", name).tar())
            child.finish()
        assert (run_dir / name / "file").read_text() == name

    with tempfile.TemporaryFile() as lock, closing(Unpacker(ImagesConfig(), lock.fileno())) as unpacker:
        one(unpacker, "first")
        one(unpacker, "second")
        assert programs[0] == programs[1]
        os.kill(programs[1], signal.SIGKILL)
        ended(pidfds[1])
        one(unpacker, "third")
        assert programs[2] != programs[1]
    with tempfile.TemporaryFile() as lock, closing(Unpacker(ImagesConfig(), lock.fileno(), idle_s=0.05)) as unpacker:
        one(unpacker, "fourth")
        ended(pidfds[3])
        one(unpacker, "fifth")
    for number in (0, 2, 4):
        os.close(pidfds[number])


@contextmanager
def descriptors_left(pid: int, count: int) -> Iterator[None]:
    """The process can have so many more than it has."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    listed = list(Path(f"/proc/{pid}/fd").iterdir())
    there = {int(path.name) for path in listed if path.is_symlink()}  # but for what has listed them
    free = (number for number in range(1 << 16) if number not in there)
    limit = next(number for number, _ in zip(free, range(count + 1), strict=False) if _ == count)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def sockets(pid: int) -> int:
    """How many a process holds."""
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += os.readlink(path).startswith("socket:")
    return found


def test_small_layers_share_a_process(run_dir: Path) -> None:
    """Each has only its own directory; after a large one, or a bad one, the process ends."""
    (run_dir / "secret").write_text("")
    for name in "abcdef":
        (run_dir / name).mkdir()
    small = Layer().symlink("out", "/").file("out/secret", "mine").symlink("up", "../..").file("up/secret2", "mine")
    large = Layer().file("zeros", bytes(9 << 20))
    with (
        tempfile.TemporaryFile() as lock,
        tempfile.TemporaryFile() as recipe,
        closing(Unpacker(ImagesConfig(), lock.fileno())) as unpacker,
    ):
        for last, names in ((large.tar(), "abc"), (b"x" * 1000, "def")):
            with closing(unpacker.fork()) as child:
                for name, data in zip(names, (small.tar(), small.tar(), last), strict=True):
                    assert child.ready
                    child.begin(run_dir / name, recipe.fileno())
                    child.write(data)
                    with suppress(BadImage):
                        child.finish()
                    if child.ready:
                        assert {path.name for path in (run_dir / name).iterdir()} == {"out", "secret", "up", "secret2"}
                ended(os.pidfd_open(child.pid))
    assert {path.name for path in run_dir.iterdir()} == {*"abcdef", "secret"}
    assert (run_dir / "secret").read_text() == ""


def test_a_process_that_was_killed_between_layers(run_dir: Path) -> None:
    with (
        tempfile.TemporaryFile() as lock,
        closing(Unpacker(ImagesConfig(), lock.fileno())) as unpacker,
        closing(unpacker.fork()) as child,
    ):
        os.kill(child.pid, signal.SIGKILL)
        child.begin(run_dir, lock.fileno())
        child.write(Layer().file("f").tar())
        with pytest.raises(Unavailable, match="the process was killed"):
            child.finish()


@pytest.mark.parametrize("whose", ["cribd", "the program"])
def test_who_has_no_descriptor_left_gets_no_process_and_others_go_on(run_dir: Path, whose: str) -> None:
    for name in ("one", "two"):
        (run_dir / name).mkdir()
    data = Layer().file("file", "text").tar()
    with (
        tempfile.TemporaryFile() as lock,
        closing(Unpacker(ImagesConfig(), lock.fileno())) as unpacker,
        begun(unpacker, run_dir / "one") as child,
    ):
        program = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1])
        child.write(data[:600])
        deadline_s = time.monotonic() + scaled(20)
        while sockets(program) > 1:  # it closes the fork's once it has answered
            assert time.monotonic() < deadline_s
        # Here the recipe and a pair of sockets, there one of them.
        limited, message = (
            ((os.getpid(), 3), "no descriptor is left")
            if whose == "cribd"
            else ((program, 1), "fork: too many open files")
        )
        with descriptors_left(*limited), pytest.raises(Exhausted, match=message), begun(unpacker, run_dir / "two"):
            pass
        # The process's descriptor as well, and for the layer its mount and two pipes.
        for count in (0, 1, 2, *range(4, 8)):
            with (
                descriptors_left(os.getpid(), count),
                pytest.raises(OSError, match=r"[Tt]oo many open files"),
                begun(unpacker, run_dir / "two"),
            ):
                pass
        child.write(data[600:])
        child.finish()
        with begun(unpacker, run_dir / "two") as another:
            assert Path(f"/proc/{another.pid}/stat").read_text().rpartition(")")[2].split()[1] == str(program)
            another.write(data)
            another.finish()
    assert (run_dir / "one/file").read_text() == (run_dir / "two/file").read_text() == "text"


ESCAPES = """
import ctypes, mmap, os, socket, sys, threading
from runtime.images.unpack.calls import only_unpacking
from runtime.linux.process import PR_SET_NO_NEW_PRIVS, prctl

libc = ctypes.CDLL(None, use_errno=True)
prctl(PR_SET_NO_NEW_PRIVS, 1)
only_unpacking().load()

def refused(call, *arguments):
    try:
        if call(*arguments) == -1:
            raise OSError(ctypes.get_errno(), "")
    except PermissionError:
        os.write(1, b".")
    else:
        os.write(1, repr(call).encode())

refused(os.fork)
refused(os.execv, "/bin/true", ["true"])
refused(socket.socket)
refused(os.kill, os.getpid(), 0)
refused(os.rename, "/a", "/b")
refused(mmap.mmap, -1, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
for name in ("mount", "umount2", "unshare", "setns", "ptrace", "pivot_root", "open_by_handle_at", "init_module"):
    refused(libc[name] if hasattr(libc, name) else libc.syscall, 0, 0, 0, 0, 0)
thread = threading.Thread(target=os.write, args=(1, b"thread"))
thread.start()
thread.join()
os._exit(0)
"""


LIMITED = """
import resource, sys
from pathlib import Path
from runtime.linux import caps
from tests.runtime.images.given import Layer
from tests.runtime.images.test_unpack import unpack

keep = (1 << caps.last_cap() + 1) - 1 & ~caps.mask(("CAP_SYS_RESOURCE",))
caps.drop_bounding(keep, caps.last_cap())
caps.capset(keep, keep, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
unpack(Path(sys.argv[1]), Layer().file("f", b"text").tar())
"""


def test_a_limit_that_is_lower_already_stays(target: Path) -> None:
    subprocess.run([sys.executable, "-c", LIMITED, str(target)], cwd=ROOT, check=True)
    assert (target / "f").read_bytes() == b"text"


def test_system_calls_that_unpacking_does_not_need() -> None:
    """They are refused, though the process could do all of that; a thread it may have."""
    done = subprocess.run([sys.executable, "-c", ESCAPES], capture_output=True, check=True, text=True, timeout=60)
    assert done.stdout == "." * 14 + "thread"


OUT = """
import os, sys
from pathlib import Path
from runtime.images.unpack.child import _KEEP, _confine
from runtime.images.unpack.calls import only_unpacking
from runtime.linux.mount import open_tree

root = open_tree(sys.argv[1]) if sys.argv[2] == "guarded" else os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
filter = only_unpacking()
os.fchdir(root)
os.chroot(".")
_confine(filter)
os.mkdir("deeper")
os.chroot("deeper")
os.fchdir(root)
os.open("../beside", os.O_WRONLY | os.O_CREAT)
"""


@pytest.mark.parametrize("how", ["guarded", "unguarded"])
def test_the_way_out_of_a_chroot(run_dir: Path, how: str) -> None:
    """What has taken over a process that unpacks goes it: out of the mount of its directory it doesn't lead."""
    (run_dir / "layer").mkdir()
    subprocess.run([sys.executable, "-c", OUT, str(run_dir / "layer"), how], cwd=ROOT, check=True, timeout=60)
    assert (run_dir / "beside").exists() == (how == "unguarded")
    assert (run_dir / "layer/beside").exists() == (how == "guarded")


def test_short_names() -> None:
    assert [short_name(n) for n in (1, 35, 36, 36**4 - 1)] == ["1", "z", "10", "zzzz"]
    assert len(":".join(short_name(36**4 - 1 - n) for n in range(500))) < 4096 - 500


MOUNT = """
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" "$4"
cd "$4"
find . -printf '%P|%M|%U|%G|%T@|%l\\n' | sort
"""


@requires("overlay")
def test_the_kernel_shows_what_the_layers_say(images: Images, run_dir: Path) -> None:
    below = (
        Layer().directory("./", mode=0o750).directory("etc", mode=0o750, uid=9).file("etc/a", "1").file("etc/b", "1")
    )
    below.directory("gone").file("gone/x").directory("opaque").file("opaque/old").directory("tmp", mode=0o1777)
    below.file("twice", "below").directory("replaced").file("replaced/x")
    above = Layer().file("etc/.wh.a").file("etc/b", "2", mode=0o600).file(".wh.gone").file("opaque/.wh..wh..opq")
    above.file("opaque/new").file("tmp/t").hardlink("linked", "twice").symlink("replaced", "etc")
    layers = [below.tar(), above.tar()]
    archive = oci_archive(build(*layers, how="zstd"), "local/overlay:1")
    with tempfile.TemporaryFile() as file:
        file.write(archive)
        file.seek(0)
        [image] = images.load(file)
    rootfs = images.prepare("c", image.id)
    mounted = run_dir / "mounted"
    mounted.mkdir()
    arguments = [":".join(rootfs.lowers), rootfs.upper, rootfs.work, str(mounted)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", MOUNT, "sh", *arguments],
        cwd=rootfs.base,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = {}
    for line in done.stdout.splitlines():
        name, mode, uid, gid, _, link = line.split("|")
        seen[name] = (mode, int(uid), int(gid), link)
    mounted.rmdir()
    images.discard("c")
    assert seen == {
        "": ("drwxr-x---", 0, 0, ""),  # the layer above does not list it
        "etc": ("drwxr-x---", 9, 0, ""),
        "etc/b": ("-rw-------", 0, 0, ""),
        "linked": ("-rw-r--r--", 0, 0, ""),
        "opaque": ("drwxr-xr-x", 0, 0, ""),
        "opaque/new": ("-rw-r--r--", 0, 0, ""),
        "replaced": ("lrwxrwxrwx", 0, 0, "etc"),
        "tmp": ("drwxrwxrwt", 0, 0, ""),
        "tmp/t": ("-rw-r--r--", 0, 0, ""),
        "twice": ("-rw-r--r--", 0, 0, ""),
    }


STACK = """
import os, sys
from types import SimpleNamespace
from runtime.plan.mounts import MountOverlay
base, rootfs, at, *lowers = sys.argv[1:]
MountOverlay(base, tuple(lowers), f"{rootfs}/upper", f"{rootfs}/work", at, "").run(SimpleNamespace())
print(*os.listdir(at))
"""


@requires("overlay")
def test_as_many_layers_as_the_kernel_takes(run_dir: Path) -> None:
    """Whose names are as long as those of the millionth, below directories as deep as a node's."""
    base, rootfs, at = run_dir / "layers", run_dir / "rootfs" / ("c" * 64), run_dir / "mounted"
    for directory in (base, rootfs, at, rootfs / "upper", rootfs / "work"):
        directory.mkdir(parents=True)
    names = [short_name(1_600_000 + number) for number in range(LAYERS_LIMIT)]
    for number, name in enumerate(names):
        (base / name).mkdir()
        (base / name / f"f{number}").touch()
    command = ["unshare", "--mount", sys.executable, "-c", STACK, str(base), str(rootfs), str(at), *names]
    shown = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert set(shown.split()) == {f"f{number}" for number in range(LAYERS_LIMIT)}

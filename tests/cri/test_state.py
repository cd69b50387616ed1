"""Records on disk, the index, and the configuration."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cri.config import Config, ConfigError, load
from cri.state.index import Index, Names
from cri.state.records import (
    ContainerId,
    ContainerRecord,
    ContainerState,
    SandboxId,
    SandboxRecord,
    SandboxState,
    StepRecord,
    Timeline,
)
from cri.state.store import SCHEMA_VERSION, Store
from cri.translate.defaults import Handler
from runtime.errors import Exhausted, InvalidSpec, NotFound, Unavailable
from tests.requires import requires


def sandbox(id: str = "a") -> SandboxRecord:
    return SandboxRecord(
        id=SandboxId(id),
        config=b"\x00\xff",
        handler="",
        state=SandboxState.READY,
        created_ns=1,
        boot_id="b",
        cgroup_path="/p",
        ips=("10.0.0.1",),
        owes=("monitor",),
    )


def container(id: str = "c") -> ContainerRecord:
    return ContainerRecord(
        id=ContainerId(id),
        sandbox_id=SandboxId("a"),
        config=b"",
        image_id="sha256:1",
        image_ref="r",
        image_name="n",
        state=ContainerState.CREATED,
        created_ns=1,
        cgroup_path="/p/c",
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    made = Store(path)
    yield made
    made.close()


def test_what_is_put_is_there_after_a_crash(store: Store, path: Path) -> None:
    store.put_sandbox(sandbox())
    store.put_container(container())
    timeline = Timeline(steps=(StepRecord(phase="p", text="t", started_ns=1, duration_ns=2),), total_ns=3)
    store.put_container(msgspec.structs.replace(container(), state=ContainerState.RUNNING), b"{}")
    store.put_timeline(container().id, timeline)
    again = Store(path)  # the first is still open, as a killed process leaves it
    sandboxes, containers = again.load()
    assert sandboxes == [sandbox()]
    assert [one.state for one in containers] == [ContainerState.RUNNING]
    assert (again.spec("c"), again.timeline("c")) == (b"{}", timeline)
    again.delete("c")
    again.delete("nope")
    assert (again.spec("c"), again.timeline("c")) == (None, None)
    again.close()


def test_a_bad_record_is_set_aside(store: Store, path: Path) -> None:
    store.put_sandbox(sandbox("good"))
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO record VALUES ('sandbox', 'bad', x'00')")
    db.close()
    sandboxes, _ = store.load()
    assert [one.id for one in sandboxes] == ["good"]
    assert [(kind, id) for kind, id, _ in store.quarantined()] == [("sandbox", "bad")]


def test_a_damaged_database_is_moved_aside(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    store = Store(path)
    store.put_sandbox(sandbox())
    store.close()
    assert list(path.parent.glob("state.db.broken-*"))


def test_what_is_left_of_a_damaged_database(path: Path) -> None:
    """Whichever page is lost, the store opens, and of many records most are there."""
    store = Store(path)
    for number in range(100):
        store.put_container(container(f"c{number:02}"), bytes(500))
    store.checkpoint()
    store.close()
    whole = path.read_bytes()
    kept = []
    for page in range(0, len(whole), 4096):
        for stale in path.parent.glob(f"{path.name}-*"):
            stale.unlink()
        path.write_bytes(whole[:page] + b"\xa5" * 4096 + whole[page + 4096 :])
        store = Store(path)
        store.put_sandbox(sandbox())
        assert [one.id for one in store.load()[0]] == ["a"]
        kept.append(len(store.load()[1]))
        store.close()
    assert len(kept) > 10 and sorted(kept)[len(kept) // 2] >= 90, kept


def test_a_newer_database_is_refused(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(Unavailable, match="version 2"):
        Store(path)


@requires("root")
def test_a_full_disk_does_not_stop_deleting(run_dir: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(run_dir)], check=True)
    try:
        store = Store(run_dir / "state.db")
        store.put_sandbox(sandbox())

        def fill() -> None:
            for number in range(1000):
                begun = msgspec.structs.replace(container(f"c{number}"), state=ContainerState.CREATING)
                store.put_container(begun, bytes(16000))

        with pytest.raises(Exhausted, match="no space left"):
            fill()
        store.put_sandbox(msgspec.structs.replace(sandbox(), state=SandboxState.NOTREADY))
        store.delete("a")
        assert store.load()[0] == []
        store.close()
        Store(run_dir / "state.db").close()
    finally:
        subprocess.run(["umount", str(run_dir)], check=True)


def test_a_checkpoint(store: Store, path: Path) -> None:
    for number in range(1000):
        store.put_container(container(f"c{number}"), b"x")
    assert store.checkpoint_due
    store.checkpoint()
    assert not store.checkpoint_due
    assert path.stat().st_size > 20000


def test_ids_and_prefixes() -> None:
    index: Index[str] = Index("pod sandbox")
    for id in ("aaa", "aab", "b"):
        index.add(id, id.upper())
    assert index.get("aaa") == "AAA"
    assert index.get("b") == "B"
    assert index.find("c") is None
    with pytest.raises(InvalidSpec, match="ambiguous"):
        index.get("aa")
    with pytest.raises(InvalidSpec, match="empty"):
        index.find("")
    with pytest.raises(InvalidSpec, match="characters"):
        index.find("a" * 200)
    index.discard("aab")
    index.discard("aab")
    assert index.get("aa") == "AAA"
    with pytest.raises(NotFound, match="no pod sandbox aab"):
        index.get("aab")
    assert len(index) == 2


def test_names() -> None:
    names = Names()
    names.reserve(("a", 1), "x")
    names.release(("a", 1), "y")
    assert names.holder(("a", 1)) == "x"
    names.release(("a", 1), "x")
    assert names.holder(("a", 1)) is None


def config_of(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load(file)


def test_the_configuration(tmp_path: Path) -> None:
    assert load(None) == Config()
    assert Config().instance == "crib"
    config = config_of(tmp_path, 'root = "/x"\n[limits]\nworkers = 3\n[defaults.rlimits]\nnofile = [1, -1]')
    assert config.limits.workers == 3
    assert config.instance.startswith("crib-")
    limits = {limit.type: (limit.soft, limit.hard) for limit in config.defaults.translated().rlimits}
    assert limits["RLIMIT_NOFILE"] == (1, 2**64 - 1)
    assert load(tmp_path / "config.toml", root="/y", state=None).root == "/y"
    handlers = config_of(tmp_path, '[handlers.open]\nannotations = ["a.b/*"]\nwritable_cgroup = true').handlers
    assert handlers["open"].translated() == Handler(annotations=("a.b/*",), writable_cgroup=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rooot = 1", "unknown key rooot"),
        ("[network]\nsubnett = 1", "unknown key network.subnett"),
        ("[limits]\nworkers = 'x'", "key limits.workers"),
        ("[limits]\nworkers = 0", "limits.workers"),
        ("listen = 'tcp://1'", "listen"),
        ("root = 'relative'", "root"),
        ("log_level = 'loud'", "loud"),
        ("[cgroup]\nparent = '/a/../b'", "cgroup.parent"),
        ("[defaults.rlimits]\nfiles = [1, 1]", "defaults.rlimits"),
        ("[handlers.Gvisor]\nannotations = []", "handlers: 'Gvisor'"),
        ("[handlers.x]\nbinary = 'runc'", "handlers.*binary"),
        ("[handlers.x]\npath = 'runc'", "handlers.x.path: 'runc' is not an absolute path"),
        ("[handlers.x]\ncni_conf_dir = 'net.d'", "handlers.x.cni_conf_dir: 'net.d' is not an absolute path"),
        ("[handlers.x]\nargs = ['--debug']", "handlers.x.args: the built-in engine takes none"),
        ("[metrics]\naddress = '0.0.0.0'", "metrics.address: '0.0.0.0' is not a loopback address"),
        ("[metrics]\nport = 65536", "metrics.port"),
        ("not toml", "config.toml"),
    ],
)
def test_what_the_configuration_refuses(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, text)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load(tmp_path / "none.toml")

"""Pods with user namespaces, on the real kernel, by way of each of the two kinds of overlay."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from runtime.cgroup import detect
from runtime.engine import Cgroup, Engine, ExecStart, Maps, Pod, PodStart
from runtime.errors import NotFound
from runtime.linux.probe import probe
from runtime.spec import Device, IDMapping, Linux, Mount, Process, User
from runtime.volumes import part
from runtime.zygote.launch import launch
from tests.requires import requires
from tests.runtime.conftest import COUNT_IDS, FIRST_ID, MAPS, POD_ID, TIMEOUT_S, Bench, container

pytestmark = [requires("root", "overlay", "busybox", "userns"), pytest.mark.asyncio]
MAPPED = (IDMapping(container_id=0, host_id=FIRST_ID, size=COUNT_IDS),)


@pytest_asyncio.fixture(params=["descriptors", "mounts"])
async def mapped(request: pytest.FixtureRequest, layer: Path, state_dir: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    probes = probe(str(tmp_path))
    if not probes.user_namespaces:
        pytest.skip("this kernel's overlay takes no idmapped layers")
    if request.param == "descriptors" and not probes.overlay_of_descriptors:
        pytest.skip("this kernel's overlay takes no descriptors of detached mounts")
    state_dir.mkdir()
    engine = Engine(state_dir, launch(), replace(probes, overlay_of_descriptors=request.param == "descriptors"))
    bench = Bench(engine, layer, tmp_path, detect(driver="cgroupfs"), f"/crib-test-{os.getpid()}-user")
    yield bench
    bench.cgroups.kill(bench.cgroup)
    await bench.engine.stop_pod(POD_ID)
    bench.engine.close()
    await bench.remove_cgroups()


async def user_pod(bench: Bench, **fields: Any) -> Pod:
    return await bench.pod(PodStart(**{"id": POD_ID, "hostname": "pod", "uids": MAPS, "gids": MAPS, **fields}))


async def test_root_inside_is_nobody_outside(mapped: Bench) -> None:
    pod = await user_pod(mapped)
    command = (
        "id -u; id -g; cat /proc/self/uid_map; touch /new; stat -c %u /new /bin/busybox /dev/null; hostname; echo $$"
    )
    exited, log = await mapped.run(pod, "c", container(pod, "sh", "-c", command))
    assert exited.code == 0
    lines = log.splitlines()
    assert lines[:2] == ["0", "0"]
    assert lines[2].split() == ["0", str(FIRST_ID), str(COUNT_IDS)]
    assert lines[3:] == ["0", "0", "0", "pod", "1"]
    new = next(mapped.directory.glob("upper*/new"))
    assert new.stat().st_uid == FIRST_ID


async def test_its_namespaces_belong_to_the_user_namespace(mapped: Bench) -> None:
    pod = await user_pod(mapped, sysctls={"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "7"})
    usual = Mount(destination="/sys", type="sysfs", options=("ro", "nosuid"))
    queue = Mount(destination="/dev/mqueue", type="mqueue", options=("nosuid",))
    names = "user net ipc uts pid mnt"
    command = (
        f"for n in {names}; do readlink /proc/self/ns/$n; done; ls /sys/class/net; "
        "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start; hostname new && hostname"
    )
    process = container(pod, "sh", "-c", command, mounts=(queue, usual)).process
    assert process.capabilities is not None
    one = ("CAP_SYS_ADMIN",)
    caps = msgspec.structs.replace(process.capabilities, bounding=one, effective=one, permitted=one)
    spec = container(
        pod, "sh", "-c", command, mounts=(queue, usual),
        process=lambda process: msgspec.structs.replace(process, capabilities=caps),
    )  # fmt: skip
    exited, log = await mapped.run(pod, "c", spec)
    assert exited.code == 0, log
    lines = log.splitlines()
    assert not {os.readlink(f"/proc/self/ns/{name}") for name in names.split()} & set(lines[:6])
    assert lines[6:] == ["lo", "1", "7", "new"]


async def test_exec_enters_the_user_namespace(mapped: Bench, null: int) -> None:
    pod = await user_pod(mapped)
    await mapped.start(pod, "c", container(pod, "sleep", "100"))
    cgroup = Cgroup.of(mapped.cgroups, f"{mapped.cgroup}/c")
    read, write = os.pipe()
    for uid in (0, 1000):
        process = Process(cwd="/", user=User(uid=uid, gid=uid), args=("sh", "-c", "id -u; readlink /proc/self/ns/user"))
        process = msgspec.structs.replace(process, env=("PATH=/bin",))
        linux = Linux(uid_mappings=MAPPED, gid_mappings=MAPPED)
        start = ExecStart(f"e{uid}", "c", process, linux, cgroup.join_files, cgroup.clone_dir)
        assert (await asyncio.wait_for(pod.exec(start, null, write, write).wait(), TIMEOUT_S)).code == 0
        out = os.read(read, 999).decode().split()
        assert out[0] == str(uid)
        assert out[1] == os.readlink(pod.namespaces.user)
    os.close(read)
    os.close(write)


async def test_devices_work_and_belong_to_root_inside(mapped: Bench) -> None:
    pod = await user_pod(mapped)
    devices = (
        Device(path="/dev/deep/zero", type="c", major=1, minor=5),
        Device(path="/nodes/n", type="c", major=1, minor=3),
    )
    use = "echo x > /dev/null && echo x > /nodes/n && read -n1 x < /dev/deep/zero"
    command = f"{use}; stat -c '%u %t:%T' /dev/deep/zero /dev/tty"
    exited, log = await mapped.run(
        pod,
        "c",
        container(pod, "sh", "-c", command, linux=lambda linux: msgspec.structs.replace(linux, devices=devices)),
    )
    assert exited.code == 0, log
    assert log.splitlines() == ["0 1:5", "0 5:0"]


async def test_volumes_are_mapped(mapped: Bench, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "mine").write_text("x")
    pod = await user_pod(mapped)
    other = (IDMapping(container_id=0, host_id=FIRST_ID + 7, size=10),)
    source = str(volume)
    mounts = (
        Mount(destination="/plain", type="bind", source=source, options=("rbind", "ro", "rprivate")),
        Mount(
            destination="/own",
            type="bind",
            source=source,
            options=("rbind", "ridmap"),
            uid_mappings=MAPPED,
            gid_mappings=MAPPED,
        ),
        Mount(
            destination="/seven",
            type="bind",
            source=source,
            options=("rbind", "idmap"),
            uid_mappings=other,
            gid_mappings=other,
        ),
    )
    command = "stat -c %u /plain/mine /own/mine /seven/mine; touch /own/made; touch /plain/no"
    _, log = await mapped.run(pod, "c", container(pod, "sh", "-c", command, mounts=mounts))
    assert log.splitlines()[:3] == ["65534", "0", "7"]
    assert "Read-only" in log
    assert (volume / "made").stat().st_uid == 0


async def test_a_volume_is_mapped_without_a_user_namespace_too(bench: Bench, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    mapping = (IDMapping(container_id=0, host_id=5, size=10),)
    mount = Mount(
        destination="/v",
        type="bind",
        source=str(volume),
        options=("rbind", "ridmap"),
        uid_mappings=mapping,
        gid_mappings=mapping,
    )
    pod = await bench.pod()
    _, log = await bench.run(pod, "c", container(pod, "stat", "-c", "%u", "/v", mounts=(mount,)))
    assert log == "5\n"


async def test_on_the_hosts_network_sys_is_the_hosts(mapped: Bench) -> None:
    pod = await user_pod(mapped, net=False, hostname=None)
    options = ("rbind", "rprivate", "nosuid", "noexec", "nodev", "ro", "rro")
    sys = Mount(destination="/sys", type="bind", source="/sys", options=options)
    spec = container(
        pod, "sh", "-c", "readlink /proc/self/ns/net; touch /sys/x || ls -d /sys/class", mounts=(sys,),
        namespaces={"network": None, "uts": None},
    )  # fmt: skip
    _, log = await mapped.run(pod, "c", spec)
    lines = log.splitlines()
    assert lines[0] == os.readlink("/proc/self/ns/net")
    assert {"/sys/class", "touch: /sys/x: Read-only file system"} <= set(lines)


async def test_shared_pid_and_ipc(mapped: Bench) -> None:
    pod = await user_pod(mapped, pid=True)
    shared: dict[str, str | None] = {"pid": pod.namespaces.pid}
    await mapped.start(pod, "c1", container(pod, "sh", "-c", "echo x > /dev/shm/y; exec sleep 123", namespaces=shared))
    command = "until test -s /dev/shm/y; do true; done; stat -c %u /dev/shm /dev/shm/y; ps -o args"
    exited, log = await mapped.run(pod, "c2", container(pod, "sh", "-c", command, namespaces=shared))
    assert exited.code == 0
    assert log.splitlines()[:2] == ["0", "0"]
    assert "sleep 123" in log
    status = Path(f"/proc/{pod.init_pid}/status").read_text()
    assert f"Uid:\t{FIRST_ID}" in status
    assert "CapEff:\t0000000000000000" in status


async def test_failures_before_and_after_the_second_clone(mapped: Bench) -> None:
    pod = await user_pod(mapped)
    missing = Mount(destination="/x", type="bind", source="/does/not/exist", options=("rbind",))
    nonsense = Mount(destination="/x", type="nonsense")
    for number, (mounts, args, cause) in enumerate(
        (((missing,), "true", "/does/not/exist"), ((nonsense,), "true", "mount /x"), ((), "nope", "not found"))
    ):
        with pytest.raises(Exception, match=cause):
            await mapped.start(pod, f"c{number}", container(pod, args, mounts=mounts))
    assert await pod.containers() == []


async def test_a_new_engine_knows_the_mapping(mapped: Bench, state_dir: Path) -> None:
    await user_pod(mapped)
    mapped.engine.close()
    mapped.engine = Engine(state_dir, launch(), probe())
    again = await mapped.engine.connect(POD_ID)
    assert again is not None
    mapped.watch(again)
    exited, log = await mapped.run(again, "c", container(again, "id", "-u"))
    assert (exited.code, log) == (0, "0\n")
    assert stat.S_ISREG(os.stat(again.namespaces.user).st_mode)


@pytest.fixture
def image(tmp_path: Path) -> tuple[str, ...]:
    """Two layers and an empty directory above them."""
    base = tmp_path / "image"
    for name, files in (("top", {}), ("2", {"sub/two": "2"}), ("1", {"sub/one": "1", "other": "x"})):
        (base / name).mkdir(parents=True)
        for path, text in files.items():
            (base / name / path).parent.mkdir(exist_ok=True)
            (base / name / path).write_text(text)
    (base / "1/link").symlink_to("/sub")
    return tuple(str(base / name) for name in ("top", "2", "1"))


def image_volumes(engine: Engine, image: tuple[str, ...], user: str = "") -> tuple[Mount, ...]:
    """All of it, and a part behind a link that would lead out of it."""
    path = engine.volumes.image(POD_ID, "image", image, user)
    assert engine.volumes.image(POD_ID, "image", image, user) == path
    options = ("bind", "rprivate", "ro")
    return (
        Mount(destination="/image", type="bind", source=path, options=options),
        Mount(destination="/part", type="bind", source=part(path, "link"), options=options),
    )


_LOOK = "cat /image/sub/one /image/sub/two /part/one; ls /part; stat -c %u /image/other; touch /image/x /part/x"


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("maps", [MAPS, ()])
async def test_images_are_mounted_read_only(
    image: tuple[str, ...], layer: Path, state_dir: Path, tmp_path: Path, descriptors: bool, maps: Maps
) -> None:
    state_dir.mkdir()
    probes = probe(str(tmp_path))
    if descriptors and not probes.overlay_of_descriptors:
        pytest.skip("this kernel's overlay takes no descriptors of detached mounts")
    if maps and not probes.user_namespaces:
        pytest.skip("this kernel's overlay takes no idmapped layers")
    engine = Engine(state_dir, launch(), replace(probes, overlay_of_descriptors=descriptors))
    bench = Bench(engine, layer, tmp_path, detect(driver="cgroupfs"), f"/crib-test-{os.getpid()}-image")
    try:
        pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", uids=maps, gids=maps))
        mounts = image_volumes(engine, image, pod.namespaces.user)
        _, log = await bench.run(pod, "c", container(pod, "sh", "-c", _LOOK, mounts=mounts))
        assert log.startswith("121one\ntwo\n0\n")
        assert log.count("Read-only file system") == 2
        with pytest.raises(NotFound, match="no/such"):
            part(mounts[0].source, "no/such")
        assert len([line for line in Path("/proc/self/mountinfo").read_text().splitlines() if POD_ID in line]) <= 2
    finally:
        await engine.stop_pod(POD_ID)
        engine.close()
        await bench.remove_cgroups()
    assert POD_ID not in Path("/proc/self/mountinfo").read_text()

"""Containers that have a volume where logs are, as those that collect logs do."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.requires import requires
from tests.security import weak
from tests.security.conftest import WeakCribd
from tests.security.defects import attack

pytestmark = [requires("root", "overlay", "busybox"), pytest.mark.asyncio]

ANY_FILE: weak.Edits = (
    ("zygote/log.py", "if kind not in (stat.S_IFREG, stat.S_IFDIR):", "if False:"),
    ("zygote/log.py", "if kind == stat.S_IFLNK:", "if False:"),
)
OPEN_IT = "        directory = os.open(path, os.O_PATH | os.O_DIRECTORY)"
ANY_DIRECTORY: weak.Edits = (
    (
        "/cri/container/log.py",
        "directory = find(root, os.path.dirname(os.path.relpath(container.record.log_path, top)))",
        "path = os.path.dirname(container.record.log_path)\n        os.makedirs(path, exist_ok=True)\n" + OPEN_IT,
    ),
)


async def collector(real: Real, script: str) -> str:
    """A pod with a container that has the log directory as a volume, and has run this there."""
    pod = await real.pod(real.pod_config(network=False))
    real.logs.mkdir(exist_ok=True)
    volume = pb.Mount(container_path="/logs", host_path=str(real.logs))
    running = await real.run(pod, "sleep", "1000", name="collector", mounts=[volume])
    answer = await real.sh(running, f"cd /logs; {script}")
    assert answer.exit_code == 0, answer.stderr
    return pod


async def device(real: Real) -> bool:
    """Put a device of the host's where a log is to be; whether the container's output goes there."""
    pod = await collector(real, "mknod next.log c 1 5")
    try:
        running = await real.run(pod, "sleep", "1000", name="next")
    except grpc.aio.AioRpcError as error:
        if "not a regular file" not in str(error.details()):
            raise
        return False
    parent = int(Path(f"/proc/{await real.pid(running)}/stat").read_text().rpartition(")")[2].split()[1])
    opened = [os.stat(path) for path in Path(f"/proc/{parent}/fd").iterdir() if os.access(path, os.F_OK)]
    return any(stat.S_ISCHR(each.st_mode) and each.st_rdev == os.makedev(1, 5) for each in opened)


@attack(
    "log: a device",
    sentence="A container that has the directory of logs as a volume makes a device node of the host's disk at the "
    "path of a log, so that the output of the next container is written there",
    guard="what is at the path is looked at before it is opened, and only a regular file is",
    control="test_log_control_any_file",
)
async def test_a_device_in_place_of_a_log(real: Real) -> None:
    assert not await device(real)


async def test_log_control_any_file(weak_cribd: WeakCribd) -> None:
    assert await device(await weak_cribd(ANY_FILE))


async def elsewhere(real: Real, outside: Path) -> list[str]:
    """Put a link to a directory of the host's where a log's directory is to be; what is made there."""
    outside.mkdir()
    pod = await collector(real, f"ln -s {outside} next")
    try:
        running = await real.run(pod, "echo", "x", name="next", log_path="next/new/0.log")
        await real.ended(running)
    except grpc.aio.AioRpcError:
        pass
    return sorted(path.name for path in outside.rglob("*"))


@attack(
    "log: a link in its path",
    sentence="A container that has the directory of logs as a volume makes a link to a directory of the host's where "
    "the next container's log has its directory",
    guard="the path below the pod's directory is resolved by openat2 with RESOLVE_IN_ROOT; that directory itself is "
    "not opened by way of a link",
    control="test_log_control_any_directory",
)
async def test_a_link_in_place_of_a_logs_directory(real: Real, tmp_path: Path) -> None:
    assert await elsewhere(real, tmp_path / "outside") == []


async def test_log_control_any_directory(weak_cribd: WeakCribd, tmp_path: Path) -> None:
    real = await weak_cribd(ANY_DIRECTORY)
    assert "0.log" in await elsewhere(real, tmp_path / "outside")


ROTATING = "[logs]\nmax_bytes = 20000\nmax_files = 2\n"
TALK = "while :; do echo 0123456789012345678901234567890123456789; done"


async def rotated_elsewhere(real: Real, outside: Path) -> list[str]:
    """Swap a log's directory for a link to a directory of the host's with a file of the log's name, while cribd
    rotates."""
    outside.mkdir()
    (outside / "0.log").write_text("the host's\n")
    (outside / "0.log.20200101-000000").write_text("the host's\n")
    pod = await collector(real, "true")
    await real.run(pod, "sh", "-c", TALK, name="talker", log_path="talker/0.log")
    await until(lambda: len(list((real.logs / "talker").glob("0.log.*"))) == 1, timeout_s=60)
    (real.logs / "talker").rename(real.logs / "was")
    (real.logs / "talker").symlink_to(outside)
    said = "rotating a log failed"
    before = real.daemon.log().count(said)
    names = set(os.listdir(outside))
    await until(lambda: real.daemon.log().count(said) > before or set(os.listdir(outside)) != names, timeout_s=60)
    return sorted(names ^ set(os.listdir(outside)))


@attack(
    "log: rotation",
    sentence="The same while cribd rotates the log, so that files of the host's are renamed, made and removed",
    guard="all of a rotation is done in the directory that was found below the pod's",
    control="test_log_control_rotation",
)
async def test_rotation_stays_in_its_directory(real: Real, tmp_path: Path) -> None:
    real.daemon.stop()
    real.daemon.config.write_text(ROTATING)
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    assert await rotated_elsewhere(real, tmp_path / "outside") == []


async def test_log_control_rotation(weak_cribd: WeakCribd, tmp_path: Path) -> None:
    real = await weak_cribd(ANY_DIRECTORY, config=ROTATING)
    assert await rotated_elsewhere(real, tmp_path / "outside")

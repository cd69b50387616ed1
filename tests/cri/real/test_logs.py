"""Containers' logs on a real cribd: disks that are full or don't answer, rotation, crashes; no byte lost uncounted."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.streams import attach_url, spdy
from tests.limits import scaled
from tests.requires import requires
from tests.runtime.zygote.test_log import content, parse

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "overlay")]

_ROUNDS = int(os.environ.get("CRIB_LOG_ROUNDS", "6"))
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_NOTE = re.compile(rb"crib: (\d+) lines \((\d+) bytes\) of this log are missing here: (.*)")
_AT_ONCE_S = 2.0


@contextmanager
def frozen(directory: Path) -> Iterator[None]:
    """Its file system takes no writes meanwhile: who does one waits, and no signal ends that."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, _FITHAW, 0)
    finally:
        os.close(fd)


@asynccontextmanager
async def mounted(real: Real, *arguments: str) -> AsyncIterator[Path]:
    """A file system of their own for the logs."""
    real.logs.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, real.logs], check=True)
    yield real.logs
    for item in (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items:
        await real.remove(item.id)
    subprocess.run(["umount", real.logs], check=True)


@pytest_asyncio.fixture
async def disk(real: Real, tmp_path: Path) -> AsyncIterator[Path]:
    image = tmp_path / "disk"
    subprocess.run(["truncate", "-s", "64M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    async with mounted(real, "-o", "loop", str(image)) as directory:
        yield directory


@pytest_asyncio.fixture
async def small(real: Real) -> AsyncIterator[Path]:
    async with mounted(real, "-t", "tmpfs", "-o", "size=256k", "none") as directory:
        yield directory


@contextmanager
def at_once(what: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    took_s = time.monotonic() - begin
    assert took_s < scaled(_AT_ONCE_S), f"{what} took {took_s:.2f} s"


async def loss(real: Real, container: str) -> tuple[int, int, str]:
    """What cribd shows as missing in the container's log."""
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    found = json.loads((await real.client.ContainerStatus(request)).info["info"])["logLoss"]
    return found["lines"], found["bytes"], found["cause"]


def notes(data: bytes) -> tuple[int, int]:
    """How many lines and bytes a log says it lacks."""
    found = [_NOTE.fullmatch(text) for stream, _, text in parse(data) if stream == b"stderr"]
    return sum(int(note[1]) for note in found if note), sum(int(note[2]) for note in found if note)


def texts(data: bytes) -> list[bytes]:
    return [text for _, _, text in parse(data) if not _NOTE.fullmatch(text)]


async def monitor_of(real: Real, pod: str) -> int:
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    return int(json.loads(answer.info["info"])["pid"])


@requires("loop")
async def test_a_disk_that_does_not_answer(real: Real, disk: Path) -> None:
    """Its pod goes on: exec, attach, exits and the stop; what the log lacks in the end is counted, and it says so."""
    pod = await real.pod(real.pod_config(network=False))
    flood = await real.run(
        pod, "sh", "-c", "i=0; while :; do echo $((i+=1)) 0123456789012345678901234567; done", name="f"
    )
    quiet = await real.run(pod, "sh", "-c", 'while read -r word; do echo "got $word"; done', name="q", stdin=True)
    brief = await real.run(pod, "sh", "-c", "echo begin; while [ ! -e /go ]; do sleep 0.02; done; echo end", name="b")
    other = await real.create(pod, "sleep", "1000", name="o", log_path="")
    monitor = await monitor_of(real, pod)
    await until(lambda: b"begin" in (disk / "b.log").read_bytes())
    with frozen(disk):
        await until(lambda: _hangs(monitor), timeout_s=30)
        with at_once("exec"):
            assert (await real.sh(quiet, "echo here")).stdout == b"here\n"
        with at_once("attach"):
            async with spdy(await attach_url(real, quiet, stdin=True)) as client:
                streams = await client.command("stdin", "stdout", "stderr")
                await real.sh(quiet, "true")
                await streams["stdin"].write(b"a\n")
                assert await streams["stdout"].until(b"\n") == b"got a\n"
        with at_once("start"):
            await real.start(other)
        with at_once("exit"):
            await real.sh(brief, "touch /go")
            assert (await real.ended(brief)).exit_code == 0
        with at_once("reopen"), pytest.raises(Exception, match="does not answer"):
            await real.client.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=quiet))
        async with asyncio.timeout(scaled(30)):
            while (await loss(real, flood))[0] == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        with at_once("stop"):
            await real.client.StopContainer(pb.StopContainerRequest(container_id=flood, timeout=0))
        assert (await real.status(flood)).exit_code == 137
    await until(lambda: (disk / "b.log").read_bytes().endswith(b"stdout F end\n"))
    await until(lambda: content((disk / "q.log").read_bytes()) == b"got a\n")
    await until(lambda: notes((disk / "f.log").read_bytes())[0] > 0)
    data = (disk / "f.log").read_bytes()
    assert notes(data) == (await loss(real, flood))[:2]
    numbers = [int(text.split()[0]) for text in texts(data)]
    assert numbers == sorted(set(numbers))
    holes = sum(after - before - 1 for before, after in zip([0, *numbers], numbers, strict=False))
    assert holes <= notes(data)[0], "what is missing is counted"
    assert "output is missing in the log" in real.daemon.log()
    await real.client.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=quiet))


@requires("loop")
async def test_a_pod_is_stopped_while_its_disk_does_not_answer(real: Real, disk: Path) -> None:
    pod = await real.pod(real.pod_config(network=False))
    await real.run(pod, "sh", "-c", "while :; do echo tick; sleep 0.01; done")
    monitor = await monitor_of(real, pod)
    with frozen(disk):
        await until(lambda: _hangs(monitor))
        with at_once("stopping the pod"):
            await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
        with at_once("removing it"):
            await real.remove(pod)
        assert (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items == []
        assert await real.pod(real.pod_config("other", network=False))
    await until(lambda: not Path(f"/proc/{monitor}").exists())


def _hangs(monitor: int) -> bool:
    tasks = Path(f"/proc/{monitor}/task")
    states = [(tasks / task / "stat").read_text().rpartition(")")[2].split()[0] for task in os.listdir(tasks)]
    return "D" in states


async def test_a_full_disk(real: Real, small: Path) -> None:
    (small / "filler").write_bytes(bytes(128 << 10))
    pod = await real.pod(real.pod_config(network=False))
    script = "n() { i=0; while [ $i -lt $1 ]; do i=$((i+1)); echo $2 $i; done; }; n 5000 a; read -r _; n 100 b"
    container = await real.run(pod, "sh", "-c", script, stdin=True)
    async with asyncio.timeout(scaled(30)):
        while (await loss(real, container))[0] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    (small / "filler").unlink()
    async with spdy(await attach_url(real, container, stdin=True)) as client:
        streams = await client.command("stdin", "stdout", "stderr")
        await streams["stdin"].write(b"\n")
        assert (await real.ended(container)).exit_code == 0
    data = (small / "c.log").read_bytes()
    lines, _, cause = await loss(real, container)
    assert cause == "no space left on device"
    assert notes(data)[0] == lines
    assert len(texts(data)) + lines == 5100
    assert texts(data)[-100:] == [b"b %d" % number for number in range(1, 101)]


_COUNTER = r"""
i=0
while [ ! -e /stop ]; do i=$((i+1)); echo "$i some text that makes it longer"; echo "$i" >&2; done
printf unfinished
"""


def _whole(pieces: list[bytes]) -> None:
    """Both streams of `_COUNTER` are there from the first byte to the last."""
    lines = [line for piece in pieces for line in parse(piece)]
    out = b"".join(text + (b"\n" if tag == b"F" else b"") for stream, tag, text in lines if stream == b"stdout")
    err = [int(text) for stream, _, text in lines if stream == b"stderr"]
    last = len(err)
    assert err == list(range(1, last + 1))
    assert out == b"".join(b"%d some text that makes it longer\n" % n for n in range(1, last + 1)) + b"unfinished"


async def test_rotations_and_crashes(real: Real) -> None:
    """Files renamed under the writer, as the kubelet does it, and cribd killed in between."""
    pod = await real.pod(real.pod_config(network=False))
    container = await real.run(pod, "sh", "-c", _COUNTER)
    log = real.logs / "c.log"
    olds: list[Path] = []
    for number in range(_ROUNDS):
        await until(lambda: log.stat().st_size > 20_000, timeout_s=30)
        old = real.logs / f"c.log.{number:06}"
        log.rename(old)
        await real.client.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container))
        size = old.stat().st_size
        olds.append(old)
        if number % 3 == 0:
            real.daemon.kill()
            before = log.stat().st_size
            await until(lambda: log.stat().st_size > before)  # noqa: B023
            await real.client.close()
            real.daemon.start()
            real.client = real.daemon.client()
        assert old.stat().st_size == size, "nothing goes to the old file once it is answered"
    await real.sh(container, "touch /stop")
    assert (await real.ended(container)).exit_code == 0
    _whole([path.read_bytes() for path in [*olds, log]])


def _size(logs: Path) -> int:
    return sum(path.stat().st_size for path in logs.iterdir())


async def test_rotation_by_cribd(real: Real) -> None:
    """With a limit in the configuration: all files together have every byte, and so many are kept."""
    real.daemon.stop()
    real.daemon.config.write_text("[logs]\nmax_bytes = 100000\nmax_files = 1000\n")
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    pod = await real.pod(real.pod_config(network=False))
    container = await real.run(pod, "sh", "-c", _COUNTER)
    await until(lambda: len(list(real.logs.iterdir())) > _ROUNDS, timeout_s=60 + 3 * _ROUNDS)  # one a second at most
    real.daemon.kill()  # the output goes on meanwhile, to one file
    log = real.logs / "c.log"
    now = time.time_ns()
    if log.exists():  # as if cribd had come so far
        log.rename(f"{log}.{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now // 10**9))}.{now % 10**9:09d}")
    size = _size(real.logs)
    await until(lambda: _size(real.logs) > size + 200_000, timeout_s=30)
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    files = len(list(real.logs.iterdir()))
    await until(lambda: len(list(real.logs.iterdir())) > files, timeout_s=30)
    await real.sh(container, "touch /stop")
    assert (await real.ended(container)).exit_code == 0
    olds = sorted(path for path in real.logs.iterdir() if path != log)
    assert all(re.fullmatch(r"c\.log\.\d{8}-\d{6}\.\d{9}", path.name) for path in olds)
    _whole([path.read_bytes() for path in [*olds, log]])

    real.daemon.stop()
    real.daemon.config.write_text("[logs]\nmax_bytes = 10000\nmax_files = 3\n")
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    await real.run(pod, "sh", "-c", _COUNTER, name="few")
    await until(lambda: len(list(real.logs.glob("few.log.*"))) == 2, timeout_s=60)
    first = min(real.logs.glob("few.log.*"))
    await until(lambda: not first.exists() and len(list(real.logs.glob("few.log*"))) == 3, timeout_s=60)


async def test_a_log_that_can_not_be_opened(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    (real.logs / "c.log").mkdir(parents=True)
    container = await real.create(pod, "sleep", "1000")
    with pytest.raises(Exception, match=r"c\.log: is a directory"):
        await real.start(container)
    (real.logs / "c.log").rmdir()
    again = await real.run(pod, "sleep", "1000", name="d")
    request = pb.ReopenContainerLogRequest(container_id=again)
    (real.logs / "d.log").unlink()
    await real.client.ReopenContainerLog(request)
    assert (real.logs / "d.log").exists()
    await real.client.StopContainer(pb.StopContainerRequest(container_id=again, timeout=0))
    (real.logs / "d.log").unlink()
    with pytest.raises(Exception, match="not running"):
        await real.client.ReopenContainerLog(request)
    assert not (real.logs / "d.log").exists()

"""Exec as its clients use it: SPDY and WebSocket, with and without a terminal."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.streams import channels, exec_url, spdy
from tests.cri.streaming import frames
from tests.cri.streaming.client import Refusal, Spdy, code
from tests.limits import scaled
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "overlay")]


_CATCHER = b"""sh -c 'trap "echo cau""ght; exit" INT; echo rea""dy; while :; do sleep 1; done'\n"""


@pytest_asyncio.fixture
async def pod(real: Real) -> str:
    return await real.pod(real.pod_config(network=False))


async def sleeper(real: Real, pod: str, **fields: Any) -> str:
    return await real.run(pod, "sleep", "1000", **fields)


def resize(rows: int, columns: int) -> bytes:
    return json.dumps({"Width": columns, "Height": rows}).encode() + b"\n"


async def processes(real: Real, container: str, *wanted: str) -> None:
    """Wait until these are the container's living processes, besides shells; its init may be one that doesn't reap."""
    script = "for p in /proc/[0-9]*; do grep -q 'State:.Z' $p/status || cat $p/comm 2>/dev/null; done"
    found: list[str] = []
    try:
        async with asyncio.timeout(scaled(10)):
            while found != sorted(wanted):
                names = (await real.sh(container, script)).stdout.decode().split()
                found = sorted(name for name in names if name not in ("sh", "cat", "grep"))
    except TimeoutError:
        raise AssertionError(f"{found}, wanted {wanted}") from None


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "channel.k8s.io"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_output_and_exit_code(real: Real, pod: str, protocol: str, method: str) -> None:
    container = await sleeper(real, pod)
    url = await exec_url(real, container, "sh", "-c", "echo out; echo err >&2; exit 3")
    async with spdy(url, protocol, method=method) as client:
        streams = await client.command("stdout", "stderr")
        assert client.fields["x-stream-protocol-version"] == protocol
        assert await streams["stdout"].got() == b"out\n"
        assert await streams["stderr"].got() == b"err\n"
        told = await streams["error"].got()
        if protocol in ("v5.channel.k8s.io", "v4.channel.k8s.io"):
            assert code(told) == 3
        else:
            assert b"exit code 3" in told


async def test_success_is_told_from_version_4_on(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    for protocol, said in (("v4.channel.k8s.io", {"metadata": {}, "status": "Success"}), ("v2.channel.k8s.io", None)):
        async with spdy(await exec_url(real, container, "true"), protocol) as client:
            streams = await client.command("stdout", "stderr")
            told = await streams["error"].got()
            assert (json.loads(told) if told else None) == said


async def test_a_killed_command_and_one_that_is_not_there(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    async with spdy(await exec_url(real, container, "sh", "-c", "kill -9 $$")) as client:
        assert code(await (await client.command("stdout", "stderr"))["error"].got()) == 137
    async with spdy(await exec_url(real, container, "nothing")) as client:
        told = json.loads(await (await client.command("stdout", "stderr"))["error"].got())
        assert told["reason"] == "InternalError"
        assert "nothing" in told["message"]


@pytest.mark.parametrize("windows", [False, True])
async def test_every_byte_in_both_directions(real: Real, pod: str, windows: bool) -> None:
    container = await sleeper(real, pod)
    body = os.urandom(3 << 20)
    async with spdy(await exec_url(real, container, "cat", stdin=True), windows=windows) as client:
        streams = await client.command("stdin", "stdout", "stderr")

        async def give() -> None:
            await streams["stdin"].write(body)
            streams["stdin"].end()

        giving = asyncio.create_task(give())
        assert await streams["stdout"].got() == body
        await giving
        assert code(await streams["error"].got()) == 0


async def test_a_reader_that_keeps_windows_stops_the_writer(real: Real, pod: str) -> None:
    """And not the daemon, nor the other stream."""
    container = await sleeper(real, pod)
    url = await exec_url(real, container, "sh", "-c", "yes | head -c 5000000; echo done >&2")
    async with spdy(url, windows=True) as client:
        streams = await client.command("stdout", "stderr")
        first = await streams["stdout"].queue.get()
        got = len(first)
        while got < 64 << 10:
            got += len(await streams["stdout"].queue.get())
        assert got == 64 << 10, "the window, and no more"
        async with asyncio.timeout(scaled(10)):
            await real.sh(container, "true")
        assert streams["stdout"].queue.empty()
        assert streams["stderr"].queue.empty()
        client.send(frames.window_update(1, 1) + frames.window_update(3, got))
        assert got + len(await streams["stdout"].got()) == 5000000
        assert await streams["stderr"].got() == b"done\n"


async def test_a_terminal(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    url = await exec_url(real, container, "sh", tty=True, stdin=True)
    async with spdy(url) as client:
        streams = await client.command("stdin", "stdout", "resize")
        await streams["resize"].write(resize(33, 111))
        await streams["stdin"].write(b"tty; readlink /proc/self/fd/0; echo $TERM\n")
        seen = await streams["stdout"].until(b"xterm\r\n")
        assert b"/dev/pts/0\r\n/dev/pts/0\r\n" in seen
        await streams["resize"].write(b'{"Width":1e9,"Height":-1}{"nonsense":' + b"9" * 3000 + resize(44, 122))
        await streams["resize"].write(resize(44, 122))
        await streams["stdin"].write(b"trap 'echo re''sized' WINCH; stty size; exec 3>/dev/tty; echo to the tty >&3\n")
        seen = await streams["stdout"].until(b"to the tty\r\n")
        assert b"44 122\r\n" in seen
        await streams["stdin"].write(
            b"""sh -c 'trap "echo cau""ght; exit" INT; echo rea""dy; while :; do sleep 1; done'\n"""
        )
        await streams["stdout"].until(b"ready")
        await streams["stdin"].write(b"\x03")
        await streams["stdout"].until(b"caught")
        await streams["stdin"].write(b"exit 7\n")
        await streams["stdout"].got()
        assert code(await streams["error"].got()) == 7
    await processes(real, container, "sleep")


async def test_a_terminal_that_is_hung_up_takes_its_processes_with_it(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    url = await exec_url(real, container, "sh", "-c", "(trap '' HUP; exec tail -f /dev/null) & exec cat", tty=True)
    async with spdy(url) as client:
        await client.command("stdout", "resize")
        await processes(real, container, "sleep", "tail")
    await processes(real, container, "sleep")


@pytest.mark.parametrize("how", ["close", "abort", "reset"])
async def test_the_tree_ends_with_its_client(real: Real, pod: str, how: str) -> None:
    container = await sleeper(real, pod)
    script = "setsid sh -c 'sleep 2000 & wait' & exec tail -f /dev/null"
    client = await Spdy().connect(await exec_url(real, container, "sh", "-c", script))
    streams = await client.command("stdout", "stderr")
    await processes(real, container, "sleep", "sleep", "tail")
    if how == "abort":
        client.writer.transport.abort()
    elif how == "reset":
        streams["stdout"].give_up()  # SIGPIPE is for what writes; this one goes by the connection
    await client.close()
    await processes(real, container, "sleep")


async def test_the_tree_ends_with_cribd(real: Real, pod: str) -> None:
    """Nobody is left for whom it runs; the container is not concerned, and commands of the next cribd's neither."""
    container = await sleeper(real, pod)
    clients = []
    for tty in (False, True):
        command = ("sh", "-c", "sleep 2000 & echo up; exec sleep 2000")
        client = await Spdy().connect(await exec_url(real, container, *command, stdin=True, tty=tty))
        clients.append(client)
        streams = await client.command("stdin", "stdout", "resize" if tty else "stderr")
        await streams["stdout"].until(b"up")
    probe = asyncio.ensure_future(real.sh(container, "sleep 2000"))
    await processes(real, container, *["sleep"] * 6)
    real.daemon.kill()
    await asyncio.wait({probe}, timeout=scaled(20))
    assert probe.exception()
    for client in clients:
        await client.close()
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    await processes(real, container, "sleep")


async def test_a_session_ends_with_its_container(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    async with spdy(await exec_url(real, container, "sh", "-c", "echo up; sleep 2000")) as client:
        streams = await client.command("stdout", "stderr")
        await streams["stdout"].until(b"up")
        await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
        assert code(await streams["error"].got()) == 137


async def test_a_background_child_does_not_hold_it(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    async with spdy(await exec_url(real, container, "sh", "-c", "yes & sleep 2000 & echo started")) as client:
        streams = await client.command("stdout", "stderr")
        assert b"started" in await streams["stdout"].got()
        assert code(await streams["error"].got()) == 0


async def test_input_for_one_that_does_not_read(real: Real, daemon_memory: Path, pod: str) -> None:
    """A gigabyte offered: the client is stopped, the daemon doesn't grow, and all ends when the client closes."""
    container = await sleeper(real, pod)
    client = await Spdy().connect(await exec_url(real, container, "sleep", "2000", stdin=True))
    streams = await client.command("stdin", "stdout", "stderr")
    before = _rss(daemon_memory)
    idle_s = await latency(real, container)
    giving = asyncio.create_task(streams["stdin"].write(bytes(1 << 30)))
    busy_s = await latency(real, container)
    logging.getLogger(__name__).warning("calls take %s s, and %s s without that input", busy_s, idle_s)
    assert not giving.done(), "stopped"
    assert busy_s[0] < idle_s[0] + scaled(0.1)
    assert busy_s[1] < scaled(2)
    assert _rss(daemon_memory) - before < 16 << 20
    giving.cancel()
    client.writer.transport.abort()
    await client.close()
    await processes(real, container, "sleep")


async def latency(real: Real, container: str) -> tuple[float, float]:
    """How long calls take in three seconds: the median, and the longest."""
    took_s: list[float] = []
    end = time.monotonic() + 3
    while (begin := time.monotonic()) < end:
        if len(took_s) % 5:
            await real.client.ListContainers(pb.ListContainersRequest())
        else:
            assert (await real.sh(container, "echo fine")).stdout == b"fine\n"
        took_s.append(time.monotonic() - begin)
    return sorted(took_s)[len(took_s) // 2], max(took_s)


async def test_input_that_nobody_takes_any_more_does_not_hold_the_client(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    async with spdy(await exec_url(real, container, "sh", "-c", "exec <&-; sleep 1; echo over", stdin=True)) as client:
        streams = await client.command("stdin", "stdout", "stderr")
        async with asyncio.timeout(scaled(20)):
            await streams["stdin"].write(bytes(8 << 20))
        assert await streams["stdout"].got() == b"over\n"


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"])
async def test_websocket(real: Real, pod: str, protocol: str) -> None:
    container = await sleeper(real, pod)
    url = await exec_url(real, container, "sh", "-c", "read line; echo got $line; echo err >&2; exit 5", stdin=True)
    async with channels(url, protocol) as client:
        client.send(0, b"it\n")
        assert await client.until(1, b"\n") == b"got it\n"
        assert code(await client.read(3)) == 5
        assert await client.got(2) == b"err\n"
        await client.task
        assert client.closed_with == 1000


@pytest.mark.parametrize("protocol", ["channel.k8s.io", "base64.channel.k8s.io", ""])
async def test_the_first_websocket_protocols(real: Real, pod: str, protocol: str) -> None:
    """Without a status document: the error channel has a text, and nothing for success."""
    container = await sleeper(real, pod)
    url = await exec_url(real, container, "sh", "-c", "read l; echo $l; exit 5", stdin=True)
    async with channels(url, protocol) as one:
        one.send(0, b"it\n")
        assert await one.until(1, b"\n") == b"it\n"
        assert b"exit code 5" in await one.read(3)
        await one.task
    async with channels(await exec_url(real, container, "echo", "x"), protocol) as other:
        assert await other.got(1) == b"x\n"
        assert 3 not in other.queues


async def test_version_5_can_end_the_input(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    body = os.urandom(2 << 20)
    async with channels(await exec_url(real, container, "cat", stdin=True)) as client:
        for at in range(0, len(body), 32 << 10):
            client.send(0, body[at : at + (32 << 10)])
        client.send(255, b"\0")
        assert await client.got(1) == body
        assert code(await client.read(3)) == 0


async def test_websocket_terminal(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    async with channels(await exec_url(real, container, "sh", tty=True, stdin=True)) as client:
        client.send(4, resize(20, 60))
        client.send(0, b"stty size\n")
        await client.until(1, b"20 60\r\n")
        client.send(0, b"exit\n")
        assert code(await client.read(3)) == 0


async def test_what_it_runs_as(real: Real, pod: str) -> None:
    """The container's user, capabilities, filter, namespaces and cgroup, with and without a terminal."""
    security = pb.LinuxContainerSecurityContext(
        run_as_user=pb.Int64Value(value=1234),
        run_as_group=pb.Int64Value(value=2345),
        supplemental_groups=[3456],
        no_new_privs=True,
        seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
    )
    container = await sleeper(real, pod, linux=pb.LinuxContainerConfig(security_context=security))
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    init = json.loads((await real.client.ContainerStatus(request)).info["info"])["pid"]
    kept = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
    for tty in (False, True):
        async with spdy(await exec_url(real, container, "cat", tty=tty, stdin=True)) as client:
            streams = await client.command("stdin", "stdout", *(("resize",) if tty else ("stderr",)))
            await streams["stdin"].write(b"here\n")
            await streams["stdout"].until(b"here")
            members = Path(f"/proc/{init}/cgroup").read_text()
            (other,) = [pid for pid in _members(members) if pid != init]
            assert Path(f"/proc/{other}/cgroup").read_text() == members
            for name in ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user"):
                assert os.readlink(f"/proc/{other}/ns/{name}") == os.readlink(f"/proc/{init}/ns/{name}")
            mine, inits = (_status(pid) for pid in (other, init))
            assert {name: mine[name] for name in kept} == {name: inits[name] for name in kept}
            assert mine["Uid"].split()[0] == "1234"
            assert mine["Groups"].split() == ["2345", "3456"]
            assert mine["Seccomp"] == "2"
    async with spdy(await exec_url(real, container, "sh", "-c", "cat /dev/stdin > /dev/stdout", stdin=True)) as client:
        streams = await client.command("stdin", "stdout", "stderr")
        await streams["stdin"].write(b"its own\n")
        await streams["stdout"].until(b"its own")


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _members(cgroup: str) -> list[int]:
    """The living processes whose /proc/PID/cgroup says the same."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            if path.read_text() == cgroup and "State:\tZ" not in (path.parent / "status").read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def test_refusals(real: Real, pod: str) -> None:
    container = await real.create(pod, "sleep", "1000")
    ask = real.client.Exec
    for request, status in (
        (pb.ExecRequest(cmd=["true"], stdout=True), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ExecRequest(container_id="none", cmd=["true"], stdout=True), grpc.StatusCode.NOT_FOUND),
        (pb.ExecRequest(container_id=container, cmd=["true"], stdout=True), grpc.StatusCode.FAILED_PRECONDITION),
        (pb.ExecRequest(container_id=container, cmd=["true"]), grpc.StatusCode.INVALID_ARGUMENT),
        (
            pb.ExecRequest(container_id=container, cmd=["true"], stdout=True, stderr=True, tty=True),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(request)
        assert caught.value.code() == status
    await real.start(container)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(pb.ExecRequest(container_id=container, stdout=True))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_address_works_once(real: Real, pod: str) -> None:
    container = await sleeper(real, pod)
    url = await exec_url(real, container, "true")
    with pytest.raises(Refusal) as guessed:
        await Spdy().connect(url[:-1] + ("a" if url[-1] != "a" else "b"))
    assert guessed.value.status == 404
    async with spdy(url) as client:
        await client.command("stdout", "stderr")
    with pytest.raises(Refusal) as used:
        await Spdy().connect(url)
    assert used.value.status == 404
    with pytest.raises(Refusal) as other:
        await Spdy().connect((await exec_url(real, container, "true")).replace("/exec/", "/attach/"))
    assert other.value.status == 404


@pytest.fixture
def daemon_memory(real: Real) -> Path:
    assert real.daemon.process
    return Path(f"/proc/{real.daemon.process.pid}/status")


def _rss(status: Path) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10

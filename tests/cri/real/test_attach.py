"""Attach: clients that share a container's streams, and leave it alone."""

from __future__ import annotations

import asyncio
import json
import os

import grpc
import pytest
import pytest_asyncio

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.streams import attach_url, channels, spdy
from tests.cri.streaming.client import Spdy, code
from tests.limits import scaled
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "overlay")]

_TALKER = 'while read -r word; do echo "got $word"; echo "err $word" >&2; done; echo over'


@pytest_asyncio.fixture
async def pod(real: Real) -> str:
    return await real.pod(real.pod_config(network=False))


def logged(real: Real) -> list[str]:
    return [line.split(" ", 3)[3] for line in (real.logs / "c.log").read_text().splitlines()]


async def test_several_clients(real: Real, pod: str) -> None:
    """All see the output, any may give input, and the log has it once."""
    container = await real.run(pod, "sh", "-c", _TALKER, stdin=True)
    async with (
        spdy(await attach_url(real, container, stdin=True)) as one,
        channels(await attach_url(real, container, stdin=True)) as two,
        spdy(await attach_url(real, container)) as three,
    ):
        first = await one.command("stdin", "stdout", "stderr")
        third = await three.command("stdout", "stderr")
        await real.sh(container, "true")  # what is asked of the monitor now comes after the attachments
        await first["stdin"].write(b"a\n")
        assert await third["stdout"].until(b"\n") == b"got a\n"
        two.send(0, b"b\n")
        assert await first["stdout"].until(b"got b\n") == b"got a\ngot b\n"
        assert await two.until(1, b"got b\n") == b"got a\ngot b\n"
        assert await third["stderr"].until(b"err b\n") == b"err a\nerr b\n"
        first["stdin"].end()  # not the container's
        two.send(255, b"\0")
    async with spdy(await attach_url(real, container, stdin=True)) as later:
        streams = await later.command("stdin", "stdout", "stderr")
        await real.sh(container, "true")
        await streams["stdin"].write(b"c\n")
        assert await streams["stdout"].until(b"\n") == b"got c\n"
        assert await streams["stderr"].until(b"\n") == b"err c\n"
        await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
        assert code(await streams["error"].got()) == 0
    assert sorted(logged(real)) == sorted(["got a", "err a", "got b", "err b", "got c", "err c"])


async def test_input_that_comes_once(real: Real, pod: str) -> None:
    container = await real.run(pod, "sh", "-c", _TALKER, stdin=True, stdin_once=True)
    async with spdy(await attach_url(real, container)) as watcher:  # has no input to end
        await watcher.command("stdout", "stderr")
    async with spdy(await attach_url(real, container, stdin=True)) as client:
        streams = await client.command("stdin", "stdout", "stderr")
        await real.sh(container, "true")
        await streams["stdin"].write(b"a\n")
        streams["stdin"].end()
        assert await streams["stdout"].got() == b"got a\nover\n"
        assert code(await streams["error"].got()) == 0
    assert (await real.ended(container)).exit_code == 0


@pytest.mark.parametrize("how", ["close", "kill"])
async def test_input_that_comes_once_ends_with_its_client(real: Real, pod: str, how: str) -> None:
    container = await real.run(pod, "sh", "-c", _TALKER, stdin=True, stdin_once=True)
    client = await Spdy().connect(await attach_url(real, container, stdin=True))
    streams = await client.command("stdin", "stdout", "stderr")
    await real.sh(container, "true")
    await streams["stdin"].write(b"a\n")
    await streams["stdout"].until(b"got a")
    if how == "kill":
        real.daemon.kill()
        real.daemon.start()
    await client.close()
    assert (await real.ended(container)).exit_code == 0
    assert logged(real)[-1] == "over"


async def test_every_byte_of_the_input(real: Real, pod: str) -> None:
    container = await real.run(pod, "sh", "-c", "exec sha256sum", stdin=True, stdin_once=True)
    body = os.urandom(5 << 20)
    import hashlib

    async with spdy(await attach_url(real, container, stdin=True)) as client:
        streams = await client.command("stdin", "stdout", "stderr")
        await streams["stdin"].write(body)
        streams["stdin"].end()
        assert (await streams["stdout"].got()).split()[0].decode() == hashlib.sha256(body).hexdigest()


async def test_a_terminal(real: Real, pod: str) -> None:
    container = await real.run(pod, "sh", tty=True, stdin=True)
    async with spdy(await attach_url(real, container, tty=True, stdin=True)) as client:
        streams = await client.command("stdin", "stdout", "resize")
        await real.sh(container, "true")
        await streams["resize"].write(json.dumps({"Width": 99, "Height": 11}).encode())
        async with asyncio.timeout(scaled(20)):
            while True:
                await streams["stdin"].write(b"stty size; echo e''nd\n")
                if b"11 99\r\n" in await streams["stdout"].until(b"end\r\n"):
                    break
        await streams["stdin"].write(b"tty\n")
        await streams["stdout"].until(b"/dev/pts/0\r\n")
    async with spdy(await attach_url(real, container, tty=True, stdin=True)) as again:
        streams = await again.command("stdin", "stdout", "resize")
        await real.sh(container, "true")
        await streams["stdin"].write(b"exit 5\n")
        assert code(await streams["error"].got()) == 0, "that it ended, not how"
    assert (await real.ended(container)).exit_code == 5
    assert any("/dev/pts/0" in line for line in logged(real))


async def test_a_client_that_does_not_read_holds_up_nobody(real: Real, pod: str) -> None:
    container = await real.run(
        pod, "sh", "-c", "read -r go; yes 0123456789 | head -c 30000000; echo; echo over", stdin=True
    )
    # Without the output, which might come faster than this process takes it.
    request = pb.AttachRequest(container_id=container, stdin=True, stderr=True)
    url = str((await real.client.Attach(request)).url)
    async with spdy(await attach_url(real, container), windows=True) as client, spdy(url) as other:
        streams = await client.command("stdout", "stderr")
        theirs = await other.command("stdin", "stderr")
        await real.sh(container, "true")
        await theirs["stdin"].write(b"\n")
        assert (await real.ended(container)).exit_code == 0
        assert code(await theirs["error"].got()) == 0
        size = sum(len(line.split(" ", 3)[3]) for line in (real.logs / "c.log").read_text().splitlines())
        assert size > 27000000
        seen = len(await streams["stdout"].got())
        assert 0 < seen < 30000000
        told = json.loads(await streams["error"].got())
        assert told["status"] == "Failure"
        assert "faster than the client took it" in told["message"]


async def test_clients_that_come_and_go(real: Real, pod: str) -> None:
    container = await real.run(pod, "sh", "-c", _TALKER, stdin=True)
    assert real.daemon.process
    before = len(os.listdir(f"/proc/{real.daemon.process.pid}/fd"))
    for number in range(60):
        client = await Spdy().connect(await attach_url(real, container, stdin=True))
        streams = await client.command(*("stdin", "stdout", "stderr")[: number % 4])
        if "stdin" in streams:
            await streams["stdin"].write(b"x\n")
        if number % 3:
            client.writer.transport.abort()
        await client.close()
    async with asyncio.timeout(scaled(20)):
        while len(os.listdir(f"/proc/{real.daemon.process.pid}/fd")) > before:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (await real.sh(container, "echo here")).stdout == b"here\n"


async def test_refusals(real: Real, pod: str) -> None:
    container = await real.create(pod, "sleep", "1000")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await attach_url(real, container)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await real.start(container)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await attach_url(real, container, tty=True)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    async with spdy(await attach_url(real, container, stdin=True)) as client:  # it has none: what is given goes nowhere
        streams = await client.command("stdin", "stdout", "stderr")
        await streams["stdin"].write(bytes(3 << 20))
        await real.client.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
        await streams["error"].got()

"""Terminals as programs find them that look closely: what tmux, sudo and screen need; and every byte in the log."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.streams import attach_url, exec_url, spdy
from tests.cri.real.test_modes import user_pod
from tests.requires import requires
from tests.runtime.zygote.test_log import content

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "overlay")]
EACH = pytest.mark.parametrize("user_namespace", [False, pytest.param(True, marks=requires("userns"))])
USERS = pytest.mark.parametrize("uid", [0, 1000])

# Each line is one of those things. The terminal in /proc/[pid]/stat is the controlling one.
_LOOK = """
echo name $(tty) $(readlink /proc/self/fd/0) $(readlink /proc/$$/fd/1) $(readlink /proc/self/fd/2)
echo same $(stat -L -c %d:%i:%t:%T /proc/self/fd/0) $(stat -c %d:%i:%t:%T $(tty)) end
echo devpts $(stat -L -c %d /proc/self/fd/0) $(stat -c %d /dev/pts) end
read -r pid name state parent group session terminal foreground rest < /proc/$$/stat
echo leader $pid $session $group $foreground end
echo controls $((terminal & 0xff | terminal >> 12 & 0xfff00)) $((0x$(stat -c %T $(tty)))) end
echo owner $(stat -c %u $(tty)) $(id -u) end
echo to the terminal itself > /dev/tty
before=$(ls /dev/pts | wc -l); exec 5<>/dev/ptmx; after=$(ls /dev/pts | wc -l)
echo another $((after - before)) $(stat -c %u /dev/pts/$(ls /dev/pts | grep -v ptmx | tail -n 1)) end
echo ov''er
"""


async def pod_of(real: Real, user_namespace: bool) -> tuple[str, dict[str, Any]]:
    """A pod, and what its containers' configurations have to say of it."""
    config = user_pod(real, network=pb.NODE) if user_namespace else real.pod_config(network=False)
    return await real.pod(config), {"namespace_options": config.linux.security_context.namespace_options}


def configured(uid: int, modes: dict[str, Any]) -> pb.LinuxContainerConfig:
    security = pb.LinuxContainerSecurityContext(run_as_user=pb.Int64Value(value=uid), **modes)
    return pb.LinuxContainerConfig(security_context=security)


def check(seen: bytes) -> None:
    lines = [line.split() for line in seen.decode().replace("\r", "").splitlines()]
    said = {words[0]: words[1:] for words in lines if words}
    name, *links = said["name"]
    assert name.startswith("/dev/pts/")
    assert links == [name] * 3
    for what in ("same", "devpts", "controls", "owner"):
        one, other, end = said[what]
        assert (one, end) == (other, "end"), what
    pid, *others, _ = said["leader"]
    assert others == [pid] * 3
    assert ["to", "the", "terminal", "itself"] in lines
    assert said["another"] == ["1", said["owner"][0], "end"]


@EACH
@USERS
async def test_of_an_exec(real: Real, user_namespace: bool, uid: int) -> None:
    pod, modes = await pod_of(real, user_namespace)
    container = await real.run(pod, "sleep", "1000", linux=configured(uid, modes))
    async with spdy(await exec_url(real, container, "sh", "-c", _LOOK, tty=True, stdin=True)) as client:
        streams = await client.command("stdin", "stdout", "resize")
        check(await streams["stdout"].until(b"over\r\n"))


@EACH
@USERS
async def test_of_a_container(real: Real, user_namespace: bool, uid: int) -> None:
    pod, modes = await pod_of(real, user_namespace)
    console = "echo console $(stat -c %t:%T:%u /dev/console) $(stat -c %t:%T:%u $(tty)) end; echo x > /dev/console"
    command = ("sh", "-c", f"read -r go; {console}; {_LOOK}")
    container = await real.run(pod, *command, tty=True, stdin=True, linux=configured(uid, modes))
    async with spdy(await attach_url(real, container, tty=True, stdin=True)) as client:
        streams = await client.command("stdin", "stdout", "resize")
        await streams["stdin"].write(b"\n")
        seen = await streams["stdout"].until(b"over\r\n")
        check(seen)
    assert (await real.ended(container)).exit_code == 0
    shown = next(line.split() for line in seen.decode().splitlines() if line.startswith("console "))
    assert shown[1] == shown[2]
    assert b"\nx\r\n" in seen


def _raw(body: bytes) -> bytes:
    return body


def _cooked(body: bytes) -> bytes:
    return body.replace(b"\n", b"\r\n")


@pytest.mark.parametrize(("modes", "expected"), [("raw", _raw), ("-echo", _cooked)])
async def test_the_log_has_every_byte(real: Real, modes: str, expected: Callable[[bytes], bytes]) -> None:
    """Of any bytes, in writes of any size, the last right before the end; more than the terminal's buffers hold."""
    pod = await real.pod(real.pod_config(network=False))
    script = f"stty {modes}; cat /in/body; tail -c 5000 /in/body; printf %s last"
    for number, size in enumerate((1, 4095, 4096, 12_289, 65_537, 1_000_000)):
        body = os.urandom(size // 2) + b"\n" * 3 + os.urandom(size // 4).replace(b"\n", b"") + b"\r\n"
        directory = real.logs.parent / f"in{number}"
        directory.mkdir()
        (directory / "body").write_bytes(body)
        mounts = [pb.Mount(container_path="/in", host_path=str(directory), readonly=True)]
        names = [f"{number}-{again}" for again in range(3)]
        made = await asyncio.gather(
            *(real.run(pod, "sh", "-c", script, name=name, tty=True, mounts=mounts) for name in names)
        )
        for name, container in zip(names, made, strict=True):
            assert (await real.ended(container)).exit_code == 0
            assert content((real.logs / f"{name}.log").read_bytes()) == expected(body + body[-5000:]) + b"last"

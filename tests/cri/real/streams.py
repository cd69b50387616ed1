"""Streaming calls of a real cribd."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.streaming.client import Channels, Spdy


async def exec_url(real: Real, container: str, *command: str, tty: bool = False, stdin: bool = False) -> str:
    request = pb.ExecRequest(container_id=container, cmd=command, tty=tty, stdin=stdin, stdout=True, stderr=not tty)
    return str((await real.client.Exec(request)).url)


async def attach_url(real: Real, container: str, *, tty: bool = False, stdin: bool = False) -> str:
    request = pb.AttachRequest(container_id=container, tty=tty, stdin=stdin, stdout=True, stderr=not tty)
    return str((await real.client.Attach(request)).url)


async def forward_url(real: Real, pod: str, *ports: int) -> str:
    return str((await real.client.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod, port=ports))).url)


@asynccontextmanager
async def spdy(url: str, *protocols: str, windows: bool = False, method: str = "POST") -> AsyncIterator[Spdy]:
    client = await Spdy(windows).connect(url, protocols or ("v4.channel.k8s.io",), method)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def channels(url: str, protocol: str = "v5.channel.k8s.io", method: str = "GET") -> AsyncIterator[Channels]:
    client = await Channels(protocol).connect(url, method)
    try:
        yield client
    finally:
        await client.close()

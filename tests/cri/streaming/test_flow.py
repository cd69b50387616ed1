"""Flows between a client's stream and a descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from types import SimpleNamespace
from typing import cast

import pytest

from cri.streaming.flow import Inflow, Link

pytestmark = pytest.mark.asyncio


async def test_no_watch_is_left_behind() -> None:
    """A socket that is written to by a duplicate stays open when that is closed; its events are nobody's then."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    idle, writing = os.pipe()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        fd = os.dup(ours.fileno())
        nothing = SimpleNamespace(waiting=lambda size: None, consumed=lambda stream, size: None)
        inflow = Inflow(cast(Link, nothing), 1)
        inflow.open(fd)
        inflow.feed(bytes(4 << 20))
        inflow.end()
        while not inflow.ended.is_set():
            await loop.sock_recv(theirs, 1 << 20)
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.dup2(writing, fd)
        woken: list[int] = []
        loop.add_writer(fd, woken.append, fd)
        for _ in range(5):
            await asyncio.sleep(0)
        loop.remove_writer(fd)
        assert woken == []
    for each in (fd, idle, writing):
        os.close(each)

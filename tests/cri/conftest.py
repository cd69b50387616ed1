"""cribd's API over a real socket, on fake rooms."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cri.config import Config, LimitsSection
from cri.daemon.serve import listen, make_server
from cri.node import Node
from cri.recovery import recover
from cri.state.store import Store
from cri.streaming.server import StreamingServer
from cri.translate.defaults import Host
from runtime.linux.probe import Probes
from tests.cri.client import Client
from tests.cri.fakes import FakeCgroups, FakeEngine, FakeImages, FakeNetwork, FakePins, World, image


@dataclass
class Served:
    """A cribd on fakes, and a client of it."""

    node: Node
    client: Client
    world: World
    images: FakeImages
    network: FakeNetwork


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def images(world: World) -> FakeImages:
    return FakeImages(world, image("busybox"))


Start = Callable[[], Any]


@pytest.fixture
def cribd(tmp_path: Path, world: World, images: FakeImages) -> Start:
    """Starts a cribd in this process; `async with cribd() as served`. Again, for one that finds what the last left."""

    @asynccontextmanager
    async def start() -> AsyncIterator[Served]:
        root, state = tmp_path / "root", tmp_path / "state"
        root.mkdir(exist_ok=True)
        state.mkdir(exist_ok=True)
        limits = LimitsSection(workers=8, pulls=2, kill_timeout_s=0.4, exec_drain_s=0.2, start_timeout_s=5)
        config = Config(listen=f"unix://{tmp_path}/s", root=str(root), state=str(state), limits=limits)
        engine, network = FakeEngine(world), FakeNetwork(world)
        made: Any = Node  # which takes the real rooms' classes, or what has their methods
        node = made(
            config,
            Store(root / "state.db"),
            engine,
            images,
            network,
            FakeCgroups(world),
            FakePins(world),
            Host(),
        )
        node.cgroups.create(node.cgroup_parent, None)  # as main does, for the monitors
        world.own_cgroups.add(node.cgroup_parent)
        await recover(node)
        server = make_server(node, Probes(**dict.fromkeys(Probes.__dataclass_fields__, True)), StreamingServer(node))
        await listen(server, config)
        client = Client(config.listen)
        try:
            yield Served(node, client, world, images, network)
        finally:
            await client.close()
            await server.stop(1)
            await node.close(5)
            engine.close()

    return start


@pytest_asyncio.fixture
async def served(cribd: Start) -> AsyncIterator[Served]:
    async with cribd() as one:
        yield one

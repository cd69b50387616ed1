"""What a monitor hears of a start on its way, without a start."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from runtime.zygote.adoption import Adoptions
from runtime.zygote.container import Container, Process
from runtime.zygote.containers import Containers
from runtime.zygote.execs import Execs
from runtime.zygote.hold import Holds
from runtime.zygote.podspace import PodSpace
from runtime.zygote.server import Server


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[tuple[Server, Containers, Execs]]:
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    server, space, holds = Server(directory, lambda *_: None, lambda _: None), PodSpace(), Holds()
    adoptions = Adoptions(directory)
    containers = Containers(server, space, holds, adoptions, directory)
    yield server, containers, Execs(server, space, holds, adoptions, containers)
    server.close()
    space.shm = os.dup(directory)
    space.close()
    os.close(directory)


@pytest.mark.parametrize("kind", ["container", "exec"])
def test_a_socket_that_a_child_still_has_is_not_taken_for_the_next_one(
    monitor: tuple[Server, Containers, Execs], kind: str
) -> None:
    """It would be read though nothing is there, and the monitor would wait for ever."""
    server, containers, execs = monitor
    with ExitStack() as stack:
        asker = stack.enter_context(socket.socket(socket.AF_UNIX))
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = mine.fileno()
        stack.callback(os.close, os.dup(number))  # as a child has that is cloned at this moment
        if kind == "container":
            fields = {"id": "c", "own_pid": True, "watches": False, "cgroup": "/c", "kill_dirs": ()}
            process: Process = Container(
                asker, 1, mine, fields | {"memory_events": "", "stdin": False, "stdin_once": False}
            )
            server.watch(number, lambda: containers._started(process, number))  # type: ignore[arg-type]
        else:
            process = Process(asker, 1, mine)
            server.watch(number, lambda: execs._started("e", process, number))
        theirs.close()
        server.turn(1)
        assert process.sync is None
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(one)
        stack.enter_context(other)
        assert one.fileno() == number
        heard: list[int] = []
        server.watch(number, lambda: heard.append(number))
        server.turn(0.05)
        assert not heard
        server.unwatch(number)

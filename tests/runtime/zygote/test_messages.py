"""The messages between cribd, zygote and monitors: sizes, descriptors, and what is refused."""

from __future__ import annotations

import hashlib
import os
import socket

import pytest

from runtime.plan.plan import KINDS as STEPS
from runtime.zygote import child  # noqa: F401 - which knows every step
from runtime.zygote.messages import KINDS, LIMIT_BYTES, VERSION, Kind, OtherVersion, ProtocolError, pack, receive, send

PROTOCOLS = {5: "20228e6cfff5e913"}
"""By VERSION: a digest of the kinds of messages, and of the steps of plans with their fields."""


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@pytest.mark.parametrize("size", [0, 100, 59_000, 61_000, 1_000_000])
def test_any_size_arrives_whole(size: int) -> None:
    left, right = pair()
    with left, right:
        send(left, Kind.START, n=1, text="x" * size)
        message = receive(right)
        assert message == (Kind.START, {"n": 1, "text": "x" * size}, [])


def test_one_beyond_the_limit_is_not_sent() -> None:
    left, right = pair()
    with left, right:
        with pytest.raises(OSError, match="long"):
            send(left, Kind.START, n=1, plan=bytes(LIMIT_BYTES))
        send(left, Kind.FACTS, n=2)
        assert receive(right) == (Kind.FACTS, {"n": 2}, [])


def test_descriptors_come_along_and_are_close_on_exec() -> None:
    left, right = pair()
    read, write = os.pipe()
    with left, right:
        send(left, Kind.EXEC, (write,), n=1, text="x" * 100_000)
        os.close(write)
        message = receive(right)
        assert message is not None
        (received,) = message[2]
        assert not os.get_inheritable(received)
        os.write(received, b"hello")
        os.close(received)
    assert os.read(read, 9) == b"hello"
    os.close(read)


def test_the_end_of_the_stream_is_none() -> None:
    left, right = pair()
    left.close()
    with right:
        assert receive(right) is None


@pytest.mark.parametrize(
    "data",
    [
        b"not marshalled",
        pack([]),
        pack({}),
        pack({"v": VERSION}),
        pack({"v": VERSION + 1, "k": "ok"}),
        pack({"k": "ok"}),
        pack({"v": VERSION, "k": "nonsense"}),
        pack({"v": VERSION, "k": "ok", "big": 5}),
        pack({"v": VERSION, "k": "ok"})[:-1],
        b"\xff",
    ],
)
def test_what_is_none_of_ours_is_refused(data: bytes) -> None:
    left, right = pair()
    with left, right:
        left.send(data)
        with pytest.raises(ProtocolError):
            receive(right)


@pytest.mark.parametrize(("size", "sealed"), [(10, False), (LIMIT_BYTES + 1, True)])
def test_a_memfd_that_could_change_or_is_too_big_is_refused(size: int, sealed: bool) -> None:
    import fcntl

    left, right = pair()
    memfd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, size)
    if sealed:
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, 0xF)
    before = set(os.listdir("/proc/self/fd"))
    with left, right:
        socket.send_fds(left, [pack({"v": VERSION, "k": "ok", "big": size})], [memfd])
        with pytest.raises(ProtocolError):
            receive(right)
        assert set(os.listdir("/proc/self/fd")) == before | {str(left.fileno()), str(right.fileno())} & before
    os.close(memfd)


def test_another_versions_message_can_be_answered() -> None:
    left, right = pair()
    with left, right:
        left.send(pack({"v": VERSION + 1, "k": "never heard of", "n": 7, "what": "ever"}))
        with pytest.raises(OtherVersion, match=f"version {VERSION + 1}") as caught:
            receive(right)
        assert caught.value.number == 7


def test_what_monitors_are_told_changes_with_the_version_only() -> None:
    """Monitors outlive the cribd that made them: a later one sends them its messages and its plans."""
    ours = (step for step in STEPS.values() if step.__module__.startswith("runtime."))
    steps = sorted((step.__name__, *step.fields) for step in ours)
    digest = hashlib.sha256(repr((sorted(KINDS), steps)).encode()).hexdigest()[:16]
    assert PROTOCOLS.get(VERSION) == digest, (
        "the messages or the steps of plans have changed: raise VERSION in runtime/zygote/messages.py and give the new "
        "digest here, for a monitor of the earlier build fails with what it doesn't know. Only where "
        "nothing that was there has changed, and what is new goes out only for requests that an earlier cribd didn't "
        "know (a step or a kind of its own, no field of an old one), or what is gone is no longer sent, it's enough to "
        "give the new digest"
    )

"""Pins of network namespaces, as ip(8) sees them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable

import pytest

from net.errors import InvalidSpec, Unavailable
from net.netns import Pins
from tests.net.namespaces import Namespace
from tests.requires import requires

pytestmark = requires("root", "ip")

NewNamespace = Callable[[], Namespace]


def known_to_ip() -> set[str]:
    done = subprocess.run(["ip", "-j", "netns", "list"], check=True, capture_output=True, text=True)
    return {entry["name"] for entry in json.loads(done.stdout or "[]")}


def test_pin_and_unpin(pins: Pins, new_namespace: NewNamespace) -> None:
    namespace = new_namespace()
    path = pins.pin(namespace.fd, "crib-a")
    assert path == "/run/netns/crib-a"
    assert pins.pin(namespace.fd, "crib-a") == path, "again is the same"
    assert "crib-a" in known_to_ip()
    assert pins.list_pins("crib-") == [path]
    inode = os.fstat(namespace.fd).st_ino
    namespace.end()
    assert os.stat(path).st_ino == inode, "the pin holds it"
    pins.unpin(path)
    pins.unpin(path)
    assert "crib-a" not in known_to_ip()
    assert pins.list_pins("crib-") == []


def test_a_name_that_is_taken(pins: Pins, new_namespace: NewNamespace) -> None:
    one, other = new_namespace(), new_namespace()
    path = pins.pin(one.fd, "crib-a")
    try:
        with pytest.raises(Unavailable, match="crib-a: holds another namespace"):
            pins.pin(other.fd, "crib-a")
    finally:
        pins.unpin(path)


def test_a_pin_that_was_interrupted(pins: Pins, new_namespace: NewNamespace) -> None:
    namespace = new_namespace()
    path = "/run/netns/crib-a"
    os.close(os.open(path, os.O_CREAT, 0o444))
    assert pins.list_pins("crib-a") == [path]
    assert pins.pin(namespace.fd, "crib-a") == path
    pins.unpin(path)
    os.close(os.open(path, os.O_CREAT, 0o444))
    pins.unpin(path)
    assert pins.list_pins("crib-a") == []


def test_ip_netns_add_does_not_hide_a_pin(pins: Pins, new_namespace: NewNamespace) -> None:
    path = pins.pin(new_namespace().fd, "crib-a")
    subprocess.run("ip netns add theirs".split(), check=True)
    subprocess.run("ip netns delete theirs".split(), check=True)
    pins.unpin(path)
    assert not os.path.exists(path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_names_that_are_none(pins: Pins, name: str) -> None:
    with pytest.raises(InvalidSpec):
        pins.pin(0, name)


def test_a_descriptor_that_is_no_namespace(pins: Pins) -> None:
    with open("/proc/self/mounts") as other, pytest.raises(InvalidSpec, match="crib-a"):
        pins.pin(other.fileno(), "crib-a")
    with open("/proc/self/ns/mnt") as other, pytest.raises(InvalidSpec, match=r"crib-a: .* no network namespace"):
        pins.pin(other.fileno(), "crib-a")
    assert pins.list_pins("crib-") == []

"""hack/up and hack/down, as somebody who has just cloned the repository runs them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.limits import scaled
from tests.requires import requires

ROOT = Path(__file__).resolve().parents[2]
CRIB = ROOT / ".venv/bin/crib"
NAME = f"crib-test-{os.getpid()}-up"
STATE, DATA = Path("/run", NAME), Path("/var/lib", NAME)

real = requires("root", "bridge", "busybox", "nft", "overlay", "seccomp")


@pytest.fixture
def here() -> Iterator[None]:
    """An instance of the tests' own; whatever becomes of the test, hack/down is the last word."""
    yield
    if STATE.exists() or DATA.exists():
        hack("down")


def hack(name: str, code: int = 0, **environment: str) -> str:
    """All that the script prints; fails unless it ends with `code`."""
    done = subprocess.run(
        [ROOT / "hack" / name],
        cwd="/",
        env=os.environ | {"CRIB_UP": NAME} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=scaled(300),
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def crib(*arguments: str) -> str:
    environment = os.environ | {"CRIB_ENDPOINT": f"unix://{STATE}/crib.sock"}
    return subprocess.run([CRIB, *arguments], env=environment, capture_output=True, text=True, check=True).stdout


@real
@pytest.mark.timeout(scaled(400))
def test_up_twice_and_down_twice(here: None) -> None:
    shown = hack("up")
    [pod] = json.loads(crib("pods", "-o", "json"))
    [address] = pod["addresses"]
    assert f"my address: {address}/" in shown, "the log"
    assert shown.count(address) >= 2, "the pods"
    assert "execute sh" in shown and "from call to answer" in shown, "the timeline"
    for hint in ("crib ps", f"crictl -r unix://{STATE}/crib.sock -i ", "./hack/down"):
        assert hint in shown

    again = hack("up")
    assert again.count("runs already") == 2 and "is there already" in again
    assert [one["id"] for one in json.loads(crib("pods", "-o", "json"))] == [pod["id"]]

    assert "all is gone" in hack("down")
    assert "nothing is there" in hack("down")


@real
@pytest.mark.timeout(scaled(400))
def test_down_removes_pods_that_outlived_their_cribd(here: None) -> None:
    hack("up")
    cribd = os.pidfd_open(int((STATE / "cribd.pid").read_text()))
    signal.pidfd_send_signal(cribd, signal.SIGKILL)
    assert select.select([cribd], [], [], 30)[0]
    os.close(cribd)
    assert "starting it once more" in hack("down")
    assert not STATE.exists() and not DATA.exists()


@real
def test_up_says_why_cribd_does_not_start(here: None) -> None:
    blocked = DATA / "net"
    DATA.mkdir(mode=0o700)
    blocked.write_text("not a directory")
    shown = hack("up", code=1)
    assert "hack/up: cribd doesn't answer" in shown and f"The end of {STATE}/cribd.log:" in shown
    assert "cribd doesn't answer: see the end of" in hack("down", code=1)
    blocked.unlink()
    assert "all is gone" in hack("down")


@pytest.mark.parametrize("name", ["up", "down"])
def test_without_root(name: str) -> None:
    if os.geteuid() != 0:
        assert "run it as root" in hack(name, code=1).lower()
        return
    command = ["setpriv", "--reuid=65534", "--clear-groups", str(ROOT / "hack" / name)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "run it as root" in done.stderr.lower()

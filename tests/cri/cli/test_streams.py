"""`crib exec`, `attach` and `port-forward` against a real cribd: with pipes, on terminals, and however they end."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cri.cli.conftest import LIMIT_S, Crib
from tests.cri.cli.fake import IMAGE
from tests.cri.cli.terminal import Terminal
from tests.cri.real.daemon import REPOSITORY, Daemon
from tests.limits import scaled
from tests.requires import need, requires

pytestmark = requires("root", "bridge", "busybox", "overlay", "seccomp")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("root", "busybox")
    path = tmp_path_factory.mktemp("image") / "busybox.tar"
    subprocess.run([sys.executable, REPOSITORY / "hack/busybox-image", path, "--name", IMAGE], check=True)
    return path


@pytest.fixture(scope="module")
def daemon(archive: Path) -> Iterator[Daemon]:
    directory = Path(f"/run/crib-test-{os.getpid()}-streams")
    directory.mkdir(mode=0o700)
    made = Daemon(directory)
    made.start()
    Crib(made.listen, directory)("load", str(archive))
    yield made
    assert made.stop() == 0, made.log()
    shutil.rmtree(directory)


@pytest.fixture
def crib(daemon: Daemon, tmp_path: Path) -> Iterator[Crib]:
    crib = Crib(daemon.listen, tmp_path / "logs")
    yield crib
    if crib.json("pods"):
        crib("rm", "-f", "--all")


@pytest.fixture
def box(crib: Crib) -> str:
    """A container that sleeps; its name."""
    crib("run", "-d", "--name", "box", IMAGE, "sleep", "100000")
    return "box"


def processes(crib: Crib, container: str) -> str:
    return crib("exec", container, "ps", "-o", "args")


# Exec, with pipes


def test_exec_shows_output_as_it_comes(crib: Crib, box: str) -> None:
    script = "echo first; read -r line; echo got $line; exit 9"
    command = crib.command("exec", "-i", box, "sh", "-c", script)
    with subprocess.Popen(command, env=crib.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == b"first\n"
        process.stdin.write(b"it\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got it\n"
        assert process.wait(LIMIT_S) == 9


def test_exec_passes_every_byte_and_the_end_of_input(crib: Crib, box: str) -> None:
    body = os.urandom(3 << 20)
    done = crib.full("exec", "-i", box, "sh", "-c", "tee /dev/stderr", stdin=body)
    assert done.stdout == body
    assert done.stderr == body


def test_exec_input_from_a_file_and_from_nowhere(crib: Crib, box: str, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file:
        shown = subprocess.check_output(crib.command("exec", "-i", box, "sha256sum"), env=crib.environment, stdin=file)
    assert shown.split()[0].decode() == hashlib.sha256(path.read_bytes()).hexdigest()
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *crib.command("exec", "-i", box, "wc", "-c")]
    assert subprocess.check_output(closed, env=crib.environment, timeout=LIMIT_S).split() == [b"0"]


def test_exec_without_input_reads_none(crib: Crib, box: str) -> None:
    assert crib("exec", box, "wc", "-c", stdin=b"mine") == "0\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exec_ended_by_a_signal_ends_the_command(crib: Crib, box: str, number: signal.Signals) -> None:
    with crib.popen("exec", box, "sh", "-c", "echo up; sleep 4321") as process:
        assert process.stdout and process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(LIMIT_S) == 128 + number
        assert process.stderr and process.stderr.read() == b""
    until(lambda: "sleep 4321" not in processes(crib, box))


def test_exec_whose_output_nobody_reads_ends_by_a_signal(crib: Crib, box: str) -> None:
    with crib.popen("exec", box, "yes", "4321") as process:
        assert process.stdout and process.stdout.read(100)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM
    until(lambda: "yes 4321" not in processes(crib, box))


def test_exec_that_fails(crib: Crib, box: str) -> None:
    assert "no-such-program" in crib.error("exec", box, "no-such-program", code=1)
    assert "no command" in crib.error("exec", "-it", box, code=2)
    assert "no terminal" in crib.error("exec", "-it", box, "sh", code=2)
    assert "--timeout" in crib.error("exec", "-i", "--timeout", "1", box, "sh", code=2)
    assert "nothing" in crib.error("exec", "-i", "nothing", "sh", code=3)


# Exec, on a terminal


def test_exec_on_a_terminal(crib: Crib, box: str) -> None:
    with Terminal(crib, "exec", "-it", box, "sh") as terminal:
        terminal.until("# ")
        assert terminal.modes() != terminal.before
        terminal.type("stty size; tty\r")
        terminal.until("24 80\r\n/dev/pts/0\r\n")
        terminal.resize(33, 111)
        terminal.until("# ")
        terminal.type("stty size\r")
        terminal.until("33 111\r\n")
        terminal.type("trap 'echo cau''ght; exit 5' INT; echo rea''dy; while :; do sleep 0.1; done\r")
        terminal.until("ready")
        terminal.type("\x03")  # the other side's
        terminal.until("caught")
        assert terminal.end() == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_leaves_the_terminal_as_it_was(crib: Crib, box: str, number: signal.Signals) -> None:
    with Terminal(crib, "exec", "-it", box, "sh", "-c", "echo rea''dy; sleep 4321") as terminal:
        terminal.until("ready")
        assert terminal.modes() != terminal.before
        terminal.process.send_signal(number)
        assert terminal.end() == 128 + number
    until(lambda: "sleep 4321" not in processes(crib, box))


def test_a_container_that_ends_leaves_the_terminal_as_it_was(crib: Crib, box: str) -> None:
    with Terminal(crib, "exec", "-it", box, "sh", "-c", "echo rea''dy; sleep 4321") as terminal:
        terminal.until("ready")
        crib("stop", "-t", "0", box)
        assert terminal.end() == 137


@pytest.fixture
def mortal(archive: Path, run_dir: Path) -> Iterator[tuple[Daemon, Crib]]:
    """A cribd that may be killed, with a container `box` that answers on port 8080 with what it is sent."""
    daemon = Daemon(run_dir)
    daemon.start()
    crib = Crib(daemon.listen, run_dir / "logs")
    crib("load", str(archive))
    crib("run", "-d", "--name", "box", IMAGE, "nc", "-ll", "-p", "8080", "-e", "cat")
    until(lambda: ":1F90 " in crib("exec", "box", "cat", "/proc/net/tcp", "/proc/net/tcp6"))
    yield daemon, crib
    if daemon.process is None:
        daemon.start()
    crib("rm", "-f", "--all")
    assert daemon.stop() == 0, daemon.log()


def test_a_cribd_that_is_gone_leaves_the_terminal_as_it_was(mortal: tuple[Daemon, Crib]) -> None:
    daemon, crib = mortal
    with Terminal(crib, "exec", "-it", "box", "sh", "-c", "echo rea''dy; sleep 4321") as terminal:
        terminal.until("ready")
        daemon.kill()
        assert terminal.end() == 4
        terminal.until("has ended before the command did")


# Attach


def test_attach_to_a_terminal_and_detach(crib: Crib) -> None:
    crib("run", "-dit", "--name", "shell", IMAGE, "sh")
    with Terminal(crib, "attach", "shell") as terminal:
        terminal.until("Ctrl-P Ctrl-Q detaches")
        terminal.type("stty size; x=kept; echo o''ne\r")
        terminal.until("24 80\r\none\r\n")
        terminal.type("\x10\x10")  # the first is one of the shell's keys, and the second may be of ours
        terminal.type("\x03")
        terminal.type("\x10")
        terminal.type("\x11")
        assert terminal.end() == 0
    with Terminal(crib, "attach", "shell") as terminal:
        terminal.until("detaches")
        terminal.type("echo $x; exit 6\r")
        terminal.until("kept\r\n")
        assert terminal.end() == 6


def test_attach_without_a_terminal(crib: Crib) -> None:
    script = "while read -r line; do echo got $line; echo err $line >&2; [ $line != end ] || exit 4; done"
    crib("run", "-di", "--name", "talker", IMAGE, "sh", "-c", script)
    with crib.popen("attach", "--no-stdin", "talker") as watcher:
        assert watcher.stdout and watcher.stderr
        until(lambda: attached(crib, watcher))
        done = crib.full("attach", "talker", stdin=b"a\nend\n", code=4)
        assert done.stdout == b"got a\ngot end\n"
        assert done.stderr == b"err a\nerr end\n"
        assert watcher.stdout.read() == b"got a\ngot end\n"
        assert watcher.stderr.read() == b"err a\nerr end\n"
        assert watcher.wait(LIMIT_S) == 4
    assert "not running" in crib.error("attach", "talker", code=1)


def attached(crib: Crib, watcher: subprocess.Popen[bytes]) -> bool:
    """Whether it has a TCP connection, and cribd has told the monitor."""
    sockets = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{watcher.pid}/fd") if _is_socket(entry.path)]
    table = Path(f"/proc/{watcher.pid}/net/tcp").read_text().splitlines()[1:]
    inodes = {f"socket:[{line.split()[9]}]" for line in table if line.split()[3] == "01"}
    if not inodes.intersection(sockets):
        return False
    crib("exec", "talker", "true")  # asked of the monitor after the attachment
    return True


def _is_socket(path: str) -> bool:
    try:
        return os.readlink(path).startswith("socket:")
    except FileNotFoundError:
        return False


# Port-forward


@pytest.fixture
def forwarded(crib: Crib) -> Iterator[Callable[..., int]]:
    """Starts `crib port-forward`; the port here."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> int:
        process = subprocess.Popen(
            crib.command("port-forward", *arguments),
            env=crib.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        running.append(process)
        assert process.stdout
        line = process.stdout.readline().decode()
        match = re.fullmatch(r"forwarding 127\.0\.0\.1:(\d+) to port \d+\n", line)
        assert match, line
        return int(match[1])

    yield start
    for process in running:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130


def talk(port: int, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), scaled(20)) as sock:
        sock.sendall(body)
        sock.shutdown(socket.SHUT_WR)
        got = b""
        while part := sock.recv(65536):
            got += part
        return got


def answered(port: int) -> bytes:
    """What is said there, if the connection is not reset before."""
    try:
        return talk(port, b"is there anybody")
    except OSError as error:
        if error.errno not in (errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE):
            raise
        return b""


def test_port_forward(crib: Crib, forwarded: Callable[..., int]) -> None:
    crib("run", "-d", "--name", "web", IMAGE, "nc", "-ll", "-p", "8080", "-e", "sha256sum")
    until(lambda: ":1F90 " in crib("exec", "web", "cat", "/proc/net/tcp", "/proc/net/tcp6"))
    port = forwarded("web", "0:8080")
    body = os.urandom(5 << 20)
    assert talk(port, body).split()[0].decode() == hashlib.sha256(body).hexdigest(), "and each end by itself"
    closed = forwarded("web", "0:9")
    assert talk(closed, b"") == b""
    assert talk(port, b"").split()[0].decode() == hashlib.sha256(b"").hexdigest()


def test_port_forward_goes_on_with_the_next_cribd(mortal: tuple[Daemon, Crib]) -> None:
    daemon, crib = mortal
    with crib.popen("port-forward", "box", "0:8080") as process:
        assert process.stdout
        port = int(process.stdout.readline().split(b":")[1].split()[0])
        assert talk(port, b"one") == b"one"
        daemon.kill()
        assert not answered(port)
        daemon.start()
        assert talk(port, b"two") == b"two"


def test_logs_go_on_with_the_next_cribd(mortal: tuple[Daemon, Crib]) -> None:
    daemon, crib = mortal
    crib("run", "-d", "--name", "ticker", IMAGE, "sh", "-c", "n=0; while sleep 0.1; do n=$((n+1)); echo $n; done")
    with crib.popen("logs", "-f", "ticker") as process:
        assert process.stdout
        for number in range(1, 6):
            assert process.stdout.readline() == b"%d\n" % number
        daemon.kill()
        for number in range(6, 21):
            assert process.stdout.readline() == b"%d\n" % number
        daemon.start()
        crib("stop", "-t", "0", "ticker")
        assert process.wait(LIMIT_S) == 0


def test_port_forward_that_can_not_be(crib: Crib, box: str) -> None:
    for wrong in ("x", "0", "70000", "1:2:3", "127.0.0.1:80", "::1:80:80"):
        assert "not [[ADDRESS:]PORT:]PORT" in crib.error("port-forward", box, wrong, code=2), wrong
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in crib.error("port-forward", box, f"127.0.0.1:{port}:80", code=1)
    assert "nothing" in crib.error("port-forward", "nothing", "80", code=3)
    crib("stop", "-t", "0", box)


def until(condition: Callable[[], object]) -> None:
    """Wait for what has no event."""
    clock, end = threading.Event(), time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "never came"
        clock.wait(0.05)

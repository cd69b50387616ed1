"""The command as a person or a script runs it: a process of its own, against a cribd or the fake of one."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cri.cli.fake import IMAGE, Fake
from tests.cri.real.daemon import REPOSITORY, Daemon
from tests.limits import scaled

LIMIT_S = scaled(60)


@dataclass(frozen=True, slots=True)
class Crib:
    """Runs `crib` with its endpoint and log directory given by the environment."""

    endpoint: str
    log_dir: Path

    @property
    def environment(self) -> dict[str, str]:
        own = {"CRIB_ENDPOINT": self.endpoint, "CRIB_LOG_DIR": str(self.log_dir), "TERM": "xterm", "COLUMNS": "120"}
        return os.environ | own

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "cri.cli", *arguments]

    def __call__(self, *arguments: str, code: int = 0, stdin: bytes = b"") -> str:
        """Standard output; fails unless the command ends with `code`, and cleanly."""
        return self.full(*arguments, code=code, stdin=stdin).stdout.decode()

    def full(self, *arguments: str, code: int = 0, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            input=stdin,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == code, done
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self(*arguments, "-o", "json", code=code))

    def error(self, *arguments: str, code: int) -> str:
        """The one line on standard error of a command that fails."""
        text = self.full(*arguments, code=code).stderr.decode()
        assert text.count("\n") == 1 and text.endswith("\n"), text
        return text.rstrip("\n")

    def on_terminal(self, *arguments: str, columns: int = 120) -> str:
        """What a terminal shows."""
        master, slave = pty.openpty()
        with open(master, "rb", buffering=0) as screen:
            with open(slave, "wb", buffering=0) as terminal:
                process = subprocess.Popen(
                    self.command(*arguments),
                    env=self.environment | {"COLUMNS": str(columns)},
                    stdin=terminal,
                    stdout=terminal,
                    stderr=terminal,
                )
            shown = b""
            try:
                while chunk := screen.read(4096):
                    shown += chunk
            except OSError:  # EIO: the other side is closed
                pass
            assert process.wait(LIMIT_S) == 0, shown
        return shown.decode()

    @contextmanager
    def popen(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """The running command; it doesn't outlive the block."""
        with subprocess.Popen(
            self.command(*arguments), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    server = Fake(tmp_path / "crib.sock")
    yield server
    server.close()


@contextmanager
def loaded(name: str, scratch: Path) -> Iterator[Daemon]:
    """A cribd for a module's tests, with the busybox image; its archive is made in `scratch`."""
    directory = Path(f"/run/crib-test-{os.getpid()}-{name}")
    directory.mkdir(mode=0o700)
    daemon = Daemon(directory)
    daemon.start()
    archive = scratch / "busybox.tar"
    subprocess.run([sys.executable, REPOSITORY / "hack/busybox-image", archive, "--name", IMAGE], check=True)
    Crib(daemon.listen, directory)("load", str(archive))
    yield daemon
    assert daemon.stop() == 0, daemon.log()
    shutil.rmtree(directory)


@pytest.fixture
def crib(fake: Fake, tmp_path: Path) -> Crib:
    return Crib(fake.endpoint, tmp_path / "logs")


@pytest.fixture
def running(crib: Crib) -> Callable[..., str]:
    """Starts a named container in the background; its id."""

    def start(name: str, script: str = "exec sleep 1000", *options: str) -> str:
        return crib("run", "-d", "--name", name, *options, IMAGE, "sh", "-c", script).strip()

    return start

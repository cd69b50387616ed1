"""A cribd of the tests' own: its process, its directories, a client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from cri.api import crib_pb2
from tests.cri.client import Client
from tests.limits import scaled

TIMEOUT_S = scaled(30)
IMAGE = "localhost/crib/busybox:latest"
BUILTIN = '[network]\nplugin = "builtin"\n'  # whatever the machine has in /etc/cni
REPOSITORY = Path(__file__).resolve().parents[3]
RUNTIME = os.environ.get("CRIB_TEST_RUNTIME", "")
"""An OCI runtime's program that runs all containers, in place of the built-in engine: to test the tests."""


class Daemon:
    """`start` returns when cribd is ready; `stop` ends it as systemd would, `kill` as a crash does.

    `prefix` is a command that ends by executing the words after it; `code` holds the packages; `root` is cribd's, in
    `directory` unless it is given.
    """

    def __init__(
        self,
        directory: Path,
        config: str = BUILTIN,
        prefix: tuple[str, ...] = (),
        code: Path = REPOSITORY,
        root: Path | None = None,
    ) -> None:
        self.directory = directory
        self.root = root or directory / "root"
        self.state = directory / "state"
        self.listen = f"unix://{directory}/s"
        self.config = directory / "config.toml"
        handler = f'\n[handlers.""]\npath = "{RUNTIME}"\n' if RUNTIME else ""
        self.config.write_text(config + handler)
        self.prefix = prefix
        self.code = code
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def arguments(self) -> list[str]:
        where = ["--config", str(self.config), "--root", str(self.root), "--state", str(self.state)]
        return [
            *self.prefix,
            sys.executable,
            "-m",
            "cri.daemon",
            *where,
            "--listen",
            self.listen,
            "--log-level",
            "debug",
        ]

    def start(self) -> None:
        notify = self.directory / "notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, open(self.directory / "log", "ab") as log:
            ready.bind(str(notify))
            ready.settimeout(TIMEOUT_S)
            environment = os.environ | {"NOTIFY_SOCKET": str(notify)}
            self.process = subprocess.Popen(self.arguments, stderr=log, cwd=self.code, env=environment)
            try:
                assert ready.recv(100) == b"READY=1"
            except TimeoutError:
                self.kill()  # whoever could stop it is told that there is none
                raise AssertionError(self.log()) from None

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self._wait()

    def _wait(self) -> int:
        assert self.process is not None
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(TIMEOUT_S)
            raise
        finally:
            self.process = None

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def client(self) -> Client:
        return Client(self.listen)


async def load_image(client: Client, archive: bytes) -> None:
    """Have the busybox image in the store."""

    async def chunks() -> object:
        for at in range(0, len(archive), 1 << 20):
            yield crib_pb2.LoadRequest(chunk=archive[at : at + (1 << 20)])

    await client.Load(chunks())

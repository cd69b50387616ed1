"""A registry on loopback that serves a storage directory without writing to it: Debian's docker-registry."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: "{storage}"}}
  maintenance: {{uploadpurging: {{enabled: false}}, readonly: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
_START_S = 20


class SetupError(Exception):
    """What a run needs is missing or didn't start; the message says what to do."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until it answers. Retried by connecting: docker-registry announces nothing."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/v2/", timeout=5):
                return
        else:
            raise SetupError(f"docker-registry ended with status {process.returncode}: {log.read_text()[-500:]}")
    raise SetupError(f"docker-registry did not answer at {url} in {_START_S} s")


@contextlib.contextmanager
def serve(storage: Path) -> Iterator[str]:
    """The address (http://127.0.0.1:PORT) of a registry with the content of `storage`. Raises SetupError."""
    if not (storage / "docker" / "registry" / "v2").is_dir():
        raise SetupError(f"{storage} is not the storage directory of a registry: it has no docker/registry/v2")
    program = shutil.which("docker-registry")
    if program is None:
        raise SetupError("docker-registry is not on PATH; on Debian: apt-get install docker-registry")
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="crib-registry-") as directory:
        config, log = Path(directory, "config.yml"), Path(directory, "log")
        config.write_text(_CONFIG.format(storage=storage, port=port))
        with log.open("wb") as output:
            process = subprocess.Popen([program, "serve", config], stdout=output, stderr=output)
        try:
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=_START_S)

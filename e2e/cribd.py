"""A cribd with directories, socket and configuration of its own, for the time of one run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from cri.api import cri_pb2 as api
from cri.config import load
from e2e.registry import SetupError
from net import NetworkConfig, open_network
from runtime.cgroup import detect

HANDLER = "oci"
_START_S = 60
_STOP_S = 60
_CALL_S = 60


@dataclass(frozen=True, slots=True)
class Cribd:
    pid: int
    endpoint: str
    root: Path
    state: Path
    log: Path


def call(endpoint: str, method: str, **fields: Any) -> Any:
    """One call of the RuntimeService behind `endpoint`. Raises grpc.RpcError."""
    service = api.DESCRIPTOR.services_by_name["RuntimeService"]
    descriptor = service.methods_by_name[method]
    request, response = GetMessageClass(descriptor.input_type), GetMessageClass(descriptor.output_type)
    with grpc.insecure_channel(endpoint) as channel:
        stub = channel.unary_unary(
            f"/{service.full_name}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return stub(request(**fields), timeout=_CALL_S)


def remove_pods(endpoint: str) -> list[str]:
    """Stop and remove all pods; the names of those that were there."""
    left = call(endpoint, "ListPodSandbox").items
    for sandbox in left:
        call(endpoint, "StopPodSandbox", pod_sandbox_id=sandbox.id)
        call(endpoint, "RemovePodSandbox", pod_sandbox_id=sandbox.id)
    return [f"{sandbox.metadata.namespace}/{sandbox.metadata.name}" for sandbox in left]


def _mirrors(directory: Path, registry: str) -> None:
    """Every registry's images come from `registry`: containerd's hosts.toml for the host `_default`."""
    default = directory / "_default"
    default.mkdir(parents=True)
    (default / "hosts.toml").write_text(
        f'server = "{registry}"\n[host."{registry}"]\n  capabilities = ["pull", "resolve"]\n'
    )


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _wait_ready(process: subprocess.Popen[bytes], notify: socket.socket, log: Path) -> None:
    """Until cribd says READY=1, as it would to systemd."""
    end = time.monotonic() + _START_S
    notify.settimeout(0.2)
    while time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
            if "READY=1" in notify.recv(4096).decode(errors="replace").split("\n"):
                return
        if process.poll() is not None:
            raise SetupError(f"cribd ended with status {process.returncode}:\n{_tail(log)}")
    raise SetupError(f"cribd was not ready in {_START_S} s:\n{_tail(log)}")


def _take_away(settings: Path, root: Path) -> None:
    """What outlives a cribd on purpose, for its successor: bridge and address table, cgroups."""
    if not (root / "net").is_dir():  # it never came that far
        return
    config = load(settings, root=str(root))
    network = open_network(config.instance, root / "net", NetworkConfig())
    try:
        network.teardown()
    finally:
        network.close()
    cgroups = detect()
    cgroups.remove(cgroups.join_path(config.cgroup.parent or cgroups.default_parent(config.instance)))


@contextlib.contextmanager
def run(registry: str | None, log_level: str = "info", log: Path | None = None, runtime: str = "") -> Iterator[Cribd]:
    """A running cribd; with `registry`, all images come from it. Its pods, files and itself are gone afterwards.

    `log` is where its log is kept. `runtime` is the program of the handler `HANDLER`, if there is to be one. Raises
    SetupError, with the log's end.
    """
    root = Path(tempfile.mkdtemp(prefix="crib-e2e-", dir="/var/tmp"))
    state = Path(tempfile.mkdtemp(prefix="crib-e2e-", dir="/run"))
    settings, log = root / "config.toml", log or root / "cribd.log"
    settings.write_text(f'[images]\nhosts_dir = "{root / "certs.d"}"\n[network]\nplugin = "builtin"\n')
    if runtime:
        settings.write_text(f"{settings.read_text()}[handlers.{HANDLER}]\npath = '{runtime}'\n")
    if registry is not None:
        _mirrors(root / "certs.d", registry)
    endpoint = f"unix://{state / 'crib.sock'}"
    command = [str(Path(sys.executable).with_name("cribd")), "--config", str(settings), "--listen", endpoint]
    command += ["--root", str(root / "data"), "--state", str(state / "run"), "--log-level", log_level]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        stack.callback(shutil.rmtree, state, ignore_errors=True)
        notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notify.bind(str(state / "notify"))
        environment = os.environ | {"NOTIFY_SOCKET": str(state / "notify")}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            _wait_ready(process, notify, log)
            try:
                yield Cribd(process.pid, endpoint, root / "data", state / "run", log)
            finally:
                remove_pods(endpoint)
        finally:
            process.terminate()
            try:
                process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise SetupError(f"cribd did not stop in {_STOP_S} s:\n{_tail(log)}") from None
            _take_away(settings, root / "data")

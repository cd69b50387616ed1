"""What a kubelet said once, said to a cribd: recorded calls, one file of JSON lines per call, in `CRIB_RECORDED_CALLS`.

A line has the time `t`, the request `req`, the answers `resp` and the error `err`. Said again in the order of their
times, with the ids that cribd gave, host paths and cgroups of the test's own, and the test's image and command.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, message_factory

from cri.api import cri_pb2 as pb
from runtime.cgroup import detect
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import IMAGE
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay", "nft", "recordings")]
METHODS = {
    method.name: message_factory.GetMessageClass(method.input_type)
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
UNKNOWN = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OK)


def recorded() -> list[tuple[str, dict[str, Any]]]:
    calls = []
    for path in Path(os.environ["CRIB_RECORDED_CALLS"]).glob("*.jsonl"):
        calls += [(path.stem, json.loads(line)) for line in path.read_text().splitlines()]
    return sorted(calls, key=lambda call: call[1]["t"])


class Replay:
    """Requests as this machine can have them; `ids` maps recorded ids to cribd's.

    `parent` is the cgroup that all pods' are below, as a path; where `slices`, systemd's names are made of such paths.
    """

    def __init__(self, directory: Path, parent: str, *, slices: bool) -> None:
        self.directory = directory
        self.parent = parent
        self.slices = slices
        self.ids: dict[str, str] = {}

    def request(self, method: str, recorded: dict[str, Any]) -> Any:
        request: Any = METHODS[method]()
        json_format.ParseDict(recorded, request)
        for field in ("pod_sandbox_id", "container_id"):
            if hasattr(request, field):
                setattr(request, field, self.ids.get(getattr(request, field), getattr(request, field)))
        if method == "RunPodSandbox":
            self._sandbox(request.config)
        elif method == "CreateContainer":
            self._sandbox(request.sandbox_config)
            self._container(request.config)
        elif method == "ExecSync":
            request.cmd[:] = ["true"]
        return request

    def _sandbox(self, config: pb.PodSandboxConfig) -> None:
        config.log_directory = f"{self.directory}{config.log_directory}"
        if config.linux.cgroup_parent:
            config.linux.cgroup_parent = self.cgroup(config.linux.cgroup_parent)
        for mapping in config.port_mappings:
            mapping.host_port = 0

    def cgroup(self, path: str) -> str:
        """A cgroup below the test's own, as the kubelet names it with this machine's driver."""
        whole = f"{self.parent}{path}"
        if not self.slices:
            return whole
        return "-".join(part.replace("-", "_") for part in whole.strip("/").split("/")) + ".slice"

    def _container(self, config: pb.ContainerConfig) -> None:
        config.image.image = IMAGE
        config.command[:] = ["sleep", "1000"]
        del config.args[:]
        modes = config.linux.security_context.namespace_options
        modes.target_id = self.ids.get(modes.target_id, "")
        if modes.pid == pb.TARGET and not modes.target_id:  # a container that the recording doesn't have
            modes.pid = pb.CONTAINER
        for mount in config.mounts:
            mount.host_path = f"{self.directory}{mount.host_path}"
            if Path(mount.container_path).name in ("hosts", "termination-log"):
                Path(mount.host_path).parent.mkdir(parents=True, exist_ok=True)
                Path(mount.host_path).touch()


async def test_a_kubelets_calls_are_answered_as_it_needs(real: Real, tmp_path: Path) -> None:
    cgroups = detect()
    replay = Replay(tmp_path, f"/crib-test-{os.getpid()}-recorded", slices=cgroups.driver == "systemd")
    differing: list[str] = []
    said: Counter[str] = Counter()
    try:
        for method, call in recorded():
            if method == "PullImage":  # of a registry that isn't there
                continue
            request = replay.request(method, call["req"])
            code, answer = grpc.StatusCode.OK, None
            try:
                answer = await getattr(real.client, method)(request, timeout=30)
            except grpc.aio.AioRpcError as error:
                code = error.code()
                if not call["err"] and (code not in UNKNOWN or known(replay, call["req"])):
                    differing.append(f"{method} {call['req']}: {code.name}: {error.details()}, not {call['err']}")
            said[f"{method} {code.name}"] += 1
            if answer is not None:
                note(replay, method, call, answer)
                differing += [f"{method}: {text}" for text in lacking(method, answer)]
        assert not differing, "\n".join(differing)
        assert said["RunPodSandbox OK"] > 0
        assert said["StartContainer OK"] > 0
    finally:
        for item in (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items:
            await real.remove(item.id)
        cgroups.remove(cgroups.join_path(replay.cgroup("")))


def known(replay: Replay, request: dict[str, Any]) -> bool:
    """Whether what the request names was made in the recording, and here."""
    return all(request[name] in replay.ids for name in ("pod_sandbox_id", "container_id") if name in request)


def note(replay: Replay, method: str, call: dict[str, Any], answer: Any) -> None:
    if method == "RunPodSandbox" and call["resp"]:
        replay.ids[call["resp"][0]["pod_sandbox_id"]] = answer.pod_sandbox_id
    elif method == "CreateContainer" and call["resp"]:
        replay.ids[call["resp"][0]["container_id"]] = answer.container_id


def lacking(method: str, answer: Any) -> list[str]:
    """What the kubelet can't do without, and is not there."""
    needed: dict[str, Any] = {}
    if method == "Version":
        needed = {name: getattr(answer, name) for name in ("version", "runtime_name", "runtime_version")}
    elif method == "Status":
        needed = {one.type: one.status for one in answer.status.conditions} | {"handlers": answer.runtime_handlers}
    elif method == "PodSandboxStatus":
        found = answer.status
        needed = {"id": found.id, "uid": found.metadata.uid, "created_at": found.created_at}
    elif method == "ContainerStatus":
        found = answer.status
        needed = {"id": found.id, "name": found.metadata.name, "created_at": found.created_at}
        needed |= {"image": found.image.image, "image_ref": found.image_ref}
    elif method == "ImageFsInfo":
        needed = {"fs": answer.image_filesystems, "container fs": answer.container_filesystems}
    elif method in ("Exec", "Attach", "PortForward"):
        needed = {"url": answer.url}
    return [f"no {name}" for name, value in needed.items() if not value]

"""Signals, images, and whole recorded requests."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import msgspec
import pytest
from google.protobuf import json_format

from cri.api import cri_pb2 as pb
from cri.translate import image_to_cri, resolve_user, sandbox_to_pod, signals, stop_signal
from runtime.errors import InvalidSpec
from runtime.spec import Spec
from tests.cri.translate.given import container, image, spec

S = pb.Signal


@pytest.mark.parametrize(
    ("requested", "of_image", "number"),
    [
        (S.SIGNAL_RUNTIME_DEFAULT, "", signal.SIGTERM),
        (S.SIGNAL_RUNTIME_DEFAULT, "SIGQUIT", signal.SIGQUIT),
        (S.SIGNAL_RUNTIME_DEFAULT, "quit", signal.SIGQUIT),
        (S.SIGNAL_RUNTIME_DEFAULT, "3", signal.SIGQUIT),
        (S.SIGNAL_RUNTIME_DEFAULT, " SIGRTMIN+3 ", 37),
        (S.SIGNAL_RUNTIME_DEFAULT, "RTMAX-1", 63),
        (S.SIGNAL_SIGUSR1, "SIGQUIT", signal.SIGUSR1),
        (S.SIGNAL_SIGCLD, "", signal.SIGCHLD),
        (S.SIGNAL_SIGRTMIN, "", 34),
        (S.SIGNAL_SIGRTMINPLUS15, "", 49),
        (S.SIGNAL_SIGRTMAXMINUS14, "", 50),
        (S.SIGNAL_SIGRTMAX, "", 64),
        (S.SIGNAL_SIGUSR1, "nonsense", signal.SIGUSR1),
    ],
)
def test_stop_signal(requested: pb.Signal, of_image: str, number: int) -> None:
    assert stop_signal(container(stop_signal=requested), of_image) == number


@pytest.mark.parametrize("wrong", ["SIGNOPE", "0", "65", "-9", "SIGRTMIN+16", "٣"])
def test_stop_signal_of_an_image_refused(wrong: str) -> None:
    with pytest.raises(InvalidSpec, match="the image's stop signal"):
        stop_signal(container(), wrong)


def test_stop_signal_of_a_request_refused() -> None:
    with pytest.raises(InvalidSpec, match="stop_signal 99"):
        signals.from_request(99)


def test_every_signal_of_the_interface_has_a_number_and_comes_back() -> None:
    numbers = {value: signals.from_request(value) for value in S.values() if value}
    assert set(numbers.values()) == set(range(1, 65)) - {32, 33}, "those two are the C library's"
    for number in filter(None, numbers.values()):
        assert signals.from_request(signals.to_cri(number)) == number
    assert signals.to_cri(signal.SIGCHLD) == S.SIGNAL_SIGCHLD


def test_image() -> None:
    made = image_to_cri(image(user="1000:5"))
    assert made == pb.Image(
        id="sha256:" + "1" * 64,
        repo_tags=["registry.test/app:1"],
        repo_digests=["registry.test/app@sha256:" + "2" * 64],
        size=1234,
        uid=pb.Int64Value(value=1000),
    )
    assert image_to_cri(image(user="www")).username == "www"
    assert not image_to_cri(image(user="www")).HasField("uid")
    assert image_to_cri(image()).uid.value == 0
    assert image_to_cri(image()).HasField("uid")


def recorded(call: str) -> list[dict[str, object]]:
    facts = os.environ.get("CRIB_FACTS")
    if not facts:
        pytest.skip("CRIB_FACTS names no directory of recorded requests")
    lines = (Path(facts) / "kubelet-requests" / f"{call}.jsonl").read_text().splitlines()
    return [json.loads(line)["req"] for line in lines]


def test_recorded_sandboxes() -> None:
    for request in recorded("RunPodSandbox"):
        message = json_format.ParseDict(request, pb.RunPodSandboxRequest())
        made = sandbox_to_pod(message.config)
        assert made.name_key.count("_") == 3
        assert made.hostname == message.config.hostname
        assert made.cgroup_parent == message.config.linux.cgroup_parent


def test_recorded_containers() -> None:
    for request in recorded("CreateContainer"):
        message = json_format.ParseDict(request, pb.CreateContainerRequest())
        user = resolve_user(message.config.linux.security_context, "", b"root:x:0:0:root:/root:/bin/sh\n", None)
        made = spec(message.config, pod=message.sandbox_config, user=user, target_pid="/proc/9/ns/pid")
        assert msgspec.json.decode(msgspec.json.encode(made), type=Spec) == made
        assert made.process.args[: len(message.config.command)] == tuple(message.config.command)
        given = {mount.container_path for mount in message.config.mounts}
        assert given <= {mount.destination for mount in made.mounts}

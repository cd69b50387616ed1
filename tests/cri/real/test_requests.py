"""Random requests, legal by their type and otherwise anything: each is carried out, or refused with the reason.

`CRIB_EXAMPLES` multiplies how many are tried, and makes them new ones each time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import IMAGE
from tests.limits import scaled
from tests.requires import requires

MORE = int(os.environ.get("CRIB_EXAMPLES", "1"))
_EXAMPLES = 60

pytestmark = [
    pytest.mark.asyncio,
    requires("root", "busybox", "bridge", "overlay"),
    pytest.mark.timeout(scaled(120 + 120 * MORE)),
]

_WORDS = [
    "", "a", "-", ".", "..", "/", "//", "/tmp", "/etc/passwd", "/no/such", "../..", "a/b", "x" * 300, "ä €", "a\nb",
    "a\0b", "=", "0", "-1", "1-3", "0-4096", "65536", "root", "nobody", "ALL", "CAP_SYS_ADMIN", "cap_chown",
    "net.ipv4.ip_forward", "kernel.core_pattern", "kernel.shm_rmid_forced", "net/ipv4/tcp_syncookies", "memory.high",
    "pids.max", "cgroup.freeze", "2MB", "1GB", "127.0.0.1", "::1", "localhost/p", "runtime/default", "unconfined",
    "rwm", "/dev/null", "/proc", "/sys", "/proc/self/root", "/dev", "s0:c1,c2", "sh", "sleep", "true", "%s", "$(HOME)",
    "localhost", "vendor.com/device=x",
]  # fmt: skip
_NUMBERS = [
    0,
    1,
    -1,
    2,
    10,
    100,
    999,
    1000,
    1024,
    100_000,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    -(2**63),
]
_RANGES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
_LEFT_OUT = {"runtime.v1.PodSandboxConfig.windows", "runtime.v1.ContainerConfig.windows"}
words = st.sampled_from(_WORDS)


def _scalar(field: Any) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_STRING:
        return words
    if field.type == FieldDescriptor.TYPE_BYTES:
        return words.map(str.encode)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_ENUM:
        assert field.enum_type
        return st.sampled_from([*(value.number for value in field.enum_type.values), 77])
    low, high = _RANGES[field.type]
    return st.sampled_from([number for number in _NUMBERS if low <= number <= high])


def _fill(draw: Callable[[st.SearchStrategy[Any]], Any], message: Message, density: float) -> None:
    """Set some of the fields, at any depth."""
    for field in message.DESCRIPTOR.fields:
        if field.full_name in _LEFT_OUT or draw(st.floats(0, 1)) > density:
            continue
        held = getattr(message, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            held.update(draw(st.dictionaries(words, words, max_size=2)))
        elif field.is_repeated:
            for _ in range(draw(st.integers(1, 2))):
                if field.message_type:
                    _fill(draw, held.add(), 0.7)
                else:
                    held.append(draw(_scalar(field)))
        elif field.message_type:
            held.SetInParent()
            _fill(draw, held, density)
        else:
            setattr(message, field.name, draw(_scalar(field)))


@st.composite
def pods(draw: Any) -> pb.PodSandboxConfig:
    config = pb.PodSandboxConfig()
    _fill(draw, config, draw(st.sampled_from([0.05, 0.1, 0.3])))
    return usual_pod(config) if draw(st.floats(0, 1)) < 0.9 else config


def usual_pod(config: pb.PodSandboxConfig) -> pb.PodSandboxConfig:
    """With what a pod can't do without."""
    config.metadata.MergeFrom(pb.PodSandboxMetadata(name="p", namespace="n", uid="u"))
    config.log_directory = "/var/log/pods/crib-tests"
    config.ClearField("hostname")
    config.linux.ClearField("cgroup_parent")
    return config


@st.composite
def containers(draw: Any) -> pb.ContainerConfig:
    config = pb.ContainerConfig()
    _fill(draw, config, draw(st.sampled_from([0.03, 0.06, 0.2])))
    if draw(st.floats(0, 1)) < 0.9:
        usual_container(config)
    for mount in config.mounts:  # what comes in read-only can't be spoilt
        mount.readonly, mount.propagation = True, pb.PROPAGATION_PRIVATE
        mount.selinux_relabel = False
    return config


def usual_container(config: pb.ContainerConfig) -> pb.ContainerConfig:
    """With what a container can't do without."""
    config.metadata.name = "c"
    config.image.image = IMAGE
    config.image.ClearField("runtime_handler")
    config.ClearField("log_path")
    del config.command[:]
    config.command.extend(["/bin/sh", "-c", "sleep 1000"])
    return config


def tried(strategy: st.SearchStrategy[Any]) -> list[Any]:
    """Examples, made by hypothesis and tried outside of it, in the test's event loop."""
    found: list[Any] = []

    @settings(
        max_examples=_EXAMPLES * MORE, deadline=None, database=None, derandomize=MORE == 1,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(one: Any) -> None:
        found.append(one)

    collect()
    return found


_REFUSALS = {"INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "FAILED_PRECONDITION", "ALREADY_EXISTS"}


async def asked(call: Any, request: Message) -> Any:
    """The answer; None for a refusal that says why."""
    calling = call(request, timeout=scaled(60))
    code, text = (await calling.code()).name, await calling.details() or ""
    if code == "OK":
        return await calling
    step = code in ("UNKNOWN", "RESOURCE_EXHAUSTED") and re.match(r"step \d+/\d+: ", text)
    if not (code in _REFUSALS or step) or len(text) < 12:
        pytest.fail(f"{code}: {text}\n{request}")
    return None


async def test_any_pod(real: Real) -> None:
    made = 0
    for config in (usual_pod(pb.PodSandboxConfig()), *tried(pods())):
        answer = await asked(real.client.RunPodSandbox, pb.RunPodSandboxRequest(config=config))
        if answer is not None:
            made += 1
            await asked(real.client.PodSandboxStatus, pb.PodSandboxStatusRequest(pod_sandbox_id=answer.pod_sandbox_id))
            await real.remove(answer.pod_sandbox_id)
    assert made
    assert "traceback" not in real.daemon.log()
    assert not os.listdir(real.daemon.state / "pods")


async def test_any_container(real: Real) -> None:
    pod = await real.pod()
    config = real.pod_config()
    made = 0
    for wanted in (usual_container(pb.ContainerConfig()), *tried(containers())):
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=wanted, sandbox_config=config)
        answer = await asked(real.client.CreateContainer, request)
        if answer is None:
            continue
        id = answer.container_id
        started = await asked(real.client.StartContainer, pb.StartContainerRequest(container_id=id))
        made += started is not None
        await asked(real.client.ContainerStatus, pb.ContainerStatusRequest(container_id=id, verbose=True))
        await asked(real.client.RemoveContainer, pb.RemoveContainerRequest(container_id=id))
    assert made
    assert "traceback" not in real.daemon.log()
    assert not os.listdir(real.daemon.root / "rootfs")

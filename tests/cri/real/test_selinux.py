"""SELinux under a policy: the labels of processes, files and keys, from inside, from outside, and by what is denied.

The policy is the test machine's (`hack/vm run --lsm selinux`); no test loads one. In it a container may touch
container_file_t of its own level alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import cri_pb2 as pb
from runtime.zygote.launch import interpreter
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN
from tests.cri.real.test_modes import linux, refused, user_pod
from tests.requires import requires
from tests.runtime.test_clean import hosts_files

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay", "selinux")]
# Asked by a Python whose files are the host's: the label of the session keyring, and a message queue.
PROBE = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
keyctl = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
text = ctypes.create_string_buffer(200)
libc.syscall(keyctl, 17, -3, text, 200)
queue = libc.mq_open(b"/crib", os.O_CREAT | os.O_RDWR, 0o600, None)
print(json.dumps({"key": text.value.decode(), "queue": queue >= 0}))
"""


@pytest.fixture
def settings() -> str:
    return f"selinux = true\n{BUILTIN}"


def label_of(path: Path | str) -> str:
    return os.getxattr(path, "security.selinux").decode().rstrip("\0")


async def said(real: Real, container: str, script: str) -> str:
    return (await real.sh(container, script)).stdout.decode().rstrip("\n\0")


def options(**fields: str) -> pb.SELinuxOption:
    return pb.SELinuxOption(**fields)


async def test_processes_and_files_have_the_pods_level(real: Real) -> None:
    levels = []
    for name in ("one", "two"):
        pod = await real.pod(real.pod_config(name))
        first = await real.run(pod, "sleep", "1000", name="first", tty=True)
        second = await real.run(pod, "sleep", "1000", name="second")
        label = Path(f"/proc/{await real.pid(first)}/attr/current").read_text().rstrip("\0\n")
        assert label.startswith("system_u:system_r:container_t:s0:c")
        for container in (first, second):
            assert await said(real, container, "cat /proc/self/attr/current") == label
        assert (await real.sh(first, "touch /x /dev/x /dev/shm/x /etc/hosts && echo y > /dev/null")).exit_code == 0
        root = f"/proc/{await real.pid(first)}/root"
        file = label.replace("system_r:container_t", "object_r:container_file_t")
        paths = ("x", "dev/x", "dev/shm/x", "dev/null", "dev/pts/0", "dev/mqueue", "etc/hosts", "etc/resolv.conf")
        assert {path: label_of(f"{root}/{path}") for path in paths} == dict.fromkeys(paths, file)
        levels.append(label.split(":", 3)[3])
    assert len(set(levels)) == 2


@pytest.mark.parametrize("mapped", [False, pytest.param(True, marks=requires("userns"))])
async def test_keys_and_message_queues_are_the_containers(real: Real, mapped: bool) -> None:
    config = user_pod(real) if mapped else real.pod_config()
    modes = config.linux.security_context.namespace_options
    mounts = [pb.Mount(container_path=each.destination, host_path=each.source, readonly=True) for each in hosts_files()]
    pod = await real.pod(config)
    command = (interpreter(), "-I", "-S", "-c", PROBE)
    own = linux(namespace_options=modes) if mapped else linux()
    container = await real.run(pod, "sleep", "1000", name="c", mounts=mounts, linux=own)
    label = await said(real, container, "cat /proc/self/attr/current")
    once = await real.run(pod, *command, name="once", mounts=mounts, linux=own)
    assert (await real.ended(once)).exit_code == 0, (real.logs / "once.log").read_text()
    line = (real.logs / "once.log").read_text().split(" ", 3)[3]
    assert json.loads(line) == {"key": label, "queue": True}
    execed = await real.client.ExecSync(pb.ExecSyncRequest(container_id=container, cmd=command, timeout=60))
    assert json.loads(execed.stdout) == {"key": label, "queue": True}, execed.stderr


async def test_a_volume_is_relabelled_where_that_is_asked_for(real: Real, tmp_path: Path) -> None:
    for name in ("plain", "asked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x\n")
        os.setxattr(tmp_path / name / "file", "security.selinux", b"system_u:object_r:private_t:s0\0")
    mounts = [
        pb.Mount(container_path=f"/{name}", host_path=str(tmp_path / name), selinux_relabel=name == "asked")
        for name in ("plain", "asked")
    ]
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000", mounts=mounts)
    assert (await real.sh(container, "cat /plain/file")).exit_code == 1
    assert await said(real, container, "cat /asked/file; echo new > /asked/new; cat /asked/new") == "x\nnew"
    assert label_of(tmp_path / "plain/file") == "system_u:object_r:private_t:s0"
    inside = await said(real, container, "cat /proc/self/attr/current")
    assert label_of(tmp_path / "asked/new") == inside.replace("system_r:container_t", "object_r:container_file_t")
    other = await real.run(
        await real.pod(real.pod_config("other")),
        "sleep",
        "1000",
        mounts=[pb.Mount(container_path="/v", host_path=str(tmp_path / "asked"))],
    )
    assert (await real.sh(other, "cat /v/file")).exit_code == 1, "another pod's level"


async def test_labels_that_are_asked_for(real: Real) -> None:
    config = real.pod_config(linux=pb.LinuxPodSandboxConfig())
    config.linux.security_context.selinux_options.CopyFrom(options(level="s0:c7,c8"))
    pod = await real.pod(config)
    for name, asked, expected in (
        ("pods", linux(), "container_t:s0:c7,c8"),
        ("type", linux(selinux_options=options(type="container_t")), "container_t:s0:c7,c8"),
        ("own", linux(selinux_options=options(level="s0:c9")), "container_t:s0:c9"),
    ):
        container = await real.run(pod, "sleep", "1000", name=name, linux=asked)
        assert await said(real, container, "cat /proc/self/attr/current") == f"system_u:system_r:{expected}"


async def test_privileged_is_unconfined(real: Real) -> None:
    config = real.pod_config()
    config.linux.security_context.privileged = True
    container = await real.run(await real.pod(config), "sleep", "1000", linux=linux(privileged=True))
    own = Path("/proc/self/attr/current").read_text().rstrip("\0\n")
    assert await said(real, container, "cat /proc/self/attr/current") == own


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (options(type="no_such_t"), "system_u:system_r:no_such_t"),
        (options(level="s0:c9999"), "s0:c9999"),
        (options(level="nonsense"), "selinux_options.level 'nonsense'"),
        (options(user="a b"), "selinux_options.user 'a b'"),
    ],
)
async def test_a_label_that_can_not_be(real: Real, asked: pb.SELinuxOption, named: str) -> None:
    pod = await real.pod()
    calls: list[Any] = [real.create(pod, "true", linux=linux(selinux_options=asked))]
    config = real.pod_config("other")
    config.linux.security_context.selinux_options.CopyFrom(asked)
    calls.append(real.pod(config))
    for call in calls:
        code, text = await refused(call)
        assert (code, named in text) == (grpc.StatusCode.INVALID_ARGUMENT, True), text
    assert not (await real.client.ListContainers(pb.ListContainersRequest())).containers
    assert len((await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items) == 1

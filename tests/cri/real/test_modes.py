"""Namespaces, volumes, hooks and bad input end to end: cribd's socket, a real kernel, a busybox image."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import FIRST_ID, MAPPED, Real
from tests.cri.real.daemon import IMAGE, RUNTIME
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]
OVERLAP = [pb.IDMapping(container_id=first, host_id=first + 100, length=10) for first in (0, 5)]
TWICE: dict[str, Any] = {"uidMappings": OVERLAP, "gidMappings": OVERLAP}
NO_MODE = cast(pb.MountPropagation, 9)
NO_POLICY = cast(pb.SupplementalGroupsPolicy, 9)
TWO = pb.NamespaceOption(
    pid=pb.CONTAINER, userns_options=pb.UserNamespace(mode=pb.POD, uids=[*MAPPED, *OVERLAP[:1]], gids=MAPPED)
)
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND)
WITHOUT_0 = pb.UserNamespace(mode=pb.POD, uids=OVERLAP[1:], gids=OVERLAP[1:])


def linux(**security: Any) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(**security))


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def user_pod(real: Real, **modes: Any) -> pb.PodSandboxConfig:
    return real.pod_config("user", network=modes.get("network", pb.POD) == pb.POD, mapped=True)


@requires("userns")
@pytest.mark.parametrize("network", [pb.POD, pb.NODE])
async def test_a_pod_with_a_user_namespace(real: Real, tmp_path: Path, network: pb.NamespaceMode) -> None:
    status = await real.client.Status(pb.StatusRequest())
    if not status.runtime_handlers[0].features.user_namespaces:
        pytest.skip("not on this kernel")
    assert status.features.user_namespaces_host_network
    (tmp_path / "file").write_text("x")
    config = user_pod(real, network=network)
    pod = await real.pod(config)
    volume = pb.Mount(container_path="/v", host_path=str(tmp_path), uidMappings=MAPPED, gidMappings=MAPPED)
    container = await real.run(
        pod,
        "sleep",
        "1000",
        mounts=[volume],
        linux=linux(namespace_options=config.linux.security_context.namespace_options),
    )
    script = (
        "id -u; stat -c %u /v/file /etc/hosts; echo y > /etc/resolv.conf; touch /v/new > /dev/null; ls -d /sys/class"
    )
    said = await real.sh(container, script)
    assert said.stdout.decode().splitlines() == ["0", "0", "0", "/sys/class"], said.stderr
    assert (tmp_path / "new").stat().st_uid == 0
    pid = await real.pid(container)
    assert f"Uid:\t{FIRST_ID}\t" in Path(f"/proc/{pid}/status").read_text()


@requires("userns")
@pytest.mark.parametrize("network", [pb.POD, pb.NODE])
async def test_a_privileged_one_with_a_user_namespace(real: Real, network: pb.NamespaceMode) -> None:
    """It is root of its user namespace and has the host's devices, which are nobody's there."""
    config = user_pod(real, network=network)
    config.linux.security_context.privileged = True
    asked = linux(privileged=True, namespace_options=config.linux.security_context.namespace_options)
    container = await real.run(await real.pod(config), "sleep", "1000", linux=asked)
    said = await real.sh(container, "echo x > /dev/null && readlink /dev/ptmx; mkdir /m; mount -t tmpfs x /m && echo m")
    assert said.stdout.decode().splitlines() == ["pts/ptmx", "m"], said.stderr
    owners = await real.sh(container, "find /dev -xdev \\( -type b -o -name kmsg \\) -exec stat -c %u {} \\; | sort -u")
    assert owners.stdout == b"65534\n"
    assert (await real.sh(container, "echo x > /dev/kmsg")).exit_code
    assert (await real.sh(container, "echo x > /proc/sys/kernel/domainname")).exit_code


async def test_a_targets_pid_namespace(real: Real) -> None:
    pod = await real.pod()
    target = await real.run(pod, "sleep", "1111")
    mode = linux(namespace_options=pb.NamespaceOption(pid=pb.TARGET, target_id=target))
    debug = await real.run(pod, "sh", "-c", "ps -o args", name="debug", linux=mode)
    assert (await real.ended(debug)).exit_code == 0
    assert "stdout F sleep 1111" in (real.logs / "debug.log").read_text()
    late = await real.create(pod, "true", name="late", linux=mode)
    await real.client.StopContainer(pb.StopContainerRequest(container_id=target, timeout=0))
    code, said = await refused(real.start(late))
    assert (code, "not running" in said) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    other = await real.pod(real.pod_config("other"))
    code, said = await refused(real.create(other, "true", linux=mode))
    assert (code, "no container of this sandbox" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def mounted(real: Real, pod: str) -> int:
    """How many images the host has mounted for the pod."""
    lines = Path(f"/proc/{real.daemon.process.pid if real.daemon.process else 0}/mountinfo").read_text().splitlines()
    return sum(f"/mnt/{pod}/" in line and not line.split()[4].endswith("/shm") for line in lines)


async def test_an_image_as_a_volume(real: Real) -> None:
    pod = await real.pod()
    image = pb.ImageSpec(image=IMAGE)
    whole = pb.Mount(container_path="/image", image=image, readonly=True)
    part = pb.Mount(container_path="/part", image=image, image_sub_path="bin", readonly=True)
    container = await real.run(pod, "sleep", "1000", mounts=[whole, part])
    said = await real.sh(
        container, "test -e /image/bin/sh && test -e /part/sh && ! touch /image/x /part/x && echo fine"
    )
    assert said.stdout == b"fine\n"
    found = await real.status(container)
    assert [mount.image.image_ref for mount in found.mounts] == [found.image_id] * 2
    again = await real.run(pod, "sleep", "1000", name="d", mounts=[part])
    assert (await real.sh(again, "test -e /part/sh && echo fine")).stdout == b"fine\n"
    assert mounted(real, pod) == 1
    real.daemon.kill()  # and what is mounted is known afterwards
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    third = await real.run(pod, "sleep", "1000", name="e", mounts=[whole])
    assert (await real.sh(third, "test -e /image/bin/sh && echo fine")).stdout == b"fine\n"
    assert mounted(real, pod) == 1
    missing = pb.Mount(container_path="/p", image=image, image_sub_path="no/such", readonly=True)
    code, said_text = await refused(real.create(pod, "true", name="x", mounts=[missing]))
    assert code == grpc.StatusCode.NOT_FOUND
    assert said_text.startswith("ImageVolumeMountFailed")
    await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    assert mounted(real, pod) == 0
    assert found.image_id == (await real.status(again)).mounts[0].image.image_ref
    await real.remove(pod)
    await real.client.RemoveImage(pb.RemoveImageRequest(image=image))
    assert not [path for path in (real.daemon.root / "layers").iterdir() if path.name.isalnum()]


BAD_CONTAINERS: list[tuple[dict[str, Any], str]] = [
    ({"mounts": [pb.Mount(container_path="/x", host_path="/", propagation=NO_MODE)]}, "propagation"),
    ({"mounts": [pb.Mount(container_path="x", host_path="/")]}, "container_path"),
    ({"mounts": [pb.Mount(container_path="/x", host_path="/", recursive_read_only=True)]}, "recursive_read_only"),
    ({"mounts": [pb.Mount(container_path="/x", host_path="/", uidMappings=MAPPED)]}, "uidMappings"),
    ({"mounts": [pb.Mount(container_path="/x", image=pb.ImageSpec(image=IMAGE))]}, "readonly"),
    ({"devices": [pb.Device(host_path="/dev/none", container_path="/dev/none")]}, "/dev/none"),
    ({"CDI_devices": [pb.CDIDevice(name="no.such/thing=one")]}, "no.such/thing=one"),
    ({"linux": linux(run_as_group=pb.Int64Value(value=5))}, "run_as_group"),
    ({"linux": linux(run_as_username="nobody-here")}, "nobody-here"),
    ({"linux": linux(run_as_user=pb.Int64Value(value=5), run_as_username="root")}, "run_as_username 'root'"),
    ({"mounts": [pb.Mount(container_path="/x", host_path="/", **TWICE)]}, "container_id 5"),
    ({"linux": linux(capabilities=pb.Capability(add_capabilities=["FLY"]))}, "FLY"),
    ({"linux": linux(privileged=True)}, "privileged"),
    ({"linux": linux(namespace_options=pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER))}, "network"),
    ({"linux": linux(namespace_options=pb.NamespaceOption(pid=pb.TARGET))}, "target_id"),
    ({"linux": linux(seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost))}, "seccomp"),
    ({"linux": linux(apparmor_profile="localhost/none-such")}, "none-such"),
    ({"linux": linux(masked_paths=["relative"])}, "masked_paths"),
    ({"linux": linux(namespace_options=TWO)}, "userns_options.uids: 2 mappings"),
    ({"linux": linux(namespace_options=pb.NamespaceOption(pid=pb.NODE))}, "pid NODE"),
    ({"linux": linux(namespace_options=pb.NamespaceOption(pid=pb.CONTAINER, ipc=pb.NODE))}, "ipc NODE"),
    ({"linux": linux(run_as_user=pb.Int64Value(value=-1))}, "run_as_user -1"),
    ({"linux": linux(supplemental_groups=[1 << 40])}, "supplemental_groups 1099511627776"),
    ({"linux": linux(supplemental_groups_policy=NO_POLICY)}, "supplemental_groups_policy 9"),
    ({"linux": linux(selinux_options=pb.SELinuxOption(level="high"))}, "selinux_options.level 'high'"),
    ({"linux": linux(capabilities=pb.Capability(add_ambient_capabilities=["FLY"]))}, "add_ambient_capabilities"),
    ({"envs": [pb.KeyValue(key="A", value=b"x" * (1 << 20))]}, "envs 'A'"),
    ({"args": ["x" * (1 << 20)]}, "command[1]"),
    ({"labels": {"a": "x" * (2 << 20)}}, "labels: 2097153 bytes"),
    ({"working_dir": "relative"}, "working_dir 'relative'"),
    ({"stop_signal": 999}, "stop_signal 999"),
]


async def test_bad_input_is_named_and_leaves_nothing(real: Real) -> None:
    pod = await real.pod()
    for fields, named in BAD_CONTAINERS:
        code, said = await refused(real.create(pod, "true", **fields))
        assert (code in REFUSED, named in said) == (True, True), (code, said)
        assert not (await real.client.ListContainers(pb.ListContainersRequest())).containers
        assert not os.listdir(real.daemon.root / "rootfs"), named
    await real.run(pod, "true")  # the name is free


async def test_a_seccomp_profile_that_can_not_be(real: Real, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    pod = await real.pod()
    for text, named in (
        ('{"defaultAction": "SCMP_ACT_NOTIFY"}', "SCMP_ACT_NOTIFY"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "flags": ["NO_SUCH"]}', "flag 'NO_SUCH' is unknown"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "x": ' + "[" * 100000, "nested too deeply"),
        ("", "not a regular file"),
    ):
        if text:
            profile.write_text(text)
        else:
            profile.unlink()
            os.mkfifo(profile)
        asked = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref=str(profile))
        code, said = await refused(real.create(pod, "true", linux=linux(seccomp=asked)))
        assert (code, named in said) == (grpc.StatusCode.INVALID_ARGUMENT, True), said


BAD_PODS: list[tuple[dict[str, Any], str]] = [
    ({"sysctls": {"net.ipv4.no_such_thing": "1"}}, "net.ipv4.no_such_thing '1': no such file"),
    ({"sysctls": {"kernel.shmmax": "many"}}, "kernel.shmmax 'many': invalid argument"),
    ({"sysctls": {"kernel.core_pattern": "x"}}, "kernel.core_pattern"),
    ({"resources": pb.LinuxContainerResources(cpu_period=5)}, "cpu_period 5"),
    ({"overhead": pb.LinuxContainerResources(memory_limit_in_bytes=-7)}, "memory_limit_in_bytes -7"),
    (
        {"security_context": pb.LinuxSandboxSecurityContext(seccomp_profile_path="nonsense")},
        "seccomp profile 'nonsense'",
    ),
    *(
        ({"security_context": pb.LinuxSandboxSecurityContext(**context)}, named)
        for context, named in (
            ({"run_as_group": pb.Int64Value(value=5)}, "run_as_group 5"),
            ({"namespace_options": TWO}, "userns_options.uids: 2 mappings"),
            ({"namespace_options": pb.NamespaceOption(userns_options=WITHOUT_0)}, "hold id 0"),
            ({"namespace_options": pb.NamespaceOption(pid=pb.TARGET, target_id="x")}, "pid TARGET"),
            ({"namespace_options": pb.NamespaceOption(network=pb.CONTAINER)}, "network CONTAINER"),
            ({"selinux_options": pb.SELinuxOption(type="a b")}, "selinux_options.type 'a b'"),
        )
    ),
]


async def test_bad_pods_are_named_and_leave_nothing(real: Real) -> None:
    for fields, named in BAD_PODS:
        code, said = await refused(real.pod(real.pod_config(linux=pb.LinuxPodSandboxConfig(**fields))))
        assert (code, named in said) == (grpc.StatusCode.INVALID_ARGUMENT, True), said
        assert not (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items
        assert not list(real.daemon.state.glob("pods/*")), named
    await real.pod()  # the name is free


async def test_a_memory_limit_below_what_a_start_takes(real: Real) -> None:
    pod = await real.pod()
    tiny = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=4096))
    container = await real.create(pod, "true", linux=tiny)
    _, said = await refused(real.start(container))
    assert "memory" in said


async def test_hooks_of_a_cdi_device(real: Real, tmp_path: Path) -> None:
    told, stopped = tmp_path / "told", tmp_path / "stopped"
    hooks = [
        {"hookName": stage, "path": "/bin/sh", "args": ["sh", "-c", f"/bin/cat > {path}"]}
        for stage, path in (("createRuntime", told), ("poststop", stopped))
    ]
    device = {"name": "one", "containerEdits": {"env": ["A=b"], "hooks": hooks}}
    name = f"crib-test-{tmp_path.name}.json"
    Path("/run/cdi").mkdir(exist_ok=True)
    file = Path("/run/cdi", name)
    file.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": "crib.test/thing", "devices": [device]}))
    try:
        pod = await real.pod()
        container = await real.run(pod, "sh", "-c", "echo $A", CDI_devices=[pb.CDIDevice(name="crib.test/thing=one")])
        assert (await real.ended(container)).exit_code == 0
    finally:
        file.unlink()
    state = json.loads(told.read_text())
    assert state["id"] == container
    assert state["status"] == "creating" or (RUNTIME and state["status"] == "created")  # crun's word
    assert "stdout F b" in (real.logs / "c.log").read_text()
    # The end of a pod that lost cribd and its monitor.
    answer = await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    real.daemon.kill()
    os.kill(json.loads(answer.info["info"])["pid"], signal.SIGKILL)
    await real.client.close()
    real.daemon.start()
    real.client = real.daemon.client()
    assert not stopped.exists()
    await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    await real.client.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    state = json.loads(stopped.read_text())
    assert (state["id"], state["status"]) == (container, "stopped")

"""What a container may do, end to end: capabilities, filters, paths, groups, devices, and what a node adds by CDI."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import cri_pb2 as pb
from cri.translate.capabilities import ALL
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN, RUNTIME
from tests.cri.real.test_images import busybox, load
from tests.cri.real.test_modes import linux, refused
from tests.requires import requires
from tests.runtime.images.given import Layer

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]
MERGE, STRICT = pb.SupplementalGroupsPolicy.Merge, pb.SupplementalGroupsPolicy.Strict
_PROFILE = pb.SecurityProfile


@pytest.fixture
def settings() -> str:
    path = f"path = '{RUNTIME}'\n" if RUNTIME else ""
    return f"{BUILTIN}[handlers.bare]\nprivileged_without_host_devices = true\n{path}"


def held(status: str, name: str) -> set[str]:
    """A capability set of /proc/PID/status."""
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"Cap{name}:")), 16)
    return {name for number, name in enumerate(ALL) if mask >> number & 1}


def field(status: str, name: str) -> str:
    return next(line.partition(":")[2].strip() for line in status.splitlines() if line.startswith(f"{name}:"))


async def statuses(real: Real, container: str) -> tuple[str, str]:
    """/proc/self/status of its first process and of one more."""
    own = Path(f"/proc/{await real.pid(container)}/status").read_text()
    return own, (await real.sh(container, "cat /proc/self/status")).stdout.decode()


async def test_capabilities(real: Real) -> None:
    asked = pb.Capability(
        add_capabilities=["SYS_CHROOT", "CAP_AUDIT_WRITE"],
        drop_capabilities=["ALL"],
        add_ambient_capabilities=["net_bind_service"],
    )
    context = linux(capabilities=asked, run_as_user=pb.Int64Value(value=1000))
    container = await real.run(await real.pod(), "sleep", "1000", linux=context)
    for found in await statuses(real, container):
        for name in ("Inh", "Prm", "Eff", "Amb"):
            assert held(found, name) == {"CAP_NET_BIND_SERVICE"}, name
        assert held(found, "Bnd") == {"CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_AUDIT_WRITE"}


async def test_root_without_what_was_dropped(real: Real) -> None:
    asked = linux(capabilities=pb.Capability(drop_capabilities=["CHOWN"]), no_new_privs=True)
    container = await real.run(await real.pod(), "sleep", "1000", linux=asked)
    for found in await statuses(real, container):
        assert "CAP_CHOWN" not in held(found, "Bnd") | held(found, "Eff")
        assert "CAP_SETUID" in held(found, "Eff")
        assert not held(found, "Inh") | held(found, "Amb")
        assert field(found, "NoNewPrivs") == "1"
    assert (await real.sh(container, "touch /x; chown 5 /x")).exit_code == 1


@requires("seccomp")
async def test_seccomp_profiles(real: Real, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    own = _PROFILE(profile_type=_PROFILE.Localhost, localhost_ref=str(profile))
    cases = {
        "default": (linux(seccomp=_PROFILE(profile_type=_PROFILE.RuntimeDefault)), "2"),
        "own": (linux(seccomp=own), "2"),
        "old": (linux(seccomp_profile_path=f"localhost/{profile}"), "2"),
        "unconfined": (linux(seccomp=_PROFILE(profile_type=_PROFILE.Unconfined)), "0"),
        "unset": (linux(), "0"),
    }
    pod = await real.pod()
    for name, (asked, mode) in cases.items():
        asked.security_context.apparmor.profile_type = _PROFILE.Unconfined  # whose default has no user namespaces
        container = await real.run(pod, "sleep", "1000", name=name, linux=asked)
        for found in await statuses(real, container):
            assert field(found, "Seccomp") == mode, name
        made = await real.sh(container, "mkdir /made")
        assert (b"No space left" in made.stderr) == (name in ("own", "old")), name
        key = await real.sh(container, "unshare -U true")
        assert (key.exit_code == 0) == (name != "default"), (name, key.stderr)


async def test_paths(real: Real) -> None:
    asked = linux(masked_paths=["/proc/uptime", "/etc", "/no/such"], readonly_paths=["/tmp", "/proc/sys"])
    container = await real.run(await real.pod(), "sleep", "1000", linux=asked)
    assert (await real.sh(container, "cat /proc/uptime; ls /etc")).stdout == b""
    assert (await real.sh(container, "touch /etc/x")).exit_code == 1
    assert (await real.sh(container, "touch /tmp/x")).exit_code == 1
    assert (await real.sh(container, "touch /x")).exit_code == 0
    plain = await real.run(await real.pod(real.pod_config("plain")), "sleep", "1000", linux=linux())
    assert (await real.sh(plain, "cat /proc/uptime")).stdout, "exactly the request's: none"


@pytest.mark.parametrize("handler", ["", "bare"])
async def test_privileged(real: Real, handler: str) -> None:
    config = real.pod_config()
    config.linux.security_context.privileged = True
    pod = (
        await real.client.RunPodSandbox(pb.RunPodSandboxRequest(config=config, runtime_handler=handler))
    ).pod_sandbox_id
    asked = linux(
        privileged=True, masked_paths=["/proc/uptime"], seccomp=_PROFILE(profile_type=_PROFILE.RuntimeDefault)
    )
    container = await real.run(pod, "sleep", "1000", linux=asked)
    own = Path("/proc/self/status").read_text()
    for found in await statuses(real, container):
        assert held(found, "Bnd") == held(found, "Eff") == held(own, "Bnd") & held(own, "Prm")
        assert field(found, "Seccomp") == "0"
    said = await real.sh(container, "cat /proc/uptime; ls /dev; touch /proc/sys/kernel/domainname && echo sys")
    assert said.stdout.split()[0].replace(b".", b"").isdigit()
    assert said.stdout.endswith(b"sys\n")
    hosts = {path.name for path in Path("/dev").iterdir() if stat.S_ISCHR(path.lstat().st_mode)} - {"console"}
    assert (hosts <= set(said.stdout.decode().split())) == (handler == "")
    unprivileged = await real.pod(real.pod_config("unprivileged"))
    code, text = await refused(real.create(unprivileged, "true", linux=linux(privileged=True)))
    assert (code, "privileged" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


@pytest.mark.parametrize("policy", [MERGE, STRICT])
async def test_groups(real: Real, policy: pb.SupplementalGroupsPolicy) -> None:
    top = Layer().file("etc/passwd", "app:x:7:8::/home/app:/bin/sh\n").file("etc/group", "app:x:8:\nextra:x:50:app\n")
    image = await load(real, busybox(), top)
    asked = linux(run_as_username="app", supplemental_groups=[99], supplemental_groups_policy=policy)
    container = await real.run(await real.pod(), "sleep", "1000", image=image, linux=asked)
    groups = [8, 50, 99] if policy == MERGE else [8, 99]
    for found in await statuses(real, container):
        assert [int(word) for word in field(found, "Groups").split()] == groups
        assert field(found, "Uid").split() == ["7"] * 4
    user = (await real.status(container)).user.linux
    assert (user.uid, user.gid, list(user.supplemental_groups)) == (7, 8, groups)


async def test_a_passwd_that_is_too_long(real: Real) -> None:
    top = Layer().file("etc/passwd", b"#" * (5 << 20))
    image = await load(real, busybox(), top)
    pod = await real.pod()
    code, said = await refused(real.create(pod, "true", image=image))
    assert (code, "/etc/passwd is too large" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True), said
    strict = linux(
        run_as_user=pb.Int64Value(value=1), run_as_group=pb.Int64Value(value=1), supplemental_groups_policy=STRICT
    )
    await real.create(pod, "true", image=image, linux=strict)  # which needs none of it


@requires("loop")
async def test_devices(real: Real, tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    (nodes / "below").mkdir(parents=True)
    os.mknod(nodes / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.mknod(nodes / "below/loop", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    (nodes / "no-device").touch()
    (tmp_path / "link").symlink_to("nodes/below/loop")
    devices = [
        pb.Device(host_path=str(tmp_path / "link"), container_path="/dev/read-only", permissions="r"),
        pb.Device(host_path=str(nodes), container_path="/dev/many", permissions="rwm"),
    ]
    pod = await real.pod()
    container = await real.run(pod, "sleep", "1000", devices=devices[:1])
    script = "stat -c %t:%T /dev/read-only; dd if=/dev/read-only of=/dev/null count=0 && echo read; "
    script += "echo x > /dev/read-only; mknod /own b 7 0; echo x > /own; mknod /other b 7 1; cat /other"
    said = await real.sh(container, script)
    assert said.stdout.decode().splitlines() == ["7:0", "read"]
    for name in ("/dev/read-only", "/own", "'/other'"):
        assert f"{name}: Operation not permitted" in said.stderr.decode()
    other = await real.run(pod, "sleep", "1000", name="many", devices=devices[1:])
    assert (await real.sh(other, "cd /dev/many; find . -type c -o -type b | sort")).stdout == b"./below/loop\n./zero\n"
    assert (await real.sh(other, "head -c 1 /dev/many/zero")).stdout == b"\0"
    instead = pb.Device(host_path="/dev/urandom", container_path="/dev/random")
    third = await real.run(pod, "sleep", "1000", name="instead", devices=[instead])
    assert (await real.sh(third, "stat -c %t:%T /dev/random")).stdout == b"1:9\n"
    for wrong, named in (
        (pb.Device(host_path=str(nodes / "no-device"), container_path="/dev/x"), "no-device"),
        (pb.Device(host_path="/dev/null", container_path="/dev/x", permissions="rx"), "devices.permissions 'rx'"),
        (pb.Device(host_path="dev/null", container_path="/dev/x"), "devices.host_path 'dev/null'"),
    ):
        code, text = await refused(real.create(pod, "true", name="wrong", devices=[wrong]))
        assert (code, named in text) == (grpc.StatusCode.INVALID_ARGUMENT, True), text


async def test_cdi_files_are_read_again(real: Real, tmp_path: Path) -> None:
    def write(value: str, **edits: Any) -> None:
        edits |= {"env": [f"GIVEN={value}"], "mounts": [{"hostPath": str(given), "containerPath": "/given"}]}
        device = {"name": "one", "containerEdits": edits}
        file.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": "crib.test/again", "devices": [device]}))

    Path("/run/cdi").mkdir(exist_ok=True)
    file = Path("/run/cdi", f"crib-test-again-{tmp_path.name}.json")
    given = tmp_path / "given"
    given.mkdir()
    (given / "x").touch()
    pod = await real.pod()
    names = [pb.CDIDevice(name="crib.test/again=one")]
    try:
        for value in ("first", "second"):
            write(value, deviceNodes=[{"path": f"/dev/{value}", "hostPath": "/dev/zero"}])
            container = await real.run(pod, "sleep", "1000", name=value, CDI_devices=names)
            said = await real.sh(container, f"echo $GIVEN; ls /given; head -c 1 /dev/{value}")
            assert said.stdout.decode().split()[:2] == [value, "x"]
            assert said.stdout.endswith(b"\0")
        file.write_text("{")
        code, text = await refused(real.create(pod, "true", CDI_devices=names))
        assert (code, "crib.test/again=one" in text and file.name in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    finally:
        file.unlink()
    code, text = await refused(real.create(pod, "true", CDI_devices=names))
    assert (code, "no such device" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)

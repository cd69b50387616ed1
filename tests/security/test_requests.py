"""What a request, or an image's labels and annotations, could make crib do on the host."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.request import urlopen

import pytest

from cri.api import cri_pb2 as pb
from cri.config import ConfigError, load
from cri.metrics import Metrics
from cri.translate import Handler
from cri.translate.logs import log_path
from cri.translate.mounts import own_volumes
from cri.translate.sysctls import pod_sysctls
from runtime.engine import PodStart
from runtime.errors import InvalidSpec
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN, Daemon, load_image
from tests.cri.translate import given
from tests.requires import requires
from tests.runtime.conftest import POD_ID, TIMEOUT_S, Bench, container
from tests.runtime.images.given import free_port
from tests.security.conftest import start_at
from tests.security.defects import attack

real_kernel = requires("root", "overlay", "busybox")

# Kernel parameters: CVE-2022-0811

FORWARDING = "net.ipv4.conf.lo.forwarding"  # of the tests' own network namespace, which is a pod's host here


async def set_on_host(bench: Bench, name: str) -> bool:
    """Ask for the other value of a switch in a pod on the host's network; whether the host's has changed."""
    file = Path("/proc/sys", name.replace(".", "/"))
    before = file.read_text()
    value = "0" if before.strip() == "1" else "1"
    wanted = pod_sysctls({name: value}, own_network=False, own_ipc=True, own_user=False, default={})
    await bench.pod(PodStart(id=POD_ID, hostname="pod", net=False, sysctls=wanted))
    after = file.read_text()
    file.write_text(before)
    return before != after


@attack(
    "CVE-2022-0811",
    sentence="A pod's kernel parameter is the host's, or its value smuggles in a second one (kernel.core_pattern, by "
    "+ or =)",
    guard="only parameters of a namespace that the pod has of its own; a value has no +, = or newline, and is "
    "written alone "
    "to the file of its own name",
    control="test_0811_control_any_parameter",
)
@real_kernel
@pytest.mark.asyncio
async def test_cve_2022_0811(bench: Bench) -> None:
    with pytest.raises(InvalidSpec):
        await set_on_host(bench, FORWARDING)
    for name, value in (
        ("kernel.core_pattern", "|/proc/self/exe"),
        ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x"),
        ("kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/x"),
        ("net.ipv4.ip_forward+kernel.core_pattern", "1"),
        ("net/../kernel/core_pattern", "|/x"),
        ("net.ipv4/../../../kernel/core_pattern", "|/x"),
    ):
        with pytest.raises(InvalidSpec):
            pod_sysctls({name: value}, own_network=True, own_ipc=True, own_user=False, default={})


@real_kernel
@pytest.mark.asyncio
async def test_0811_control_any_parameter(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.translate.sysctls._check", lambda *_, **__: None)
    assert await set_on_host(bench, FORWARDING)


# Log paths: CVE-2025-0750


async def logs_outside(bench: Bench, tmp_path: Path) -> bool:
    """Give a container a log path that leads out of the pod's directory; whether a file is made there."""
    (tmp_path / "pod").mkdir()
    path = log_path(str(tmp_path / "pod"), "../outside.log")
    assert path
    pod = await bench.pod()
    await start_at(bench, pod, container(pod, "true"), log=path)
    await bench.exited("c")
    return (tmp_path / "outside.log").exists()


@attack(
    "CVE-2025-0750",
    sentence="A container's log path leads out of the pod's log directory, by .. or by a link at its end",
    guard="a log path has no .. and is relative; the file itself is opened without following a link",
    control="test_0750_control_any_path",
)
@real_kernel
@pytest.mark.asyncio
async def test_cve_2025_0750(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec):
        await logs_outside(bench, tmp_path)
    (tmp_path / "pod/link.log").symlink_to(tmp_path / "outside.log")
    pod = await bench.pod()
    with pytest.raises(Exception, match=r"(?i)too many levels"):
        await start_at(bench, pod, container(pod, "true"), log=str(tmp_path / "pod/link.log"))
    assert not (tmp_path / "outside.log").exists()


@real_kernel
@pytest.mark.asyncio
async def test_0750_control_any_path(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.translate.logs.no_backsteps", lambda _, value: value)
    assert await logs_outside(bench, tmp_path)


# Annotations and labels: CVE-2024-3154, -2026-53488

EVIL = {"org.systemd.property.ExecStartPre": "'/bin/touch /x'", "io.kubernetes.cri-o.TrySkipVolumeSELinuxLabel": "true"}


def annotated(handler: Handler) -> dict[str, str]:
    """The request's annotations that reach the OCI spec."""
    made = given.spec(given.container(annotations=EVIL), pod=given.sandbox(annotations=EVIL), handler=handler)
    return {key: value for key, value in made.annotations.items() if key in EVIL}


@attack(
    "CVE-2024-3154",
    sentence="Annotations of a pod or container set properties of the systemd unit that holds it",
    guard="no annotation of a request reaches the OCI spec but those that the node's configuration lets through, and "
    "nothing "
    "in crib acts on one of systemd's",
    control="test_3154_control_all_annotations",
)
def test_cve_2024_3154() -> None:
    assert annotated(Handler()) == {}


def test_3154_control_all_annotations() -> None:
    assert annotated(Handler(annotations=("*",))) == EVIL


def labels_matter(*labels: dict[str, str]) -> bool:
    """Whether two images that differ in their labels alone make different containers."""
    first, second = (given.spec(img=given.image(labels=each)) for each in labels)
    return first != second


HOSTILE_LABELS = {
    "io.kubernetes.container.name": "x",
    "org.systemd.property.X": "1",
    "cdi.k8s.io/x": "vendor.com/gpu=all",
}


@attack(
    "CVE-2026-53488",
    sentence="LABELs of an image are taken for the runtime's own labels or annotations",
    guard="nothing reads an image's labels when a container is made",
    control="test_53488_control_labels_as_annotations",
)
def test_cve_2026_53488() -> None:
    assert not labels_matter({}, HOSTILE_LABELS)


def test_53488_control_labels_as_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.translate.container._annotations", lambda asked: dict(asked.image.config.labels or {}))
    assert labels_matter({}, HOSTILE_LABELS)


# What crib does not do at all


def test_volumes_of_an_image_come_first_and_give_way() -> None:
    """Before anything of the request's is there, so that none of it is mounted on by way of a link in the image."""
    mount = pb.Mount(container_path="/data", host_path="/host")
    paths = ("/etc/../../../etc", "/link", "/data", "/data/below", "/proc/self", "/sys", "/", "../..")
    asked = own_volumes(paths, [mount])
    assert asked == ("/etc", "/link")
    made = {path: f"/own/{number}" for number, path in enumerate(asked)}
    found = given.spec(given.container(mounts=[mount]), img=given.image(volumes=paths), own_volumes=made).mounts
    own = [each for each in found if each.source.startswith("/own/")]
    assert [(each.destination, each.source) for each in own] == [("/etc", "/own/0"), ("/link", "/own/1")]
    bound = [each for each in found if each.type == "bind"]
    assert bound[: len(own)] == own


# Sockets, directories and streams: CVE-2020-15257, -2024-25621, the streaming server

SCAN = "while read a b c d e f g path; do case $path in @*) echo $path;; esac; done < /proc/net/unix"


@attack(
    "CVE-2020-15257",
    sentence="A container on the host's network connects to the runtime's abstract socket",
    guard="all sockets are files in directories of root's; there is no abstract one",
    control="test_15257_control_an_abstract_socket",
)
@real_kernel
@pytest.mark.asyncio
async def test_cve_2020_15257(bench: Bench) -> None:
    assert await abstract_sockets(bench) == []


@real_kernel
@pytest.mark.asyncio
async def test_15257_control_an_abstract_socket(bench: Bench) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"\0crib-test-{os.getpid()}")
        made.listen()
        assert await abstract_sockets(bench) == [f"@crib-test-{os.getpid()}"]


async def abstract_sockets(bench: Bench) -> list[str]:
    pod = await bench.pod(PodStart(id=POD_ID, hostname="pod", net=False))
    _, log = await bench.run(pod, "c", container(pod, "sh", "-c", SCAN, namespaces={"network": None}))
    return log.splitlines()  # the network namespace is the tests' own: any is crib's


ORDINARY = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
got = []
for path in sys.argv[1:]:
    try:
        if path.endswith('.sock') or path.endswith('/s'):
            socket.socket(socket.AF_UNIX).connect(path)
        elif os.path.isdir(path):
            os.listdir(path)
        else:
            open(path, 'rb').close()
        got.append(path)
    except OSError:
        pass
    try:
        os.close(os.open(os.path.join(path, 'x') if os.path.isdir(path) else path, os.O_CREAT | os.O_WRONLY))
        got.append(path)
    except OSError:
        pass
print('\\n'.join(got))
"""


def as_ordinary_user(paths: list[Path]) -> list[str]:
    """What of it a user without any right can read, list, write or connect to."""
    import subprocess
    import sys

    command = [os.path.realpath(sys.executable), "-I", "-S", "-c", ORDINARY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return done.stdout.split()


def everything(real: Real) -> list[Path]:
    """All sockets, directories and files of a cribd but those of images' content."""
    found = []
    for top in (real.daemon.root, real.daemon.state, real.daemon.directory):
        for directory, _, names in os.walk(top):
            found.append(Path(directory))
            found += [Path(directory, name) for name in names]
            if len(found) > 400:
                break
    return found


def in_the_open(real: Real) -> None:
    """Let everybody into the tests' own directories: /run and /var/lib are open."""
    for path in (real.daemon.directory, real.daemon.root.parent):
        path.chmod(0o755)


@attack(
    "CVE-2024-25621",
    sentence="An ordinary user lists, reads, writes or connects to anything of crib's: sockets, state, records, "
    "logs, images",
    guard="the socket is 0600, all directories at the top are 0700",
    control="test_25621_control_wider_modes",
)
@pytest.mark.asyncio
@real_kernel
async def test_cve_2024_25621(real: Real) -> None:
    pod = await real.pod(real.pod_config(network=False))
    await real.run(pod, "sleep", "1000")
    in_the_open(real)
    paths = [path for path in everything(real) if path.parent != real.daemon.directory or not path.is_file()]
    sockets = [path for path in paths if stat.S_ISSOCK(path.lstat().st_mode) and path.name != "notify"]  # the tests'
    assert len(sockets) >= 2
    assert as_ordinary_user(paths) == [str(real.daemon.directory)]
    for path in (real.daemon.root, real.daemon.state):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in sockets:
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0


@pytest.mark.asyncio
@real_kernel
async def test_25621_control_wider_modes(real: Real) -> None:
    in_the_open(real)
    real.daemon.state.chmod(0o755)
    real.daemon.root.chmod(0o755)
    socket = Path(real.daemon.listen.removeprefix("unix://"))
    socket.chmod(0o666)
    assert {str(socket), str(real.daemon.root)} <= set(as_ordinary_user([socket, real.daemon.root]))


@attack(
    "streaming without a token",
    sentence="Somebody who reaches the streaming server asks for an exec, attach or port-forward without a token, "
    "with a made "
    "up or a used one",
    guard="a token of 192 random bits works once, for a minute, for its own kind of request; the server listens on the "
    "loopback address by default",
    control="test_streaming_control_with_a_token",
)
@pytest.mark.asyncio
@real_kernel
async def test_streaming_needs_a_token(real: Real) -> None:
    url = await exec_url(real)
    address, _, token = url.rpartition("/")
    base = address.rpartition("/")[0]
    assert base.startswith("http://127.0.0.1:")
    for path in (
        "",
        "/",
        "/exec",
        "/exec/",
        "/exec/" + "A" * len(token),
        f"/attach/{token}",
        "/metrics",
        "/../etc/passwd",
    ):
        assert await status_of(base + path) in (400, 404, 405), path


@pytest.mark.asyncio
@real_kernel
async def test_streaming_control_with_a_token(real: Real) -> None:
    url = await exec_url(real)
    assert await status_of(url) == 101
    assert await status_of(url) == 404


async def asked_by_a_pod(real: Real, port: int) -> str:
    """What a pod is told of cribd's figures at the node's address that it can reach."""
    running = await real.run(await real.pod(), "sleep", "1000")
    gateway = "$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')"
    ask = f"printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {gateway} {port}"
    answer = await real.sh(running, f"ping -c 1 -W 5 {gateway} && {ask}")
    said = answer.stdout.decode()
    assert "1 packets received" in said
    return said


@attack(
    "metrics from a pod",
    sentence="A pod asks for cribd's own figures at the node's address",
    guard="they are served on a loopback address alone, and the configuration takes no other",
    control="test_metrics_control_any_address",
)
@pytest.mark.asyncio
@requires("root", "busybox", "overlay", "bridge", "nft")
async def test_metrics_are_not_for_pods(run_dir: Path, archive: bytes, tmp_path: Path) -> None:
    port = free_port()
    daemon = Daemon(run_dir, f"{BUILTIN}[metrics]\nport = {port}\n")
    daemon.start()
    client = daemon.client()
    made = Real(daemon, client, tmp_path / "logs")
    try:
        await load_image(client, archive)
        assert "crib_" not in await asked_by_a_pod(made, port)
        assert b"crib_pods" in await asyncio.to_thread(lambda: urlopen(f"http://127.0.0.1:{port}/metrics").read())
    finally:
        for item in (await client.ListPodSandbox(pb.ListPodSandboxRequest())).items:
            await made.remove(item.id)
        await client.close()
        assert daemon.stop() == 0, daemon.log()
    (tmp_path / "open.toml").write_text("[metrics]\naddress = '0.0.0.0'\n")
    with pytest.raises(ConfigError, match="not a loopback address"):
        load(tmp_path / "open.toml")


@pytest.mark.asyncio
@requires("root", "busybox", "overlay", "bridge", "nft")
async def test_metrics_control_any_address(real: Real) -> None:
    metrics = Metrics(cast(Any, SimpleNamespace(pods=[], containers=[])))
    port = free_port()
    metrics.serve("0.0.0.0", port)
    try:
        assert "crib_pods" in await asked_by_a_pod(real, port)
    finally:
        metrics.close()


async def exec_url(real: Real) -> str:
    pod = await real.pod(real.pod_config(network=False))
    running = await real.run(pod, "sleep", "1000")
    request = pb.ExecRequest(container_id=running, cmd=["true"], stdout=True)
    return str((await real.client.Exec(request)).url)


async def status_of(url: str) -> int:
    """The HTTP status of an upgrade to SPDY."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    upgrade = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
    writer.write(f"POST {parts.path or '/'} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n".encode())
    async with asyncio.timeout(TIMEOUT_S):
        line = await reader.readline()
    writer.close()
    return int(line.split()[1])

"""A cribd whose pods have CNI: bridge, host-local and portmap of Debian, or what CRIB_CNI_PLUGINS names."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.client import until
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import RUNTIME, Daemon
from tests.net.given import ip, nft
from tests.requires import cni_plugins, requires

needs = requires("root", "busybox", "bridge", "overlay", "ip", "nft", "cni", "xtables")
pytestmark = [pytest.mark.asyncio, needs]

PLUGIN = """#!/bin/sh
# The plugin of this name; its DEL fails while a file says so.
[ "$CNI_COMMAND" = DEL ] && [ -e DIRECTORY/refuse ] && { echo '{"code": 999, "msg": "not now"}'; exit 1; }
exec PLUGINS/bridge
"""
_PATH = f"path = '{RUNTIME}'\n" if RUNTIME else ""
RANGES = [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]]


def conf(directory: Path, ranges: Any = RANGES) -> str:
    ipam = {"type": "host-local", "ranges": ranges, "dataDir": str(directory / "leases")}
    ipam |= {"routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}
    bridge = {"type": "bridge", "bridge": "cnitest0", "isGateway": True, "hairpinMode": True, "ipam": ipam}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "1.0.0", "name": "bridged", "plugins": [bridge, ports]})


def leased(directory: Path) -> list[str]:
    path = directory / "leases/bridged"
    return sorted(name for name in os.listdir(path) if name[0] in "1f") if path.exists() else []


@pytest.fixture
def daemon(run_dir: Path) -> Iterator[Daemon]:
    """It waits for a configuration; `put` in the directory's net.d."""
    for name in ("net.d", "bin"):
        (run_dir / name).mkdir()
    plugin = run_dir / "bin/bridge"
    plugin.write_text(PLUGIN.replace("DIRECTORY", str(run_dir)).replace("PLUGINS", cni_plugins()))
    plugin.chmod(0o755)
    (run_dir / "template").write_text(conf(run_dir, "{{.PodCIDRRanges}}"))
    settings = {
        "plugin": '"cni"',
        "cni_conf_dir": f'"{run_dir}/net.d"',
        "cni_plugin_dirs": f'["{run_dir}/bin", "{cni_plugins()}"]',
        "cni_template": f'"{run_dir}/template"',
    }
    lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
    forward = {path: path.read_text() for path in Path("/proc/sys/net").glob("ipv*/ip_forward")}
    made = Daemon(run_dir, f'[network]\n{lines}[handlers.aside]\ncni_conf_dir = "{run_dir}/aside.d"\n{_PATH}')
    made.start()
    yield made
    if made.process is not None:
        assert made.stop() == 0, made.log()
    for name in ("cnitest0", "cnitest1"):
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)
    nft("flush", "ruleset")
    for path, value in forward.items():
        path.write_text(value)


def put(real: Real) -> None:
    (real.daemon.directory / "net.d/10-bridged.conflist").write_text(conf(real.daemon.directory))


async def network_ready(real: Real) -> pb.RuntimeCondition:
    status = (await real.client.Status(pb.StatusRequest())).status
    found: list[pb.RuntimeCondition] = [one for one in status.conditions if one.type == "NetworkReady"]
    return found[0]


async def addresses(real: Real, pod: str) -> list[str]:
    status = (await real.client.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod))).status
    return [status.network.ip, *(one.ip for one in status.network.additional_ips)]


def answers(address: str, port: int) -> bytes:
    with socket.create_connection((address, port), timeout=10) as asking:
        return asking.recv(16)


async def test_a_pods_life(real: Real) -> None:
    told = await network_ready(real)
    assert (told.status, told.reason) == (False, "NetworkPluginNotReady")
    with pytest.raises(grpc.aio.AioRpcError, match="no usable CNI configuration"):
        await real.pod()
    put(real)
    assert (await network_ready(real)).status

    ports = [pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=18080)]
    pod = await real.pod(real.pod_config(port_mappings=ports))
    got = await addresses(real, pod)
    assert got == leased(real.daemon.directory) == ["10.77.0.2", "fd77::2"]
    container = await real.run(pod, "sh", "-c", "while :; do echo hello | nc -l -p 80; done")
    shown = await real.sh(container, "ip -4 address show eth0; cat /etc/hosts")
    assert b"10.77.0.2/24" in shown.stdout
    assert b"10.77.0.2\tpod" in shown.stdout
    await real.sh(container, "until netstat -tln | grep -q :80; do sleep 0.1; done")
    assert await asyncio.to_thread(answers, "10.77.0.1", 18080) == b"hello\n"

    real.daemon.stop()
    real.daemon.start()
    assert await addresses(real, pod) == got
    await real.sh(container, "until netstat -tln | grep -q :80; do sleep 0.1; done")
    assert await asyncio.to_thread(answers, "10.77.0.1", 18080) == b"hello\n", "the pod noticed nothing"
    await real.remove(pod)
    assert leased(real.daemon.directory) == []
    assert "18080" not in nft("list", "ruleset")
    assert ip("link", "show", "master", "cnitest0") == []


async def test_a_handler_with_a_network_of_its_own(real: Real) -> None:
    put(real)
    directory = real.daemon.directory
    request = pb.RunPodSandboxRequest(config=real.pod_config("aside"), runtime_handler="aside")
    with pytest.raises(grpc.aio.AioRpcError, match="no usable CNI configuration in"):
        await real.client.RunPodSandbox(request)
    (directory / "aside.d").mkdir()
    ranges = [[{"subnet": "10.78.0.0/24"}]]
    own = conf(directory, ranges).replace('"bridged"', '"aside"').replace("cnitest0", "cnitest1")
    (directory / "aside.d/1.conflist").write_text(own)
    pod = (await real.client.RunPodSandbox(request)).pod_sandbox_id
    other = await real.pod()
    assert await addresses(real, pod) == ["10.78.0.2"]
    assert await addresses(real, other) == ["10.77.0.2", "fd77::2"]
    real.daemon.kill()
    await real.client.close()
    (directory / "aside.d/1.conflist").unlink()  # what was made by it is known without it
    real.daemon.start()
    real.client = real.daemon.client()
    await real.remove(pod, other)
    assert not [name for name in os.listdir(directory / "leases/aside") if name.startswith("10.")]


async def test_a_del_that_fails_is_tried_again_by_the_next_cribd(real: Real) -> None:
    put(real)
    pod = await real.pod()
    refuse = real.daemon.directory / "refuse"
    refuse.touch()
    with pytest.raises(grpc.aio.AioRpcError, match="plugin bridge: DEL: not now"):
        await real.client.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    assert len(leased(real.daemon.directory)) == 2
    real.daemon.kill()
    subprocess.run(["ip", "netns", "delete", f"crib-{pod[:32]}"], check=True)
    real.daemon.start()
    refuse.unlink()
    await until(lambda: leased(real.daemon.directory) == [])
    await real.remove(pod)
    assert list((real.daemon.root / "cni/results").iterdir()) == []


async def test_an_add_that_fails_leaves_nothing(real: Real) -> None:
    put(real)
    (real.daemon.directory / "bin/portmap").write_text("#!/bin/sh\n[ $CNI_COMMAND = VERSION ] && exec true\nexit 3\n")
    (real.daemon.directory / "bin/portmap").chmod(0o755)
    told = await network_ready(real)
    assert not told.status
    assert "plugin portmap: VERSION" in told.message
    (real.daemon.directory / "bin/portmap").write_text(
        '#!/bin/sh\n[ $CNI_COMMAND = VERSION ] && exec echo \'{"supportedVersions": ["1.0.0"]}\'\n'
        "[ $CNI_COMMAND = ADD ] && { echo broken pipe wrench >&2; exit 3; }\nexit 0\n"
    )
    with pytest.raises(grpc.aio.AioRpcError, match=r"plugin portmap: ADD: exit code 3.*broken pipe wrench"):
        await real.pod()
    assert (await real.client.ListPodSandbox(pb.ListPodSandboxRequest())).items == []
    assert leased(real.daemon.directory) == []
    assert list((real.daemon.root / "cni/results").iterdir()) == []
    assert list(Path("/run/netns").iterdir()) == []


async def test_the_kubelets_pod_cidr_fills_the_template(real: Real) -> None:
    assert not (await network_ready(real)).status
    told = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="10.66.0.0/24,fd66::/64"))
    await real.client.UpdateRuntimeConfig(pb.UpdateRuntimeConfigRequest(runtime_config=told))
    assert (await network_ready(real)).status
    pod = await real.pod()
    assert await addresses(real, pod) == ["10.66.0.2", "fd66::2"]

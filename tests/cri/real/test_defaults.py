"""What a node's configuration gives to containers that ask for nothing, and to those that ask for something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.daemon import BUILTIN
from tests.cri.real.test_confined import field, held, statuses
from tests.cri.real.test_modes import linux
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay", "seccomp")]
TIME, IDS, START = "net.ipv4.tcp_keepalive_time", "kernel.shmmni", "net.ipv4.ip_unprivileged_port_start"


@pytest.fixture
def settings() -> str:
    return (
        f'{BUILTIN}[defaults]\ncapabilities = ["CAP_CHOWN", "CAP_KILL"]\nshm_bytes = 1048576\nseccomp = true\n'
        f'[defaults.rlimits]\nnofile = [200, 300]\ncore = [0, 0]\n[defaults.sysctls]\n"{TIME}" = "77"\n"{IDS}" = "78"\n'
    )


async def parameters(real: Real, container: str) -> list[str]:
    files = (f"/proc/sys/{name.replace('.', '/')}" for name in (TIME, IDS, START))
    return (await real.sh(container, f"cat {' '.join(files)}")).stdout.decode().split()


async def test_who_asks_for_nothing(real: Real) -> None:
    container = await real.run(await real.pod(), "sleep", "1000", linux=linux())
    for found in await statuses(real, container):
        assert held(found, "Bnd") == held(found, "Eff") == {"CAP_CHOWN", "CAP_KILL"}
        assert field(found, "Seccomp") == "2"
    for said in (
        Path(f"/proc/{await real.pid(container)}/limits").read_text(),
        (await real.sh(container, "cat /proc/self/limits")).stdout.decode(),
    ):
        limits = {line[:26].strip(): line[26:].split()[:2] for line in said.splitlines()}
        assert (limits["Max open files"], limits["Max core file size"]) == (["200", "300"], ["0", "0"])
        assert limits["Max file size"] == ["unlimited", "unlimited"], "what is not named is crib's own default"
    assert (await real.sh(container, "df -k /dev/shm | tail -n 1")).stdout.split()[1] == b"1024"
    assert await parameters(real, container) == ["77", "78", "0"]


async def test_who_asks_for_something_else(real: Real) -> None:
    config = real.pod_config()
    config.linux.sysctls.update({TIME: "99", START: "1000"})
    context = linux(
        capabilities=pb.Capability(add_capabilities=["SETUID"], drop_capabilities=["KILL"]),
        seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined),
    )
    container = await real.run(await real.pod(config), "sleep", "1000", linux=context)
    for found in await statuses(real, container):
        assert held(found, "Bnd") == {"CAP_CHOWN", "CAP_SETUID"}
        assert field(found, "Seccomp") == "0"
    assert await parameters(real, container) == ["99", "78", "1000"]


async def test_the_hosts_namespaces_have_the_hosts_parameters(real: Real) -> None:
    before = [Path("/proc/sys", *name.split(".")).read_text().strip() for name in (TIME, IDS, START)]
    config = real.pod_config(network=False)
    config.linux.security_context.namespace_options.ipc = pb.NODE
    options = linux(namespace_options=config.linux.security_context.namespace_options)
    container = await real.run(await real.pod(config), "sleep", "1000", linux=options)
    assert await parameters(real, container) == before

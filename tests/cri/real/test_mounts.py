"""Volumes end to end: their options, how they propagate, and that what can't be is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import cri_pb2 as pb
from tests.cri.real.conftest import Real
from tests.cri.real.test_modes import linux, refused
from tests.requires import requires

pytestmark = [pytest.mark.asyncio, requires("root", "busybox", "bridge", "overlay")]
BOTH_WAYS, FROM_HOST = (
    pb.MountPropagation.PROPAGATION_BIDIRECTIONAL,
    pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER,
)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory that is a shared mount, with a tmpfs on `sub`."""
    path = tmp_path / "shared"
    path.mkdir()
    mount("-t", "tmpfs", "tmpfs", str(path))
    mount("--make-shared", str(path))
    (path / "sub").mkdir()
    mount("-t", "tmpfs", "tmpfs", str(path / "sub"))
    yield path
    subprocess.run(["umount", "--recursive", str(path)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def volume(path: Path | str, at: str = "/v", **fields: Any) -> pb.Mount:
    return pb.Mount(container_path=at, host_path=str(path), **fields)


async def test_options(real: Real, tmp_path: Path) -> None:
    assert (await real.client.Status(pb.StatusRequest())).features.mount_options
    (tmp_path / "program").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "program").chmod(0o755)
    asked = ["nosuid", "nodev", "noexec", "noatime"]
    mounts = [volume(tmp_path, mount_options=asked), volume(tmp_path, "/plain")]
    container = await real.run(await real.pod(), "sleep", "1000", mounts=mounts)
    said = await real.sh(container, "/plain/program; /v/program; grep ' /v ' /proc/self/mountinfo")
    first, *others = said.stdout.decode().splitlines()
    assert first == "ran"
    assert len(others) == 1, "not from /v"
    assert set(asked) <= set(others[0].split()[5].split(","))
    assert (await real.status(container)).mounts[0].mount_options == asked


async def test_read_only_with_and_without_what_is_mounted_below(real: Real, shared: Path) -> None:
    handler = next(one for one in (await real.client.Status(pb.StatusRequest())).runtime_handlers if not one.name)
    mounts = [volume(shared, "/ro", readonly=True)]
    if handler.features.recursive_read_only_mounts:
        mounts.append(volume(shared, "/rro", readonly=True, recursive_read_only=True))
    container = await real.run(await real.pod(), "sleep", "1000", mounts=mounts)
    for path, code in {"/ro/x": 1, "/ro/sub/x": 0, "/rro/x": 1, "/rro/sub/x": 1}.items():
        assert (await real.sh(container, f"touch {path}")).exit_code == code, path


async def test_propagation(real: Real, shared: Path) -> None:
    config = real.pod_config()
    config.linux.security_context.privileged = True
    modes = {"/private": pb.MountPropagation.PROPAGATION_PRIVATE, "/slave": FROM_HOST, "/both": BOTH_WAYS}
    mounts = [volume(shared, at, propagation=mode) for at, mode in modes.items()]
    container = await real.run(await real.pod(config), "sleep", "1000", mounts=mounts, linux=linux(privileged=True))
    (shared / "late").mkdir()
    mount("-t", "tmpfs", "tmpfs", str(shared / "late"))
    (shared / "late/file").touch()
    for at in modes:
        assert ((await real.sh(container, f"test -e {at}/late/file")).exit_code == 0) == (at != "/private"), at
        own = f"{at}/own-{at[1:]}"
        said = await real.sh(container, f"mkdir {own} && mount -t tmpfs tmpfs {own} && touch {own}/file")
        assert said.exit_code == 0, said.stderr
        assert (shared / f"own-{at[1:]}/file").exists() == (at == "/both"), at


async def test_links_and_depth(real: Real, tmp_path: Path) -> None:
    """A source may be a link; a deeper target comes after what it lies in, whatever the order of the request."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "a/below").mkdir()
    (tmp_path / "link").symlink_to("b")
    mounts = [volume(tmp_path / "link", "/v/below"), volume(tmp_path / "a")]
    container = await real.run(await real.pod(), "sleep", "1000", mounts=mounts)
    assert (await real.sh(container, "ls /v /v/below")).stdout == b"/v:\na\nbelow\n\n/v/below:\nb\n"


async def test_more_than_the_process_may_open_files(real: Real, tmp_path: Path) -> None:
    mounts = [volume(tmp_path, f"/v/{number}") for number in range(1100)]
    container = await real.run(await real.pod(), "sleep", "1000", mounts=mounts)
    assert (await real.sh(container, "grep -c ' /v/' /proc/self/mountinfo")).stdout == b"1100\n"
    assert (await real.sh(container, "grep 'open files' /proc/1/limits | cut -c 27-30")).stdout == b"1024\n"


async def test_what_can_not_be_is_refused(real: Real, shared: Path, tmp_path: Path) -> None:
    private = shared / "sub"
    mount("--make-private", str(private))
    pod = await real.pod()
    cases = (
        (volume(private, propagation=BOTH_WAYS), "PROPAGATION_BIDIRECTIONAL needs a shared mount"),
        (volume(private, propagation=FROM_HOST), "PROPAGATION_HOST_TO_CONTAINER needs a shared or slave mount"),
        (volume(shared, readonly=True, recursive_read_only=True, propagation=FROM_HOST), "PROPAGATION_PRIVATE"),
        (volume(shared, recursive_read_only=True), "recursive_read_only needs readonly"),
        (volume(shared, mount_options=["exec", "noexec"]), "mount_options noexec and exec exclude each other"),
        (volume(shared, mount_options=["uid=0"]), "mount_options 'uid=0'"),
        (volume(shared, "/proc/self"), "'/proc/self': may not be mounted over"),
        (volume(f"{tmp_path}/../x"), "host_path"),
    )
    for number, (wrong, named) in enumerate(cases):
        code, said = await refused(real.create(pod, "true", name=f"c{number}", mounts=[wrong]))
        assert (code, named in said) == (grpc.StatusCode.INVALID_ARGUMENT, True), said
    assert not (await real.client.ListContainers(pb.ListContainersRequest())).containers

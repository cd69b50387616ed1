"""Requests and inputs that the tests of the translation start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cri.api import cri_pb2 as pb
from cri.translate import ContainerInput, Defaults, Handler, Host, HostDevice, PodPaths, ResolvedUser, container_to_spec
from cri.translate.capabilities import ALL
from runtime.images import Image, ImageConfig
from runtime.spec import Linux, Mount, Spec

HOST = Host(
    user_namespaces=True,
    idmapped_mounts=True,
    recursive_read_only=True,
    apparmor=False,
    selinux=False,
    capabilities=ALL,
    machine="x86_64",
    kernel=(6, 18),
)
DEFAULTS = Defaults(node_name="node-1")
PATHS = PodPaths(hosts="/pod/hosts", resolv_conf="/pod/resolv.conf", hostname="/pod/hostname", shm="/pod/shm")


@dataclass(frozen=True)
class Namespaces:
    network: str = "/proc/7/ns/net"
    ipc: str = "/proc/7/ns/ipc"
    uts: str = "/proc/7/ns/uts"
    pid: str | None = "/proc/8/ns/pid"
    user: str = ""


def image(**config: Any) -> Image:
    return Image(
        id="sha256:" + "1" * 64,
        repo_tags=("registry.test/app:1",),
        repo_digests=("registry.test/app@sha256:" + "2" * 64,),
        size_bytes=1234,
        config=ImageConfig(**{"cmd": ("sh",), **config}),
        layers=(),
        chain_id="",
        pinned=False,
        created="",
        manifest_digest="",
        diff_ids=(),
        architecture="amd64",
        os="linux",
        raw_config=b"{}",
    )


def sandbox(**fields: Any) -> pb.PodSandboxConfig:
    metadata = pb.PodSandboxMetadata(name="pod", namespace="default", uid="u-1", attempt=0)
    return pb.PodSandboxConfig(**{"metadata": metadata, "hostname": "pod", **fields})


def sandbox_with(context: pb.LinuxSandboxSecurityContext, **fields: Any) -> pb.PodSandboxConfig:
    return sandbox(linux=pb.LinuxPodSandboxConfig(security_context=context), **fields)


def container(**fields: Any) -> pb.ContainerConfig:
    metadata = pb.ContainerMetadata(name="main", attempt=0)
    return pb.ContainerConfig(**{"metadata": metadata, "image": pb.ImageSpec(image="sha256:1"), **fields})


def secured(resources: pb.LinuxContainerResources | None = None, **context: Any) -> pb.ContainerConfig:
    security = pb.LinuxContainerSecurityContext(**context)
    return container(linux=pb.LinuxContainerConfig(security_context=security, resources=resources))


def spec(
    config: pb.ContainerConfig | None = None,
    *,
    pod: pb.PodSandboxConfig | None = None,
    host: Host = HOST,
    handler: Handler | None = None,
    user: ResolvedUser | None = None,
    img: Image | None = None,
    namespaces: Namespaces | None = None,
    cgroup_version: int = 2,
    target_pid: str | None = None,
    seccomp_file: bytes | None = None,
    selinux_level: str = "",
    image_volumes: Mapping[str, str] | None = None,
    own_volumes: Mapping[str, str] | None = None,
    devices: Mapping[str, Sequence[HostDevice]] | None = None,
    host_devices: Mapping[str, HostDevice] | None = None,
    defaults: Defaults = DEFAULTS,
) -> Spec:
    return container_to_spec(
        ContainerInput(
            sandbox=sandbox() if pod is None else pod,
            config=container() if config is None else config,
            image=img or image(),
            paths=PATHS,
            namespaces=namespaces or Namespaces(),
            user=user or ResolvedUser(0, 0, (0,), "root", "/root"),
            cgroup_path="/kubepods/x",
            cgroup_version=cgroup_version,
            defaults=defaults,
            host=host,
            handler=handler or Handler(),
            sandbox_id="5" * 64,
            target_pid=target_pid,
            selinux_level=selinux_level,
            image_volumes=image_volumes or {},
            own_volumes=own_volumes or {},
            seccomp_file=seccomp_file,
            devices=devices or {},
            host_devices=host_devices or {},
        )
    )


def linux(made: Spec) -> Linux:
    assert made.linux is not None
    return made.linux


def mount_at(made: Spec, destination: str) -> Mount:
    (found,) = (mount for mount in made.mounts if mount.destination == destination)
    return found


Refusal = Callable[[], object]

"""A client of cribd's socket, its methods taken from the descriptors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message

from cri.api import cri_pb2 as pb
from cri.api import crib_pb2
from tests.limits import scaled


class Client:
    """`await client.Version(pb.VersionRequest(), timeout=1)`; raises grpc.aio.AioRpcError."""

    def __init__(self, target: str) -> None:
        options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 64 << 20)]
        options.append(("grpc.use_local_subchannel_pool", 1))  # not what an earlier client saw of a cribd that was gone
        self.channel = grpc.aio.insecure_channel(target, options=options)
        for services in (pb.DESCRIPTOR.services_by_name, crib_pb2.DESCRIPTOR.services_by_name):
            for service in services.values():
                for method in service.methods:
                    kind = f"{'stream' if method.client_streaming else 'unary'}_"
                    kind += "stream" if method.server_streaming else "unary"
                    made = getattr(self.channel, kind)(
                        f"/{service.full_name}/{method.name}",
                        request_serializer=_serialize,
                        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
                    )
                    self.__dict__.setdefault(method.name, made)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    async def close(self) -> None:
        await self.channel.close()


async def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    """Wait for what has no event to wait for."""
    async with asyncio.timeout(scaled(timeout_s)):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def _serialize(request: Message | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def pod_config(name: str = "pod", **fields: Any) -> pb.PodSandboxConfig:
    """A request that any runtime takes."""
    metadata = pb.PodSandboxMetadata(
        name=name, namespace="default", uid=f"uid-{name}", attempt=fields.pop("attempt", 0)
    )
    return pb.PodSandboxConfig(metadata=metadata, hostname=name, **fields)


def container_config(name: str = "c", *command: str, image: str = "busybox", **fields: Any) -> pb.ContainerConfig:
    """A request that any runtime takes; without a command the image's own."""
    metadata = pb.ContainerMetadata(name=name, attempt=fields.pop("attempt", 0))
    return pb.ContainerConfig(metadata=metadata, image=pb.ImageSpec(image=image), command=command, **fields)


async def run_pod(client: Client, config: pb.PodSandboxConfig | None = None) -> str:
    answer = await client.RunPodSandbox(pb.RunPodSandboxRequest(config=config or pod_config()))
    return str(answer.pod_sandbox_id)


async def create(client: Client, pod: str, config: pb.ContainerConfig | None = None) -> str:
    request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config or container_config())
    answer = await client.CreateContainer(request)
    return str(answer.container_id)


async def run(client: Client, pod: str, config: pb.ContainerConfig | None = None) -> str:
    """A started container."""
    container = await create(client, pod, config)
    await client.StartContainer(pb.StartContainerRequest(container_id=container))
    return container


async def status(client: Client, container: str) -> pb.ContainerStatus:
    answer = await client.ContainerStatus(pb.ContainerStatusRequest(container_id=container))
    found: pb.ContainerStatus = answer.status
    return found

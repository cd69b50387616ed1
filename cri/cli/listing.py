"""`crib ps` and `crib pods`."""

from __future__ import annotations

from argparse import Namespace

import msgspec

from cri.api import cri_pb2 as pb
from cri.cli.client import Client
from cri.cli.inventory import Inventory
from cri.cli.output import age, short, show

STATES = {
    pb.CONTAINER_CREATED: "created",
    pb.CONTAINER_RUNNING: "running",
    pb.CONTAINER_EXITED: "exited",
    pb.CONTAINER_UNKNOWN: "unknown",
}


class ContainerRow(msgspec.Struct, frozen=True, kw_only=True):
    """`exit_code` and `reason` are null until it has ended."""

    id: str
    name: str
    attempt: int
    pod_id: str
    pod: str
    namespace: str
    image: str
    image_id: str
    state: str
    exit_code: int | None
    reason: str | None
    created_ns: int
    labels: dict[str, str]


class PodRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    namespace: str
    uid: str
    attempt: int
    state: str
    network: str
    addresses: list[str]
    containers: int
    created_ns: int
    labels: dict[str, str]


def ps(client: Client, options: Namespace) -> int:
    """Containers: those that run, or all."""
    inventory = Inventory(client)
    listed = [c for c in inventory.containers if options.all or c.state == pb.CONTAINER_RUNNING]
    listed.sort(key=lambda container: -container.created_at)
    if options.quiet:
        for container in listed:
            print(container.id)
        return 0
    ended = [container.id for container in listed if container.state == pb.CONTAINER_EXITED]
    answers = client.call_each("ContainerStatus", [{"container_id": identifier} for identifier in ended])
    statuses = {answer.status.id: answer.status for answer in answers if answer is not None}
    rows = [_container_row(inventory, container, statuses.get(container.id)) for container in listed]
    columns = {
        "CONTAINER": lambda row: short(row.id),
        "NAME": lambda row: row.name,
        "POD": lambda row: row.pod,
        "IMAGE": lambda row: row.image,
        "STATE": lambda row: row.state if row.exit_code is None else f"exited ({row.exit_code})",
        "CREATED": lambda row: age(row.created_ns),
    }
    show(rows, columns, options.output == "json")
    return 0


def _container_row(inventory: Inventory, container: pb.Container, status: pb.ContainerStatus | None) -> ContainerRow:
    pod = inventory.pod_of(container)
    return ContainerRow(
        id=container.id,
        name=container.metadata.name,
        attempt=container.metadata.attempt,
        pod_id=container.pod_sandbox_id,
        pod=pod.metadata.name,
        namespace=pod.metadata.namespace,
        image=container.image.user_specified_image or container.image.image,
        image_id=container.image_id,
        state=STATES.get(container.state, "unknown"),
        exit_code=None if status is None else status.exit_code,
        reason=None if status is None else status.reason,
        created_ns=container.created_at,
        labels=dict(container.labels),
    )


def pods(client: Client, options: Namespace) -> int:
    """Pods, with their addresses."""
    inventory = Inventory(client)
    listed = sorted(inventory.pods, key=lambda pod: -pod.created_at)
    if options.quiet:
        for pod in listed:
            print(pod.id)
        return 0
    answers = client.call_each("PodSandboxStatus", [{"pod_sandbox_id": pod.id} for pod in listed])
    rows = [_pod_row(inventory, answer.status) for answer in answers if answer is not None]
    columns = {
        "POD": lambda row: short(row.id),
        "NAME": lambda row: row.name,
        "NAMESPACE": lambda row: row.namespace,
        "STATE": lambda row: row.state,
        "ADDRESS": lambda row: " ".join(row.addresses) or ("(host)" if row.network == "host" else "-"),
        "CONTAINERS": lambda row: str(row.containers),
        "CREATED": lambda row: age(row.created_ns),
    }
    show(rows, columns, options.output == "json")
    return 0


def _pod_row(inventory: Inventory, status: pb.PodSandboxStatus) -> PodRow:
    addresses = [status.network.ip, *(more.ip for more in status.network.additional_ips)]
    on_host = status.linux.namespaces.options.network == pb.NODE
    return PodRow(
        id=status.id,
        name=status.metadata.name,
        namespace=status.metadata.namespace,
        uid=status.metadata.uid,
        attempt=status.metadata.attempt,
        state="ready" if status.state == pb.SANDBOX_READY else "not-ready",
        network="host" if on_host else "pod",
        addresses=[address for address in addresses if address],
        containers=sum(container.pod_sandbox_id == status.id for container in inventory.containers),
        created_ns=status.created_at,
        labels=dict(status.labels),
    )

"""`crib stop` and `crib rm`."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from cri.api import cri_pb2 as pb
from cri.cli import failure
from cri.cli.client import CALL_S, Client
from cri.cli.failure import Failure
from cri.cli.inventory import Inventory
from cri.cli.output import show_json

LABEL: Final = "crib/run"
"""On pods that `crib run` made: stopping or removing the container means the pod."""
_RUN_UID: Final = re.compile(r"[0-9a-f]{32}")


class Done(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    kind: str
    name: str


def stop(client: Client, options: Namespace) -> int:
    """Stop containers, or pods with all that is in them."""
    inventory = Inventory(client)

    def one(thing: pb.Container | pb.PodSandbox) -> None:
        own = [thing] if isinstance(thing, pb.Container) else inventory.containers_of(thing)
        for container in own:
            if container.state == pb.CONTAINER_RUNNING:
                wait_s = max(0, options.time) + CALL_S
                client.call("StopContainer", timeout_s=wait_s, container_id=container.id, timeout=options.time)
        if whole := _pod_meant(inventory, thing):
            client.call("StopPodSandbox", pod_sandbox_id=whole.id)

    return _each(inventory, options, one)


def rm(client: Client, options: Namespace) -> int:
    """Remove containers, or pods with all that is in them."""
    inventory = Inventory(client)
    if options.all == bool(options.things):
        raise Failure("name what to remove, or give --all", failure.USAGE)
    if options.all:
        options.things = [pod.id for pod in inventory.pods]

    def one(thing: pb.Container | pb.PodSandbox) -> None:
        own = [thing] if isinstance(thing, pb.Container) else inventory.containers_of(thing)
        running = [container for container in own if container.state == pb.CONTAINER_RUNNING]
        if running and not options.force:
            name = running[0].metadata.name
            raise Failure(f"{inventory.describe(thing)}: container {name} is running: crib stop it, or crib rm -f")
        if whole := _pod_meant(inventory, thing):
            pod(client, whole.id)
        else:
            client.call("RemoveContainer", container_id=thing.id)

    return _each(inventory, options, one)


def pod(client: Client, pod_id: str) -> None:
    """Stop and remove a pod, and the log that `crib run` had it write (a kubelet cares for its own)."""
    logs = _own_logs(client, pod_id)
    client.call("StopPodSandbox", pod_sandbox_id=pod_id)
    client.call("RemovePodSandbox", pod_sandbox_id=pod_id)
    for log in logs:
        _remove_log(log)


def _each(inventory: Inventory, options: Namespace, act: Callable[[pb.Container | pb.PodSandbox], None]) -> int:
    """Do it to all that can be found; what failed first decides the exit code."""
    first: Failure | None = None
    done: list[Done] = []
    for given in options.things:
        try:
            thing = inventory.any(given)
            act(thing)
        except Failure as failed:
            if failed.code == failure.UNREACHABLE:
                raise
            if first is not None:
                failure.report(failed)
            first = first or failed
            continue
        kind = "container" if isinstance(thing, pb.Container) else "pod"
        done.append(Done(id=thing.id, kind=kind, name=thing.metadata.name))
        if options.output != "json":
            print(thing.metadata.name)
    if options.output == "json":
        show_json(done)
    if first is not None:
        raise first
    return 0


def _pod_meant(inventory: Inventory, thing: pb.Container | pb.PodSandbox) -> pb.PodSandbox | None:
    """The pod to act on: a pod itself, or that of the one container that `crib run` made."""
    if isinstance(thing, pb.PodSandbox):
        return thing
    whole = inventory.pod_of(thing)
    made_by_run = whole.labels.get(LABEL) == thing.metadata.name == whole.metadata.name
    return whole if made_by_run and len(inventory.containers_of(whole)) == 1 else None


def _own_logs(client: Client, pod_id: str) -> Sequence[str]:
    """Log files of the pod's containers, where `crib run` chose their directory: it has the name of the pod's uid."""
    pods = client.call("ListPodSandbox", filter=pb.PodSandboxFilter(id=pod_id)).items
    if not pods or LABEL not in pods[0].labels or not _RUN_UID.fullmatch(pods[0].metadata.uid):
        return []
    containers = client.call("ListContainers", filter=pb.ContainerFilter(pod_sandbox_id=pod_id)).containers
    answers = client.call_each("ContainerStatus", [{"container_id": container.id} for container in containers])
    paths = [answer.status.log_path for answer in answers if answer is not None]
    return [path for path in paths if os.path.basename(os.path.dirname(path)) == pods[0].metadata.uid]


def _remove_log(path: str) -> None:
    """The file, those it was rotated to, and the directory once that is empty. Best effort: the pod is gone."""
    directory, name = os.path.split(path)
    try:
        for entry in os.listdir(directory):
            if entry == name or entry.startswith(f"{name}."):
                os.unlink(os.path.join(directory, entry))
        os.rmdir(directory)
    except OSError:
        return

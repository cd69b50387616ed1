"""What is on the node, and which of it a person means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cri.api import cri_pb2 as pb
from cri.cli import failure
from cri.cli.client import Client
from cri.cli.failure import Failure
from cri.cli.output import short

T = TypeVar("T", pb.PodSandbox, pb.Container)
_HEX = re.compile(r"[0-9a-f]+")


class Inventory:
    """All pods and containers, as listed once.

    What a person gives is an id, a name, or a prefix of an id that fits nothing else; in this order. A container's name
    may be POD/NAME and a pod's NAMESPACE/NAME. Of a container that was restarted the newest is meant.
    """

    def __init__(self, client: Client) -> None:
        self.pods: Sequence[pb.PodSandbox] = client.call("ListPodSandbox").items
        self.containers: Sequence[pb.Container] = client.call("ListContainers").containers
        self._by_id = {pod.id: pod for pod in self.pods}

    def pod_of(self, container: pb.Container) -> pb.PodSandbox:
        """The container's pod; an empty one when it went between the two lists."""
        return self._by_id.get(container.pod_sandbox_id) or pb.PodSandbox(id=container.pod_sandbox_id)

    def containers_of(self, pod: pb.PodSandbox) -> list[pb.Container]:
        return [container for container in self.containers if container.pod_sandbox_id == pod.id]

    def any(self, given: str) -> pb.Container | pb.PodSandbox:
        """The container or pod. A name that both have means the container. Raises Failure."""
        return self._pick(given, "container or pod", self.containers, self.pods)

    def pod(self, given: str) -> pb.PodSandbox:
        """The pod; a container stands for its own. Raises Failure."""
        found = self._pick(given, "pod", self.containers, self.pods)
        return self.pod_of(found) if isinstance(found, pb.Container) else found

    def container(self, given: str) -> pb.Container:
        """The container; a pod stands for its only container, or the only one that runs. Raises Failure."""
        found = self._pick(given, "container", self.containers, self.pods)
        if isinstance(found, pb.Container):
            return found
        own = self._newest(self.containers_of(found))
        running = [container for container in own if container.state == pb.CONTAINER_RUNNING]
        for candidates in (own, running):
            if len(candidates) == 1:
                return candidates[0]
        if not own:
            raise Failure(f"pod {given} has no containers", failure.NOT_FOUND)
        names = ", ".join(sorted(container.metadata.name for container in own))
        raise Failure(f"pod {given} has {len(own)} containers: say which ({names})")

    def _pick(
        self, given: str, kind: str, containers: Sequence[pb.Container], pods: Sequence[pb.PodSandbox]
    ) -> pb.Container | pb.PodSandbox:
        everything: list[pb.Container | pb.PodSandbox] = [*containers, *pods]
        for thing in everything:
            if thing.id == given:
                return thing
        if named := self._newest([c for c in containers if given in self._container_names(c)]):
            return self._only(given, named)
        if called := [pod for pod in pods if given in (pod.metadata.name, _full_name(pod))]:
            return self._only(given, _latest(called, lambda pod: (pod.metadata.uid, pod.metadata.name)))
        if _HEX.fullmatch(given) and (prefixed := [thing for thing in everything if thing.id.startswith(given)]):
            return self._only(given, prefixed)
        raise Failure(f"no {kind} {given!r}: see crib ps -a and crib pods", failure.NOT_FOUND)

    def _only(self, given: str, found: Sequence[pb.Container | pb.PodSandbox]) -> pb.Container | pb.PodSandbox:
        if len(found) == 1:
            return found[0]
        texts = [f"{short(thing.id)} ({self.describe(thing)})" for thing in found[:5]]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise Failure(f"{given!r} fits {len(found)}: {', '.join(texts)}{more}: give more of the id")

    def describe(self, thing: pb.Container | pb.PodSandbox) -> str:
        """What it is and is called, for messages."""
        if isinstance(thing, pb.Container):
            return f"container {self.pod_of(thing).metadata.name}/{thing.metadata.name}"
        return f"pod {_full_name(thing)}"

    def _container_names(self, container: pb.Container) -> tuple[str, ...]:
        name, pod = container.metadata.name, self.pod_of(container)
        return name, f"{pod.metadata.name}/{name}", f"{_full_name(pod)}/{name}"

    def _newest(self, containers: Iterable[pb.Container]) -> list[pb.Container]:
        return _latest(containers, lambda c: (self.pod_of(c).metadata.uid or c.pod_sandbox_id, c.metadata.name))


def _latest(things: Iterable[T], identity: Callable[[T], tuple[str, str]]) -> list[T]:
    newest: dict[tuple[str, str], T] = {}
    for thing in sorted(things, key=lambda thing: thing.created_at):
        newest[identity(thing)] = thing
    return list(newest.values())


def _full_name(pod: pb.PodSandbox) -> str:
    return f"{pod.metadata.namespace}/{pod.metadata.name}"

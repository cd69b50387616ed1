"""crib's own service: what the `crib` command needs and the CRI has no call for."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Generator, Mapping
from typing import IO, Final, TypeVar

from cri.api import crib_pb2 as pb
from cri.container.volumes import owner
from cri.image.pull import pull
from cri.node import Node
from cri.rpc import Call, Handler
from runtime.errors import InvalidSpec, NotFound, of_disk
from runtime.images import Auth, Image, Progress
from runtime.linux.probe import FALLBACKS, Probes

_STATES: Final = {
    "waiting": pb.LayerState.LAYER_WAITING,
    "downloading": pb.LayerState.LAYER_DOWNLOADING,
    "unpacking": pb.LayerState.LAYER_UNPACKING,
    "done": pb.LayerState.LAYER_DONE,
    "exists": pb.LayerState.LAYER_EXISTS,
}
_CHUNK_BYTES: Final = 1 << 20

Item = TypeVar("Item")


class CribCalls:
    """Requests in, answers out."""

    def __init__(self, node: Node, probes: Probes) -> None:
        self._node = node
        self._probes = probes

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "Load": self.load,
            "Pull": self.pull,
            "Save": self.save,
            "Check": self.check,
            "Storage": self.storage,
            "Plan": self.plan,
            "Doctor": self.doctor,
            "Network": self.network,
            "CheckNetwork": self.check_network,
        }

    async def load(self, requests: AsyncIterator[pb.LoadRequest], call: Call) -> pb.LoadResponse:
        """The archive goes to a file beside the images, and from there into the store."""
        node = self._node
        try:
            with tempfile.NamedTemporaryFile(dir=node.images.spool) as file:
                async for request in requests:
                    await node.work(file.write, request.chunk)
                if not file.tell():
                    raise InvalidSpec("the archive is empty")
                images = await node.pull(self._load, file)
        except OSError as error:
            raise of_disk("load of an image", error) from error
        return pb.LoadResponse(images=[pb.LoadedImage(id=image.id, repo_tags=image.repo_tags) for image in images])

    def _load(self, file: IO[bytes]) -> list[Image]:
        file.seek(0, os.SEEK_SET)
        images: list[Image] = self._node.images.load(file)
        return images

    async def pull(self, request: pb.PullRequest, call: Call) -> AsyncIterator[pb.PullProgress]:
        if not request.image:
            raise InvalidSpec("image is missing")
        auth = Auth(
            username=request.username,
            password=request.password,
            auth=request.auth,
            identity_token=request.identity_token,
            registry_token=request.registry_token,
            server_address=request.server_address,
        )
        news: asyncio.Queue[Progress | None] = asyncio.Queue()
        task = asyncio.create_task(pull(self._node, request.image, auth, news.put_nowait))
        task.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (one := await news.get()) is not None:
                yield pb.PullProgress(
                    digest=one.digest,
                    state=_STATES.get(one.state, pb.LayerState.LAYER_WAITING),
                    current_bytes=one.current_bytes,
                    total_bytes=one.total_bytes,
                )
            image = await task
            yield pb.PullProgress(image_ref=image.id)
        finally:
            task.cancel()

    async def save(self, request: pb.SaveRequest, call: Call) -> AsyncIterator[pb.SaveChunk]:
        if not request.images:
            raise InvalidSpec("images is missing")
        async for chunk in self._each(self._node.images.save(list(request.images))):
            for first in range(0, len(chunk), _CHUNK_BYTES):
                yield pb.SaveChunk(chunk=chunk[first : first + _CHUNK_BYTES])

    async def check(self, request: pb.CheckRequest, call: Call) -> AsyncIterator[pb.CheckFinding]:
        async for found in self._each(self._node.images.check(repair=request.repair)):
            yield pb.CheckFinding(
                layer=found.layer,
                diff_id=found.diff_id,
                images=found.images,
                problem=found.problem,
                repaired=found.repaired,
            )

    async def _each(self, items: Generator[Item, None, None]) -> AsyncIterator[Item]:
        """What a blocking iterator gives, which is closed when the caller goes away."""
        step: asyncio.Future[Item | None] | None = None
        try:
            while True:
                step = asyncio.ensure_future(self._node.pull(next, items, None))
                item = await asyncio.shield(step)
                if item is None:
                    return
                yield item
        finally:
            if step is not None:
                await asyncio.wait([step])
            await self._node.pull(items.close)

    async def storage(self, request: pb.StorageRequest, call: Call) -> pb.StorageResponse:
        return await self._node.work(self._storage)

    def _storage(self) -> pb.StorageResponse:
        store = self._node.images
        images, sizes = store.list(), store.layers()
        containers = []
        for container, image in store.users().items():
            try:
                size_bytes, inodes = store.upper_usage(container)
                layers = store.rootfs(container).lowers
            except NotFound:
                continue  # it has just gone
            containers.append(
                pb.StoredContainer(
                    id=container,
                    image=image,
                    size_bytes=size_bytes,
                    inodes=inodes,
                    layers=layers,
                    volume=owner(container) != container,
                )
            )
        diff_ids = {
            name: diff_id for image in images for name, diff_id in zip(image.layers, image.diff_ids, strict=True)
        }
        return pb.StorageResponse(
            images=[
                pb.StoredImage(
                    id=image.id,
                    repo_tags=image.repo_tags,
                    repo_digests=image.repo_digests,
                    layers=image.layers,
                    pinned=image.pinned,
                    size_bytes=image.size_bytes,
                )
                for image in images
            ],
            layers=[
                pb.StoredLayer(name=name, diff_id=diff_ids.get(name, ""), size_bytes=used[0], inodes=used[1])
                for name, used in sorted(sizes.items())
            ],
            containers=containers,
        )

    async def plan(self, request: pb.PlanRequest, call: Call) -> pb.PlanResponse:
        node = self._node
        found = node.containers.find(request.id) or node.pods.find(request.id)
        if found is None:
            raise NotFound(f"no pod and no container {request.id}")
        timeline = node.store.timeline(found.id)
        if timeline is None:
            raise NotFound(f"{found.title} has no recorded start")
        return pb.PlanResponse(
            id=found.id,
            kind="pod" if node.pods.find(found.id) is found else "container",
            steps=[
                pb.PlanStep(
                    index=index,
                    phase=step.phase,
                    text=step.text,
                    started_ns=step.started_ns,
                    duration_ns=step.duration_ns,
                    error=step.error,
                )
                for index, step in enumerate(timeline.steps, 1)
            ],
            total_ns=timeline.total_ns,
        )

    async def doctor(self, request: pb.DoctorRequest, call: Call) -> pb.DoctorResponse:
        node = self._node
        network = await node.work(node.network.status)
        probes = [
            pb.Probe(name="kernel", ok=node.host.kernel >= (5, 15), detail=os.uname().release),
            pb.Probe(name="cgroup", ok=True, detail=f"version {node.cgroups.version}, {node.cgroups.driver} driver"),
            pb.Probe(name="network", ok=network.ready, detail=network.message or network.reason or "ready"),
            pb.Probe(
                name="recursive_read_only_mounts",
                ok=node.host.recursive_read_only,
                detail="mount_setattr(2), Linux 5.12",
                fallback="" if node.host.recursive_read_only else "requests for it are refused",
            ),
        ]
        for name in self._probes.__dataclass_fields__:
            ok = bool(getattr(self._probes, name))
            probes.append(pb.Probe(name=name, ok=ok, fallback="" if ok else FALLBACKS.get(name, "")))
        for kind, id, error in node.store.quarantined():
            probes.append(pb.Probe(name=f"record of {kind} {id[:12]}", ok=False, detail=error, fallback="set aside"))
        return pb.DoctorResponse(probes=probes)

    async def network(self, request: pb.NetworkRequest, call: Call) -> pb.NetworkResponse:
        found = await self._node.work(self._node.network.inventory)
        return pb.NetworkResponse(
            networks=[
                pb.NodeNetwork(name=one.name, kind=one.kind, current=one.current, ranges=one.ranges, detail=one.detail)
                for one in found.networks
            ],
            holds=[
                pb.NetworkHold(
                    network=hold.network,
                    pod=hold.pod.sandbox_id,
                    pod_name=hold.pod.name,
                    pod_namespace=hold.pod.namespace,
                    addresses=hold.addresses,
                    host_interface=hold.host_interface,
                    host_ports=[
                        pb.NetworkHostPort(
                            protocol=port.protocol,
                            host_ip=port.host_ip,
                            host_port=port.host_port,
                            container_port=port.container_port,
                        )
                        for port in hold.host_ports
                    ],
                    since_ns=hold.since_ns,
                    released=hold.released,
                )
                for hold in found.holds
            ],
            rules=[pb.NetworkRule(table=rule.table, chain=rule.chain, text=rule.text) for rule in found.rules],
        )

    async def check_network(self, request: pb.CheckNetworkRequest, call: Call) -> pb.CheckNetworkResponse:
        found = await self._node.work(self._node.network.check_host)
        return pb.CheckNetworkResponse(
            findings=[pb.NetworkFinding(name=one.name, ok=one.ok, detail=one.detail, fix=one.fix) for one in found]
        )

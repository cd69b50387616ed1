"""CreateContainer: all that can be decided, and all that can be made, before the container runs."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from cri.api import cri_pb2 as pb
from cri.container import host, log, volumes
from cri.container.container import Container
from cri.container.end import settle
from cri.container.remove import forget
from cri.container.start import prepare
from cri.state.records import ContainerId, ContainerRecord, ContainerState, SandboxId, UserRecord, VolumeRecord
from cri.translate.container import ContainerInput, check_container, container_to_spec
from cri.translate.fingerprint import difference
from cri.translate.logs import log_path
from cri.translate.mounts import PodPaths, own_volumes
from cri.translate.signals import stop_signal
from cri.translate.user import ResolvedUser
from runtime.errors import AlreadyExists
from runtime.images import Copying, Image, Owner, RootFs
from runtime.plan.tree import id_maps
from runtime.selinux import relabel
from runtime.spec import Spec

if TYPE_CHECKING:
    from cri.node import Node
    from cri.sandbox.pod import Pod

_logger = logging.getLogger(__name__)
encode_spec: Final = msgspec.json.Encoder().encode


async def create(node: Node, pod: Pod, config: pb.ContainerConfig) -> Container:
    """Make the container, or join or return the one that the same request has made.

    The work goes on when the caller gives up; its retry finds the result. Raises AlreadyExists where the metadata is
    another container's, NotFound for a missing image, WrongState for a pod that isn't ready, InvalidSpec.
    """
    container = _reserve(node, pod, config)
    if container.state is ContainerState.CREATING:
        await node.flights.join(("create", container.id), lambda: _make(node, container))
    return container


def _reserve(node: Node, pod: Pod, config: pb.ContainerConfig) -> Container:
    """The container of this name: the existing one if it is what is asked for, else a new one that now has the name."""
    pod.must_be_ready()
    check_container(config, pod.config)
    holder = node.names.holder(Container.name_of(pod, config.metadata))
    if holder is not None:
        container = node.containers.get(holder)
        if other := difference(container.config, config):
            raise AlreadyExists(f"container {container.id} has the same metadata, and differs in {other}")
        if container.state not in (ContainerState.CREATING, ContainerState.CREATED):
            raise AlreadyExists(f"container {container.id} has the same metadata, and is {container.state} already")
        return container
    id = ContainerId(node.new_id())
    record = ContainerRecord(
        id=id,
        sandbox_id=SandboxId(pod.id),
        config=config.SerializeToString(deterministic=True),
        image_id="",
        image_ref="",
        image_name=config.image.user_specified_image or config.image.image,
        state=ContainerState.CREATING,
        created_ns=node.now_ns(),
        cgroup_path=node.cgroup_of(pod, id),
        log_path=log_path(pod.config.log_directory, config.log_path) or "",
    )
    container = Container(record, pb.ContainerConfig.FromString(record.config), pod)
    node.store.put_container(record)
    node.names.reserve(container.name, id)
    node.containers.add(id, container)
    pod.containers[id] = container
    return container


@dataclass(frozen=True, slots=True)
class _Made:
    image: Image
    user: ResolvedUser
    spec: Spec
    rootfs: RootFs
    copying: Copying | None


async def _make(node: Node, container: Container) -> None:
    pod = container.pod
    try:
        async with pod.changing():
            pod.must_be_ready()
            held = await volumes.mount(node, container)
            made = await node.work(_build, node, container, held)
            if made.copying is not None:  # not by a worker, of whom others wait: it may take long
                await made.copying.run(node.config.limits.start_timeout_s, lambda: pod.stopping)
                await node.work(_label, node, container, made.spec)
            container.spec, container.rootfs = made.spec, made.rootfs
            user = made.user
            node.save_container(
                container,
                spec=encode_spec(made.spec),
                state=ContainerState.CREATED,
                image_id=made.image.id,
                image_ref=made.image.repo_digests[0] if made.image.repo_digests else made.image.id,
                image_name=_image_name(container.config.image, made.image),
                user=UserRecord(uid=user.uid, gid=user.gid, groups=user.additional_gids),
                volumes=held,
                stop_signal=stop_signal(container.config, made.image.config.stop_signal),
            )
    except Exception as error:
        await _abandon(node, container, error)
        raise
    asyncio.get_running_loop().call_soon(prepare, node, container)  # while the answer is on its way


def _build(node: Node, container: Container, held: tuple[VolumeRecord, ...]) -> _Made:
    """All of it that blocks: the image's files, the root file system, the log's directory, the cgroup."""
    config = container.config
    image = node.images.get(config.image.image)
    user = node.users.resolve(config.linux.security_context, image)
    spec = host.with_cdi_devices(config, container_to_spec(_given(node, container, image, user, held)))
    spec = host.with_hooks(config, spec, node.config.hooks_dirs)
    host.check_propagation(spec.mounts)
    host.check_seccomp(spec)
    host.relabel(config, spec)
    rootfs = node.images.prepare(container.id, image.id)
    assert spec.linux is not None
    copying = None
    if own := own_volumes(image.config.volumes, config.mounts):
        maps = id_maps(spec.linux.uid_mappings), id_maps(spec.linux.gid_mappings)
        copying = node.images.make_volumes(container.id, own, Owner(container.pod.monitor.namespaces.user, *maps))
        if copying is None:
            _label(node, container, spec)
    log.make_directory(container)
    node.cgroups.create(container.record.cgroup_path, spec.linux.resources)
    return _Made(image, user, spec, rootfs, copying)


def _label(node: Node, container: Container, spec: Spec) -> None:
    """The SELinux label of what the container has in the image's VOLUMEs is that of its other files."""
    if spec.linux is not None and spec.linux.mount_label:
        relabel(node.images.volumes(container.id), spec.linux.mount_label)


def _given(
    node: Node, container: Container, image: Image, user: ResolvedUser, held: tuple[VolumeRecord, ...]
) -> ContainerInput:
    """What the translation needs to know."""
    pod, config = container.pod, container.config
    handler = node.handlers.options(pod.record.handler)
    security = config.linux.security_context
    directory = node.directory(pod.id)
    own = own_volumes(image.config.volumes, config.mounts)
    return ContainerInput(
        sandbox=pod.config,
        sandbox_id=pod.id,
        selinux_level=pod.record.selinux_level,
        config=config,
        image=image,
        paths=PodPaths(
            hosts=str(directory / "hosts"),
            resolv_conf=str(directory / "resolv.conf"),
            hostname=str(directory / "hostname"),
            shm=pod.monitor.shm_path,
        ),
        namespaces=pod.monitor.namespaces,
        user=user,
        cgroup_path=container.record.cgroup_path,
        cgroup_version=node.cgroups.version,
        defaults=node.defaults,
        host=host.now(node.handlers.host(pod.record.handler)),
        handler=handler,
        pod=pod.plan,
        target_pid=host.target_pid(node, container),
        image_volumes={volume.target: volume.source for volume in held},
        own_volumes={path: f"{node.images.volumes(container.id)}/{number}" for number, path in enumerate(own)},
        seccomp_file=host.seccomp_file(security),
        devices=host.requested_devices(config),
        host_devices=host.every_device() if security.privileged else {},
    )


def _image_name(spec: pb.ImageSpec, image: Image) -> str:
    """What ContainerStatus calls the image: what the user asked for, if that can be told, else a tag of it."""
    if spec.user_specified_image:
        return spec.user_specified_image
    if image.id.startswith(spec.image) or image.id.removeprefix("sha256:").startswith(spec.image):
        return image.repo_tags[0] if image.repo_tags else image.id
    return spec.image


async def _abandon(node: Node, container: Container, error: Exception) -> None:
    """Undo what was made. What can't be undone now stays out of the lists, and is removed with the pod."""
    try:
        await settle(node, container)
        await node.work(node.images.discard, container.id)
    except Exception as failure:
        fields = {"container": container.id, "error": str(failure)}
        _logger.error("clean-up of a failed container failed", extra={"fields": fields})
        error.add_note(f"clean-up failed too: {failure}")
        node.names.release(container.name, container.id)
        return
    forget(node, container)

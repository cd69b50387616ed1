"""Containers as the CRI shows them."""

from __future__ import annotations

import json
import posixpath
from typing import TYPE_CHECKING, Final, cast

import msgspec
from google.protobuf import json_format

from cri.api import cri_pb2 as pb
from cri.container.start import spec_of
from cri.state.records import ContainerState
from cri.translate.signals import to_cri
from runtime.errors import NotFound

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

HIDDEN: Final = "…"
"""What stands for the value of an environment variable, which may be a secret."""


def listed(node: Node, wanted: pb.ContainerFilter) -> list[pb.Container]:
    """The containers that all of the filter's conditions hold for."""
    containers = list(node.containers)
    if wanted.id:
        found = node.containers.find(wanted.id)
        containers = [] if found is None else [found]
    if wanted.pod_sandbox_id:
        pod = node.pods.find(wanted.pod_sandbox_id)
        containers = [container for container in containers if container.pod is pod]
    state = wanted.state.state if wanted.HasField("state") else None
    labels = wanted.label_selector.items()
    return [
        container.listed
        for container in containers
        if container.shown
        and (state is None or container.listed.state == state)
        and all(container.config.labels.get(key) == value for key, value in labels)
    ]


def status(container: Container) -> pb.ContainerStatus:
    """What ContainerStatus tells."""
    record, config, listed = container.record, container.config, container.listed
    found = pb.ContainerStatus(
        id=container.id,
        metadata=listed.metadata,
        state=listed.state,
        created_at=record.created_ns,
        image=listed.image,
        image_ref=record.image_ref,
        image_id=record.image_id,
        labels=config.labels,
        annotations=config.annotations,
        mounts=config.mounts,
        log_path=record.log_path,
        stop_signal=cast(pb.Signal, to_cri(record.stop_signal)),
    )
    for mount in found.mounts:
        for volume in record.volumes:
            if volume.target == posixpath.normpath(mount.container_path):
                mount.image.image_ref = volume.image_id
    if record.state in (ContainerState.RUNNING, ContainerState.EXITED):
        found.started_at = record.started_ns
    if record.state is ContainerState.EXITED:
        found.finished_at = record.finished_ns
        found.exit_code = record.exit_code
        found.reason = record.reason
        found.message = record.message
    if config.linux.HasField("resources") or record.resources:
        found.resources.linux.CopyFrom(container.resources)
    if record.user is not None:
        user = record.user
        found.user.linux.uid, found.user.linux.gid = user.uid, user.gid
        found.user.linux.supplemental_groups.extend(user.groups)
    return found


def info(node: Node, container: Container) -> dict[str, str]:
    """The verbose part of ContainerStatus: one JSON object, without values of environment variables."""
    record, loss = container.record, container.log_loss
    config = json_format.MessageToDict(container.config, preserving_proto_field_name=True)
    for variable in config.get("envs", ()):
        variable["value"] = HIDDEN
    found: dict[str, object] = {
        "sandboxID": record.sandbox_id,
        "pid": record.pid if record.state is ContainerState.RUNNING else 0,
        "removing": container.removing,
        "runtimeType": runtime.path if (runtime := container.pod.record.runtime) else "crib",
        "runtimeHandler": container.pod.record.handler,
        "snapshotter": "overlay",
        "snapshotKey": container.id,
        "cgroupPath": record.cgroup_path,
        "logLoss": {"lines": loss.lines, "bytes": loss.size_bytes, "cause": loss.cause},
        "config": config,
    }
    try:
        spec = spec_of(node, container)
    except NotFound:
        pass
    else:
        env = tuple(f"{entry.partition('=')[0]}={HIDDEN}" for entry in spec.process.env)
        process = msgspec.structs.replace(spec.process, env=env)
        found["runtimeSpec"] = msgspec.to_builtins(msgspec.structs.replace(spec, process=process))
    return {"info": json.dumps(found)}

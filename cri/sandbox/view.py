"""Pods as the CRI shows them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from google.protobuf import json_format

from cri.api import cri_pb2 as pb

if TYPE_CHECKING:
    from cri.node import Node
    from cri.sandbox.pod import Pod


def listed(node: Node, wanted: pb.PodSandboxFilter) -> list[pb.PodSandbox]:
    """The pods that all of the filter's conditions hold for."""
    pods = list(node.pods)
    if wanted.id:
        found = node.pods.find(wanted.id)
        pods = [] if found is None else [found]
    state = wanted.state.state if wanted.HasField("state") else None
    labels = wanted.label_selector.items()
    return [
        pod.listed
        for pod in pods
        if (state is None or pod.listed.state == state)
        and all(pod.config.labels.get(key) == value for key, value in labels)
    ]


def status(pod: Pod) -> pb.PodSandboxStatus:
    """What PodSandboxStatus tells. A pod that isn't ready has no address any more."""
    listed, ips = pod.listed, pod.record.ips
    network = pb.PodSandboxNetworkStatus()
    if ips and listed.state == pb.PodSandboxState.SANDBOX_READY:
        network.ip = ips[0]
        network.additional_ips.extend(pb.PodIP(ip=ip) for ip in ips[1:])
    options = pod.config.linux.security_context.namespace_options
    return pb.PodSandboxStatus(
        id=pod.id,
        metadata=listed.metadata,
        state=listed.state,
        created_at=listed.created_at,
        network=network,
        linux=pb.LinuxPodSandboxStatus(namespaces=pb.Namespace(options=options)),
        labels=listed.labels,
        annotations=listed.annotations,
        runtime_handler=listed.runtime_handler,
    )


def info(node: Node, pod: Pod) -> dict[str, str]:
    """The verbose part of PodSandboxStatus: one JSON object."""
    namespaces = pod.running.namespaces if pod.running else None
    kinds = ("network", "ipc", "uts", "pid")
    found: dict[str, object] = {
        "pid": pod.running.monitor_pid if pod.running else 0,
        "initPid": pod.running.init_pid if pod.running else 0,
        "runtimeHandler": pod.record.handler,
        "runtimeType": pod.record.runtime.path if pod.record.runtime else "crib",
        "netns": pod.record.netns_path,
        "cgroupPath": pod.record.cgroup_path,
        "owes": list(pod.record.owes),
        "message": pod.record.message,
        "resources": _resources(pod),
        "config": json_format.MessageToDict(pod.config, preserving_proto_field_name=True),
        "runtimeSpec": {
            "hostname": pod.plan.hostname or "",
            "linux": {
                "cgroupsPath": pod.record.cgroup_path,
                "sysctl": dict(pod.plan.sysctls),
                "namespaces": [
                    {"type": kind, "path": path} for kind in kinds if namespaces and (path := getattr(namespaces, kind))
                ],
            },
        },
    }
    return {"info": json.dumps(found)}


def _resources(pod: Pod) -> dict[str, object]:
    """The pod's resources and overhead in force, as requested last."""
    linux = pod.config.linux
    now = pb.UpdatePodSandboxResourcesRequest(overhead=linux.overhead, resources=linux.resources)
    if pod.record.resources:
        now = pb.UpdatePodSandboxResourcesRequest.FromString(pod.record.resources)
    found: dict[str, object] = json_format.MessageToDict(now, preserving_proto_field_name=True)
    found.pop("pod_sandbox_id", None)
    return found

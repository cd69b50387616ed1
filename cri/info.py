"""The CRI's calls about the runtime itself: Version, Status, RuntimeConfig and UpdateRuntimeConfig."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import metadata
from typing import Final

import msgspec

from cri.api import cri_pb2 as pb
from cri.node import Node
from cri.rpc import Call, Handler

KUBELET_VERSION: Final = "0.1.0"
"""What the kubelet compares Version.version with."""
_logger = logging.getLogger(__name__)


def version() -> str:
    """This crib's version."""
    return metadata.version("crib")


class InfoCalls:
    """Requests in, answers out."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._version = version()

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "Version": self.version,
            "Status": self.status,
            "RuntimeConfig": self.runtime_config,
            "UpdateRuntimeConfig": self.update_runtime_config,
        }

    async def version(self, request: pb.VersionRequest, call: Call) -> pb.VersionResponse:
        return pb.VersionResponse(
            version=KUBELET_VERSION,
            runtime_name="crib",
            runtime_version=self._version,
            runtime_api_version="v1",
        )

    async def status(self, request: pb.StatusRequest, call: Call) -> pb.StatusResponse:
        node = self._node
        network = await node.work(node.network.status)
        lost = not node.engine.ready
        conditions = [
            pb.RuntimeCondition(
                type="RuntimeReady",
                status=not lost,
                reason="ZygoteLost" if lost else "",
                message="the process that makes pods is gone and is being started again; pods run on" if lost else "",
            ),
            pb.RuntimeCondition(
                type="NetworkReady", status=network.ready, reason=network.reason, message=network.message
            ),
        ]
        await node.work(node.handlers.refresh)
        return pb.StatusResponse(
            status=pb.RuntimeStatus(conditions=conditions),
            runtime_handlers=[
                pb.RuntimeHandler(
                    name=name,
                    features=pb.RuntimeHandlerFeatures(
                        recursive_read_only_mounts=host.recursive_read_only,
                        user_namespaces=host.user_namespaces,
                    ),
                )
                for name in node.handlers
                for host in [node.handlers.host(name)]
            ],
            features=pb.RuntimeFeatures(
                supplemental_groups_policy=True,
                mount_options=True,
                user_namespaces_host_network=node.host.user_namespaces,
            ),
            info=self._info() if request.verbose else {},
        )

    def _info(self) -> dict[str, str]:
        node = self._node
        running = {
            "version": self._version,
            "instance": node.config.instance,
            "bootId": node.boot_id,
            "cgroupVersion": node.cgroups.version,
            "pods": len(node.pods),
            "containers": len(node.containers),
            "quarantined": [{"kind": kind, "id": id, "error": error} for kind, id, error in node.store.quarantined()],
        }
        return {
            "config": msgspec.json.encode(node.config).decode(),
            "runtime": json.dumps(running),
        }

    async def runtime_config(self, request: pb.RuntimeConfigRequest, call: Call) -> pb.RuntimeConfigResponse:
        systemd = self._node.cgroups.driver == "systemd"
        driver = pb.CgroupDriver.SYSTEMD if systemd else pb.CgroupDriver.CGROUPFS
        return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def update_runtime_config(
        self, request: pb.UpdateRuntimeConfigRequest, call: Call
    ) -> pb.UpdateRuntimeConfigResponse:
        """Tell the network the node's pod CIDRs, separated by commas; the kubelet may also have none to tell."""
        if given := request.runtime_config.network_config.pod_cidr:
            _logger.info("pod CIDR of the kubelet", extra={"fields": {"pod_cidr": given}})
            cidrs = [cidr.strip() for cidr in given.split(",") if cidr.strip()]
            await self._node.work(self._node.network.set_pod_cidrs, cidrs)
        return pb.UpdateRuntimeConfigResponse()

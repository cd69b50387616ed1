"""RunPodSandbox: namespaces, address and files of a new pod."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from typing import TYPE_CHECKING

from cri.api import cri_pb2 as pb
from cri.sandbox import files, release
from cri.sandbox.lost import watch
from cri.sandbox.network import pin_of, wants
from cri.sandbox.pod import Pod
from cri.state.records import SandboxId, SandboxRecord, SandboxState
from cri.timing import Timing
from cri.translate.fingerprint import difference
from cri.translate.sandbox import sandbox_to_pod
from cri.translate.security import new_level
from cri.translate.sysctls import of_interface
from net import NetNs, PodIdentity
from runtime import selinux
from runtime.cgroup import Cgroups
from runtime.engine import Maps, PodStart
from runtime.errors import AlreadyExists
from runtime.removal import remove_tree
from runtime.spec import IDMapping

if TYPE_CHECKING:
    from cri.node import Node

_logger = logging.getLogger(__name__)


async def run(node: Node, config: pb.PodSandboxConfig, handler: str) -> Pod:
    """Make the pod, or join or return the one that the same request has made.

    The work goes on when the caller gives up; its retry finds the result. Raises AlreadyExists where the metadata is
    another pod's, InvalidSpec for a bad request.
    """
    timing = Timing()
    pod = _reserve(node, config, handler)
    if pod.record.state is SandboxState.MAKING:
        await node.flights.join(("run", pod.id), lambda: _make(node, pod, timing))
    return pod


def _reserve(node: Node, config: pb.PodSandboxConfig, handler: str) -> Pod:
    """The pod of this name: the existing one if it is what is asked for, else a new one, with its name reserved."""
    runtime = node.handlers.runtime(handler)
    level = ""
    if node.host.selinux:
        taken = {pod.record.selinux_level for pod in (*node.pods, *node.making.values())}
        level = new_level(taken, secrets.randbelow)
    plan = sandbox_to_pod(config, defaults=node.defaults, host=node.handlers.host(handler), level=level)
    if plan.selinux.process:
        selinux.check(plan.selinux.process)
    holder = node.names.holder(("sandbox", plan.name_key))
    if holder is not None:
        pod = node.making.get(holder) or node.pods.get(holder)
        if pod.record.state is not SandboxState.MAKING and not pod.ready:
            raise AlreadyExists(f"pod sandbox {pod.id} has the same metadata and is not ready: remove it first")
        other = difference(pod.config, config)
        if pod.record.handler != handler:
            other = f"runtime_handler: {pod.record.handler!r}, then {handler!r}"
        if other:
            raise AlreadyExists(f"pod sandbox {pod.id} has the same metadata, and differs in {other}")
        return pod
    id = SandboxId(node.new_id())
    join = node.cgroups.join_path
    if plan.cgroup_parent:
        cgroup_path = join(plan.cgroup_parent)
        init_cgroup = join(plan.cgroup_parent, id) if plan.pid else ""
        cgroups = _missing(node.cgroups, init_cgroup or cgroup_path)
    else:  # the parent is there, and nothing of this id is
        cgroup_path = join(node.cgroup_parent, id)
        init_cgroup = join(node.cgroup_parent, id, "init") if plan.pid else ""
        cgroups = (cgroup_path, init_cgroup) if init_cgroup else (cgroup_path,)
    record = SandboxRecord(
        id=id,
        config=config.SerializeToString(deterministic=True),
        handler=handler,
        runtime=runtime,
        state=SandboxState.MAKING,
        created_ns=node.now_ns(),
        boot_id=node.boot_id,
        cgroup_path=cgroup_path,
        init_cgroup=init_cgroup,
        cgroups=cgroups,
        network=plan.network,
        netns_path=pin_of(id) if plan.network else "",
        selinux_level=level,
        owes=tuple(part for part in release.ALL if plan.network or part != "network"),
    )
    pod = Pod(record, pb.PodSandboxConfig.FromString(record.config), plan)
    node.store.put_sandbox(record)
    node.names.reserve(pod.name, id)
    node.making[id] = pod
    return pod


def _missing(cgroups: Cgroups, path: str) -> tuple[str, ...]:
    """`path` and its ancestors as far as they aren't there, outermost first: what `create` is going to make."""
    missing: list[str] = []
    while path != "/" and not cgroups.exists(path):
        missing.insert(0, path)
        path = os.path.dirname(path)
    return tuple(missing)


def _map(mapping: IDMapping) -> Maps:
    return ((mapping.container_id, mapping.host_id, mapping.size),)


async def _make(node: Node, pod: Pod, timing: Timing) -> None:
    try:
        ips = await _start(node, pod, timing)
        changes = {"state": SandboxState.READY, "monitor_pid": pod.monitor.monitor_pid, "ips": ips}
        node.save(pod, timing.timeline(), **changes)
    except Exception as error:
        await _abandon(node, pod, error)
        raise
    finally:
        node.making.pop(pod.id, None)
    node.pods.add(pod.id, pod)
    watch(node, pod)


async def _start(node: Node, pod: Pod, timing: Timing) -> tuple[str, ...]:
    """Make all that the pod consists of; its addresses."""
    plan = pod.plan
    directory, init = node.directory(pod.id), pod.record.init_cgroup
    made: tuple[str, ...] = ()
    sysctls = {**node.network.pod_sysctls, **plan.sysctls} if plan.network else plan.sysctls
    interfaces = {name: value for name, value in sysctls.items() if of_interface(name)}

    def prepare() -> None:
        nonlocal made
        with timing.step("files", f"write hostname and resolv.conf in {directory}"):
            hostname = plan.etc_hostname(node.defaults.node_name)
            files.make(directory, hostname, plan.resolv_conf, host_network=not plan.network)
            files.own(directory, plan, "hostname", "resolv.conf", "hosts")
        if pod.record.cgroups:
            path = init or pod.record.cgroup_path
            with timing.step("cgroup", f"make {path}"):
                made = node.cgroups.create(path, None)

    async def start() -> None:
        with timing.step("monitor", "start a monitor with the pod's namespaces"):
            pod.running = await node.engine.start_pod(
                PodStart(
                    id=pod.id,
                    hostname=plan.hostname,
                    net=plan.network,
                    ipc=plan.ipc,
                    pid=plan.pid,
                    shm_bytes=plan.shm_bytes if plan.ipc else 0,
                    sysctls={name: value for name, value in sysctls.items() if name not in interfaces},
                    init_cgroup=node.cgroups.join_files(init) if init else (),
                    uids=_map(plan.user.uid) if plan.user else (),
                    gids=_map(plan.user.gid) if plan.user else (),
                    mount_label=plan.selinux.file,
                )
            )

    if init:  # its first process needs the cgroup
        await node.work(prepare)
        await start()
    else:
        done = await asyncio.gather(node.work(prepare), start(), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
    if late := tuple(path for path in made if path not in pod.record.cgroups):  # another pod removed a common parent
        node.save(pod, cgroups=(*late, *pod.record.cgroups))
    if not plan.network:
        return ()
    ips = await node.work(_connect, node, pod, timing)
    if interfaces:
        await pod.monitor.set_sysctls(interfaces)
    pod.monitor.release_network()
    return ips


def _connect(node: Node, pod: Pod, timing: Timing) -> tuple[str, ...]:
    """Give the pod its address, and its hosts file: the part of a start that waits for the network. Blocks."""
    meta, path = pod.config.metadata, pod.record.netns_path
    with timing.step("network", f"pin the network namespace at {path}"):
        node.pins.pin(pod.monitor.netns_fd, os.path.basename(path))
    identity = PodIdentity(sandbox_id=pod.id, name=meta.name, namespace=meta.namespace, uid=meta.uid)
    with timing.step("network", "attach to the pod network"):
        netns = NetNs(path=path, fd=pod.monitor.netns_fd, rtnl=pod.monitor.rtnl)
        attachment = node.network.attach(identity, netns, wants(pod, node.handlers.cni_conf_dir(pod.record.handler)))
    with timing.step("files", "write hosts"):
        files.add_hosts(node.directory(pod.id), pod.plan.hostname or node.defaults.node_name, attachment.ips)
        files.own(node.directory(pod.id), pod.plan, "hosts")
    return attachment.ips


async def _abandon(node: Node, pod: Pod, error: Exception) -> None:
    """Undo what was made. What can't be undone now stays, as a pod that isn't ready and can be removed again."""
    pod.stopping = True
    try:
        await release.release(node, pod)
        await node.work(remove_tree, node.directory(pod.id))
        node.store.delete(pod.id)
        node.names.release(pod.name, pod.id)
    except Exception as failure:
        _logger.error("clean-up of a failed pod failed", extra={"fields": {"sandbox": pod.id, "error": str(failure)}})
        error.add_note(f"clean-up failed too, pod sandbox {pod.id} is kept as not ready: {failure}")
        node.save(pod, state=SandboxState.NOTREADY, message=str(error), ips=())
        node.pods.add(pod.id, pod)

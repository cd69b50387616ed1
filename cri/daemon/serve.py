"""cribd once it is set up: the rooms put together, the socket, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

import grpc

from cri.api import cri_pb2 as pb
from cri.api import crib_pb2
from cri.config import DEFAULT_ROOT, Config
from cri.container.calls import ContainerCalls
from cri.crib.calls import CribCalls
from cri.daemon.directories import clear_socket
from cri.daemon.notify import notify
from cri.daemon.rules import guard
from cri.image.calls import ImageCalls
from cri.info import InfoCalls
from cri.node import Node
from cri.recovery import recover
from cri.rpc import MESSAGE_LIMIT_BYTES, generic_handler
from cri.sandbox.calls import SandboxCalls
from cri.sandbox.debts import pay
from cri.state.store import Store
from cri.stats.calls import StatsCalls
from cri.stats.collect import MetricsCalls
from cri.streaming.calls import StreamingCalls
from cri.streaming.server import StreamingServer
from cri.translate.capabilities import capabilities
from cri.translate.defaults import Host
from cri.translate.seccomp import seccomp
from net import BridgeConfig, CniConfig, NetworkConfig, open_network
from net.errors import CribError as NetError
from net.netns import Pins
from runtime import apparmor, selinux
from runtime.cgroup import Cgroups
from runtime.engine import Engine
from runtime.errors import CribError, Unsupported
from runtime.images import Images, ImagesConfig
from runtime.linux.mount import mount, umount
from runtime.linux.probe import Probes, probe
from runtime.seccomp import bpf
from runtime.zygote.launch import Zygote

_GRACE_S: Final = 10.0
_CHECKPOINT_S: Final = 30.0
_logger = logging.getLogger(__name__)


def serve(config: Config, cgroups: Cgroups, zygote: Zygote) -> int:
    """Serve until SIGTERM or SIGINT; the exit status."""
    sys.setswitchinterval(0.001)  # a worker thread that waits for the loop's turn is a start that waits
    try:
        return asyncio.run(_serve(config, cgroups, zygote))
    except (CribError, NetError, OSError) as error:
        _logger.error("cribd can't run", extra={"fields": {"error": str(error)}})
        return 1


async def _serve(config: Config, cgroups: Cgroups, zygote: Zygote) -> int:
    began = time.monotonic()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    clear_socket(config.socket)
    probes = probe(config.root)
    async with contextlib.AsyncExitStack() as stack:
        store = Store(Path(config.root, "state.db"))
        engine = Engine(Path(config.state), zygote, probes)
        stack.callback(engine.close)
        images = Images(Path(config.root), _images(config))
        images.open()
        stack.callback(images.close)
        network = open_network(config.instance, Path(config.root, "net"), _network(config))
        stack.callback(network.close)
        node = Node(config, store, engine, images, network, cgroups, Pins(mount, umount), _host(config, probes))
        stack.push_async_callback(node.close, _GRACE_S)
        if node.host.apparmor:
            default = await node.work(apparmor.load_default)
            node.defaults = dataclasses.replace(node.defaults, apparmor_default=default)
        await node.work(node.handlers.refresh)
        await node.work(network.setup)
        await recover(node)
        streaming = StreamingServer(node)
        await streaming.start()
        if node.metrics:
            node.metrics.serve(config.metrics.address, config.metrics.port)
            stack.callback(node.metrics.close)
        stack.push_async_callback(streaming.close)
        server = make_server(node, probes, streaming)
        await listen(server, config)
        fields = {"listen": config.listen, "pods": len(node.pods), "s": f"{time.monotonic() - began:.2f}"}
        _logger.info("ready", extra={"fields": fields})
        notify("READY=1")
        keeper = asyncio.create_task(_checkpoints(node))
        debts = asyncio.create_task(pay(node))
        rules = asyncio.create_task(guard(node))
        await node.work(_warm_up, node)
        gc.collect()
        gc.freeze()
        await stop.wait()
        notify("STOPPING=1")
        _logger.info("stopping: pods keep running")
        keeper.cancel()
        debts.cancel()
        rules.cancel()
        node.events.close()
        await server.stop(_GRACE_S)
        config.socket.unlink(missing_ok=True)
        left = len(node.pods)
        if not left:
            await node.work(network.teardown)
    if not left:  # the zygote has ended, too
        cgroups.remove(cgroups.join_path(node.cgroup_parent))
    return 0


async def listen(server: grpc.aio.Server, config: Config) -> None:
    """Serve on the configured socket, for root alone. Raises CribError."""
    old = os.umask(0o177)
    try:
        if not server.add_insecure_port(config.listen):
            raise CribError(f"can't listen on {config.listen}")
        await server.start()
    finally:
        os.umask(old)


def make_server(node: Node, probes: Probes, streaming: StreamingServer) -> grpc.aio.Server:
    """All services of the socket, not listening yet."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
            ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
            ("grpc.so_reuseport", 0),
        ]
    )
    services = pb.DESCRIPTOR.services_by_name
    on_call = node.metrics.call if node.metrics else None
    runtime = {
        **InfoCalls(node).handlers(),
        **SandboxCalls(node).handlers(),
        **ContainerCalls(node).handlers(),
        **StreamingCalls(node, streaming).handlers(),
        **StatsCalls(node).handlers(),
        **MetricsCalls(node).handlers(),
        **node.events.handlers(),
    }
    server.add_generic_rpc_handlers(
        (
            generic_handler(services["RuntimeService"], runtime, on_call),
            generic_handler(services["ImageService"], ImageCalls(node).handlers(), on_call),
            generic_handler(crib_pb2.DESCRIPTOR.services_by_name["Crib"], CribCalls(node, probes).handlers()),
        )
    )
    return server


def _warm_up(node: Node) -> None:
    """Compile the usual seccomp filter now, and not in the first start of a container (about 50 ms)."""
    context = pb.LinuxContainerSecurityContext(seccomp=pb.SecurityProfile())
    bounding = capabilities(pb.Capability(), default=node.defaults.capabilities, privileged=False, uid=0).bounding
    profile = seccomp(context, file=None, capabilities=bounding, machine=node.host.machine, kernel=node.host.kernel)
    try:
        if profile is not None:
            bpf(profile)
    except (CribError, OSError) as error:
        _logger.warning("no seccomp filters", extra={"fields": {"error": str(error)}})


async def _checkpoints(node: Node) -> None:
    """Keep the records' log short."""
    while True:
        await asyncio.sleep(_CHECKPOINT_S)
        if node.store.checkpoint_due:
            try:
                await node.work(node.store.checkpoint)
            except Exception as error:
                _logger.warning("checkpoint of the records failed", extra={"fields": {"error": str(error)}})


def _host(config: Config, probes: Probes) -> Host:
    if config.selinux and not selinux.enabled():
        raise Unsupported("key selinux: this kernel has no SELinux on, or no policy")
    return Host(
        selinux=config.selinux,
        selinux_types=selinux.types(),
        user_namespaces=probes.user_namespaces,
        idmapped_mounts=probes.idmapped_mounts,
        apparmor=apparmor.enabled(),
    )


def _images(config: Config) -> ImagesConfig:
    images = config.images
    return ImagesConfig(
        hosts_dir=Path(images.hosts_dir),
        max_parallel=images.max_parallel,
        max_ranges=images.max_ranges,
        progress_timeout_s=images.progress_timeout_s,
        pinned=images.pinned,
        auth_file=Path(images.auth_file) if images.auth_file else None,
        verifiers=Path(images.verifiers) if images.verifiers else None,
        verifier_timeout_s=images.verifier_timeout_s,
        containers=Path(images.containers_dir) if images.containers_dir else None,
        layer_limit_bytes=images.layer_limit_bytes,
        unpacked_limit_bytes=images.unpacked_limit_bytes,
        ratio_limit=images.ratio_limit,
        entries_limit=images.entries_limit,
    )


def _network(config: Config) -> NetworkConfig:
    network = config.network
    bridge = BridgeConfig(
        bridge=network.bridge,
        subnet=network.subnet,
        subnet6=network.subnet6,
        mtu=network.mtu,
        masquerade=network.masquerade,
    )
    cache_dir = network.cni_cache_dir
    if not cache_dir:
        cache_dir = CniConfig().cache_dir if Path(config.root) == DEFAULT_ROOT else str(Path(config.root, "cni"))
    cni = CniConfig(
        conf_dir=network.cni_conf_dir,
        plugin_dirs=network.cni_plugin_dirs,
        cache_dir=cache_dir,
        template=network.cni_template,
        timeout_s=network.cni_timeout_s,
    )
    return NetworkConfig(plugin=network.plugin, bridge=bridge, cni=cni)

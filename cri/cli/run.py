"""`crib run`: a pod with one container, as a kubelet would ask for it."""

from __future__ import annotations

import os
import posixpath
import re
import signal
import sys
import uuid
from argparse import Namespace
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

import msgspec

from cri.api import cri_pb2 as pb
from cri.cli import failure, remove
from cri.cli.client import Client
from cri.cli.failure import Failure
from cri.cli.image import fetch
from cri.cli.log import has_ended, path_of, write
from cri.cli.logfile import Line, Log, follow
from cri.cli.output import short, show_json
from cri.cli.remove import LABEL

STOP_S: Final = 10
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
_SIZE: Final = re.compile(r"(\d+)([kmgKMG]?)i?[bB]?")
_PORT: Final = re.compile(
    r"((?P<address>[0-9.]+|\[[0-9a-fA-F:]+\]):)?(?P<host>\d{1,5}):(?P<pod>\d{1,5})(/(?P<protocol>tcp|udp|sctp))?"
)
_PROPAGATION: Final = {
    "private": pb.PROPAGATION_PRIVATE,
    "rprivate": pb.PROPAGATION_PRIVATE,
    "slave": pb.PROPAGATION_HOST_TO_CONTAINER,
    "rslave": pb.PROPAGATION_HOST_TO_CONTAINER,
    "shared": pb.PROPAGATION_BIDIRECTIONAL,
    "rshared": pb.PROPAGATION_BIDIRECTIONAL,
}
# What a kubelet asks for, for a container that asks for nothing.
_MASKED: Final = (
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
    "/sys/devices/virtual/powercap",
)  # fmt: skip
_READONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class Started(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    pod_id: str


class Ended(Started, frozen=True, kw_only=True):
    exit_code: int
    reason: str
    stdout: str
    stderr: str


class Signals:
    """From its making on, SIGINT and SIGTERM are counted and end nothing: an exception could get lost inside gRPC."""

    def __init__(self) -> None:
        self.seen = 0
        self.handled = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background jobs have it
                signal.signal(number, self._count)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.seen += 1


def run(client: Client, options: Namespace) -> int:
    """Run a pod with a container; waits for its end and answers with its exit code, unless detached."""
    if options.detach and options.rm:
        raise Failure("--rm and --detach exclude each other: nobody would be there to remove it", failure.USAGE)
    if (options.interactive or options.tty) and not options.detach:
        raise Failure("-i and -t need --detach, and then crib attach", failure.USAGE)
    name = _name(options)
    config = _container(name, options)
    image = _image(client, options)
    for pod in client.call("ListPodSandbox", filter=pb.PodSandboxFilter(label_selector={LABEL: name})).items:
        raise Failure(f"there is a pod {name} already, {short(pod.id)}: crib rm -f {name}, or choose another --name")
    config.image.CopyFrom(pb.ImageSpec(image=image.id, user_specified_image=options.image))
    signals = Signals()
    started = _start(client, _sandbox(name, options), config)
    if options.detach:
        if options.output == "json":
            show_json(started)
        else:
            print(started.id)
        return 0
    return _attend(client, started, options, signals)


def _start(client: Client, sandbox: pb.PodSandboxConfig, config: pb.ContainerConfig) -> Started:
    """Everything, or nothing is left."""
    pod_id = client.call("RunPodSandbox", config=sandbox).pod_sandbox_id
    try:
        container_id = client.call(
            "CreateContainer", pod_sandbox_id=pod_id, config=config, sandbox_config=sandbox
        ).container_id
        client.call("StartContainer", container_id=container_id)
    except BaseException:
        remove.pod(client, pod_id)
        raise
    return Started(id=container_id, name=config.metadata.name, pod_id=pod_id)


def _attend(client: Client, started: Started, options: Namespace, signals: Signals) -> int:
    """Print what it prints until it ends; when this command is told to end, the container is, and it is waited for."""
    if sys.stderr.isatty() and options.output != "json":
        print(f"container {started.name} ({short(started.id)})", file=sys.stderr)
    status = pb.ContainerStatus()
    collected: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    asked = has_ended(client, started.id)
    log = Log(path_of(client, pb.Container(id=started.id)))

    def ended() -> bool:
        _pass_on(client, started.id, signals)
        return asked()

    def lines() -> Iterator[Line]:
        for line in follow(log, ended):
            _pass_on(client, started.id, signals)
            yield line

    try:
        if options.output != "json":
            write(lines())
        else:
            for line in lines():
                collected[line.stream] += line.text
        status = client.call("ContainerStatus", container_id=started.id).status
    finally:
        log.close()
        if status.state != pb.CONTAINER_EXITED:
            client.call("StopContainer", container_id=started.id, timeout=0)
        if options.rm:
            remove.pod(client, started.pod_id)
        else:
            client.call("StopPodSandbox", pod_sandbox_id=started.pod_id)
    if status.reason not in ("", "Completed", "Error") and options.output != "json":
        print(f"crib: {status.reason}{status.message and ': '}{failure.printable(status.message)}", file=sys.stderr)
    if options.output == "json":
        texts = {stream: text.decode("utf-8", "backslashreplace") for stream, text in collected.items()}
        show_json(
            Ended(
                id=started.id,
                name=started.name,
                pod_id=started.pod_id,
                exit_code=status.exit_code,
                reason=status.reason,
                **texts,
            )
        )
    return int(status.exit_code)


def _pass_on(client: Client, container_id: str, signals: Signals) -> None:
    """The first signal is the container's stop, a second one its end."""
    while signals.seen > signals.handled:
        grace_s = 0 if signals.handled else STOP_S
        signals.handled += 1
        client.call_behind("StopContainer", container_id=container_id, timeout=grace_s)


def _image(client: Client, options: Namespace) -> pb.Image:
    spec = pb.ImageSpec(image=options.image)
    image: pb.Image = client.call("ImageStatus", image=spec).image
    if options.pull == "always" or (not image.id and options.pull == "missing"):
        spec.image = fetch(client, options.image, options.quiet)
        image = client.call("ImageStatus", image=spec).image
    if not image.id:
        raise Failure(f"no image {options.image!r} here: crib pull it, or crib load an archive", failure.NOT_FOUND)
    return image


def _name(options: Namespace) -> str:
    if options.name:
        if not _NAME.fullmatch(options.name):
            raise Failure(
                f"--name {options.name!r}: lower-case letters, digits, - and . (at most 63, not at an end)",
                failure.USAGE,
            )
        return str(options.name)
    base = posixpath.basename(options.image.partition("@")[0]).partition(":")[0].lower()
    base = re.sub(r"[^a-z0-9]+", "-", base)[:48].strip("-") or "pod"
    return f"{base}-{uuid.uuid4().hex[:6]}"


def _sandbox(name: str, options: Namespace) -> pb.PodSandboxConfig:
    identifier = uuid.uuid4().hex
    on_host = options.net == "host"
    return pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=name, uid=identifier, namespace="default"),
        hostname="" if on_host else name,
        log_directory=posixpath.join(os.path.abspath(options.log_dir), identifier),
        port_mappings=[_port(text) for text in options.publish],
        labels={LABEL: name, **_pairs("--label", options.label)},
        linux=pb.LinuxPodSandboxConfig(
            cgroup_parent=options.cgroup_parent,
            security_context=pb.LinuxSandboxSecurityContext(
                namespace_options=_namespaces(options),
                privileged=options.privileged,
                seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
            ),
        ),
    )


def _namespaces(options: Namespace) -> pb.NamespaceOption:
    return pb.NamespaceOption(network=pb.NODE if options.net == "host" else pb.POD, pid=pb.CONTAINER, ipc=pb.POD)


def _container(name: str, options: Namespace) -> pb.ContainerConfig:
    context = pb.LinuxContainerSecurityContext(
        namespace_options=_namespaces(options), privileged=options.privileged, readonly_rootfs=options.read_only
    )
    if not options.privileged:
        context.masked_paths.extend(_MASKED)
        context.readonly_paths.extend(_READONLY)
        context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    if options.user:
        user, _, group = options.user.partition(":")
        if user.isdigit():
            context.run_as_user.value = int(user)
        else:
            context.run_as_username = user
        if group:
            context.run_as_group.value = _number("--user", group)
    resources = pb.LinuxContainerResources()
    if options.memory:
        resources.memory_limit_in_bytes = _bytes(options.memory)
    if options.cpus:
        resources.cpu_period, resources.cpu_quota = 100_000, int(options.cpus * 100_000)
    return pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=name),
        command=[options.entrypoint] if options.entrypoint else [],
        args=options.command,
        working_dir=options.workdir,
        envs=[pb.KeyValue(key=key, value=value) for key, value in _environment(options.env)],
        mounts=[_mount(text) for text in options.volume],
        labels={LABEL: name},
        log_path=f"{name}.log",
        stdin=options.interactive,
        tty=options.tty,
        linux=pb.LinuxContainerConfig(resources=resources, security_context=context),
    )


def _environment(given: list[str]) -> list[tuple[str, bytes]]:
    """KEY=VALUE, or KEY alone for the caller's own value."""
    found = []
    for text in given:
        key, separator, value = text.partition("=")
        if not key:
            raise Failure("--env: a variable without a name", failure.USAGE)
        if not separator:
            if key not in os.environ:
                raise Failure(f"--env {key}: not set here, and no value given", failure.USAGE)
            value = os.environ[key]
        found.append((key, os.fsencode(value)))
    return found


def _mount(text: str) -> pb.Mount:
    """SOURCE:TARGET[:OPTION,…]."""
    source, _, rest = text.partition(":")
    target, _, options = rest.partition(":")
    if not source or not target.startswith("/"):
        raise Failure(f"--volume {text!r}: not SOURCE:/TARGET[:ro,rslave,…]", failure.USAGE)
    fields: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        if option in _PROPAGATION:
            fields["propagation"] = _PROPAGATION[option]
        elif option in ("ro", "rro"):
            fields |= {"readonly": True, "recursive_read_only": option == "rro"}
        elif option != "rw":
            raise Failure(
                f"--volume {text!r}: no option {option!r} (ro, rw, rro, private, slave, shared)", failure.USAGE
            )
    return pb.Mount(host_path=os.path.abspath(source), container_path=target, **fields)


def _port(text: str) -> pb.PortMapping:
    """[ADDRESS:]HOST-PORT:POD-PORT[/PROTOCOL]; an IPv6 address in brackets."""
    match = _PORT.fullmatch(text)
    if not match:
        raise Failure(f"--publish {text!r}: not [ADDRESS:]PORT:PORT[/tcp, /udp or /sctp]", failure.USAGE)
    return pb.PortMapping(
        protocol=(match["protocol"] or "tcp").upper(),
        host_ip=(match["address"] or "").strip("[]"),
        host_port=int(match["host"]),
        container_port=int(match["pod"]),
    )


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise Failure(f"{option} {text!r}: not KEY=VALUE", failure.USAGE)
    return {key: value for key, _, value in (text.partition("=") for text in given)}


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if not match:
        raise Failure(f"--memory {text!r}: not a size like 512Mi", failure.USAGE)
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]


def _number(option: str, text: str) -> int:
    if not text.isdigit():
        raise Failure(f"{option} {text!r}: not a number", failure.USAGE)
    return int(text)

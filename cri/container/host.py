"""What a container's request names on the host, looked up so that the translation needn't: blocks, in a worker."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from cri.api import cri_pb2 as pb
from cri.state.records import ContainerState
from cri.translate import cdi, hooks, propagation, seccomp
from cri.translate.defaults import Host
from cri.translate.devices import HostDevice, paths
from cri.translate.field import show
from cri.translate.namespaces import TARGET
from runtime import apparmor, selinux
from runtime.errors import InvalidSpec, WrongState
from runtime.seccomp import bpf
from runtime.spec import Mount, Spec

if TYPE_CHECKING:
    from cri.container.container import Container
    from cri.node import Node

_DEVICES_LIMIT: Final = 4096
_NAMES_LIMIT: Final = 65536
_OWN_DEVICES: Final = frozenset(("/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd", "/dev/console"))


def now(known: Host) -> Host:
    """The host with the AppArmor profiles that are loaded at this moment."""
    if not known.apparmor:
        return known
    try:
        return dataclasses.replace(known, apparmor_profiles=apparmor.loaded())
    except OSError:  # securityfs isn't mounted any more: the kernel will tell
        return known


def requested_devices(config: pb.ContainerConfig) -> dict[str, tuple[HostDevice, ...]]:
    """What each device path of the request is: itself, or all devices below where it is a directory."""
    return {path: tuple(found for _, found in _devices(path)) for path in paths(config.devices)}


def every_device() -> dict[str, HostDevice]:
    """All devices below /dev by path, but for what every container has of its own."""
    return {path: found for path, found in _devices("/dev") if os.path.dirname(path) not in _OWN_DEVICES}


def _devices(path: str) -> list[tuple[str, HostDevice]]:
    real = os.path.realpath(path)
    if not os.path.isdir(real):
        found = _device(real, "")
        return [(path, found)] if found else []
    devices: list[tuple[str, HostDevice]] = []
    seen = 0
    for directory, below, names in os.walk(real):
        seen += len(below) + len(names)
        if seen > _NAMES_LIMIT:
            raise InvalidSpec(f"devices.host_path {path!r}: holds more than {_NAMES_LIMIT} names")
        below[:] = [name for name in below if os.path.join(directory, name) not in _OWN_DEVICES]
        for name in names:
            whole = os.path.join(directory, name)
            if whole not in _OWN_DEVICES and (found := _device(whole, os.path.relpath(whole, real))):
                devices.append((whole, found))
            if len(devices) > _DEVICES_LIMIT:
                raise InvalidSpec(f"devices.host_path {path!r}: holds more than {_DEVICES_LIMIT} devices")
    return devices


def _device(path: str, below: str) -> HostDevice | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        return None
    return HostDevice(
        type="c" if stat.S_ISCHR(status.st_mode) else "b",
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        below=below,
    )


def seccomp_file(security: pb.LinuxContainerSecurityContext) -> bytes | None:
    """The profile file that the request names; None where it names none, or one that isn't there."""
    path = seccomp.localhost_file(security)
    if path is None:
        return None
    try:
        return _read(path, seccomp.FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidSpec(f"seccomp profile {path!r}: {error.strerror}") from error


def with_cdi_devices(config: pb.ContainerConfig, spec: Spec, directories: tuple[str, ...] = cdi.DIRECTORIES) -> Spec:
    """The spec with the CDI devices that the request names. Their files are read each time: they may have changed."""
    names = cdi.requested(config)
    if not names:
        return spec
    edits = cdi.resolve(names, list(_cdi_files(directories)))
    found = {path: tuple(device for _, device in _devices(path)) for path in cdi.paths(edits)}
    return cdi.apply(spec, edits, found, hooks=True)


def with_hooks(config: pb.ContainerConfig, spec: Spec, directories: tuple[str, ...]) -> Spec:
    """The spec with the hooks of the node. Their files are read each time, a later directory's in place of an earlier
    one's of the same name, in the order of their names. Raises InvalidSpec for a broken one."""
    paths: dict[str, str] = {}
    for directory in directories:
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        paths |= {name: os.path.join(directory, name) for name in names if name.endswith(".json")}
    if not paths:
        return spec
    files = []
    for _, path in sorted(paths.items()):
        try:
            files.append(hooks.parse(path, _read(path, hooks.FILE_LIMIT_BYTES)))
        except OSError as error:
            raise InvalidSpec(f"hook file {path}: {error.strerror}") from error
    return hooks.apply(spec, files, config.annotations, bind_mounts=any(mount.host_path for mount in config.mounts))


def _cdi_files(directories: tuple[str, ...]) -> Iterator[cdi.Source]:
    for priority, directory in enumerate(directories):
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for path in (os.path.join(directory, name) for name in names if name.endswith((".json", ".yaml"))):
            try:
                yield cdi.parse(path, priority, _read(path, cdi.FILE_LIMIT_BYTES + 1))
            except OSError as error:
                yield cdi.Source(path, priority, None, str(error.strerror))


def _read(path: str, limit_bytes: int) -> bytes:
    """The beginning of a file of the node's; no pipe is waited for. Raises OSError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return file.read(limit_bytes)


def check_propagation(mounts: tuple[Mount, ...]) -> None:
    """Refuses mounts whose source can't propagate as asked. Raises InvalidSpec."""
    if wanted := propagation.wanted(mounts):
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            propagation.check(wanted, file.read(), os.path.realpath)


def relabel(config: pb.ContainerConfig, spec: Spec) -> None:
    """Give the volumes that ask for it the container's SELinux label. Raises InvalidSpec or Unavailable."""
    label = spec.linux.mount_label if spec.linux is not None else ""
    if not label:
        return
    selinux.check(spec.process.selinux_label)
    if ":spc_t:" in spec.process.selinux_label:  # which may use everything as it is
        return
    for mount in config.mounts:
        if mount.selinux_relabel and mount.host_path:
            if not os.path.exists(mount.host_path):
                os.makedirs(mount.host_path, 0o755, exist_ok=True)
            selinux.relabel(mount.host_path, label)


def check_seccomp(spec: Spec) -> None:
    """Compile the filter now, whose result is kept for the start. Raises InvalidSpec or Unavailable."""
    if spec.linux is not None and spec.linux.seccomp is not None:
        bpf(spec.linux.seccomp)


def target(node: Node, container: Container) -> str:
    """The container whose pid namespace mode TARGET joins, "" in any other mode.

    Asked when a container is made, and again when it is started. Raises InvalidSpec unless the target is of the same
    pod, WrongState unless it runs.
    """
    options = container.config.linux.security_context.namespace_options
    if options.pid != TARGET or not options.target_id:
        return ""
    found = node.containers.find(options.target_id)
    if found is None or found.pod is not container.pod:
        raise InvalidSpec(f"namespace_options.target_id {show(options.target_id)}: no container of this sandbox")
    if found.state is not ContainerState.RUNNING:
        raise WrongState(f"namespace_options.target_id: {found.title} is {found.state}, not running")
    return found.id


def target_pid(node: Node, container: Container) -> str | None:
    """The pid namespace of `target` as a path."""
    found = target(node, container)
    return f"/proc/{node.containers.get(found).record.pid}/ns/pid" if found else None

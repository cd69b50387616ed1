"""The mounts of a container, in the order in which they are made."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cri.api import cri_pb2 as pb
from cri.translate.field import PATH_LIMIT_BYTES, absolute, bounded, no_backsteps, on_host, show
from runtime.errors import InvalidSpec, Unsupported
from runtime.spec import IDMapping, Mount

MKDIR = "x-crib.mkdir"
"""Makes a missing source as a directory of mode 0755 on the host, as Kubernetes expects of a hostPath volume."""
VOLUME = "x-crib.volume"
"""Marks an image's own volume."""
MOUNTS_LIMIT = 4096
_VOLUMES_LIMIT_BYTES = 1 << 20
_PROPAGATION = {
    pb.MountPropagation.PROPAGATION_PRIVATE: "rprivate",
    pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    pb.MountPropagation.PROPAGATION_BIDIRECTIONAL: "rshared",
}
_OPTIONS = (
    frozenset({"suid", "nosuid"}),
    frozenset({"dev", "nodev"}),
    frozenset({"exec", "noexec"}),
    frozenset({"relatime", "noatime", "strictatime"}),
    frozenset({"diratime", "nodiratime"}),
    frozenset({"symfollow", "nosymfollow"}),
)
"""What Mount.mount_options may hold: at most one of each group, and only flags of one mount, which mount_setattr
can set; whether it may be written to and how it propagates have fields of their own."""
_OVER_PROC = frozenset(
    f"/proc/{name}"
    for name in (
        "cpuinfo diskstats loadavg meminfo slabinfo stat swaps uptime net/dev sys/kernel/ns_last_pid "
        "sys/crypto/fips_enabled"
    ).split()
)
"""Files of /proc that may be mounted over: what lxcfs and its like replace. Anything else under /proc could redirect
writes of the runtime (CVE-2019-16884, CVE-2025-52881)."""


_KERNELS: Final = ("/proc", "/sys", "/dev")


@dataclass(frozen=True, slots=True)
class PodPaths:
    """Files and directories of the pod on the host."""

    hosts: str
    resolv_conf: str
    hostname: str
    shm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRules:
    """What the mounts depend on besides the request.

    `host_ipc`: /dev/shm is the host's. `bind_sys`: sysfs can't be mounted (own user namespace, host's network).
    `recursive_read_only`, `idmapped`: what this host can do. `volumes`: where the host has each of the request's image
    volumes, by target, `own` where it has the image's own (`own_volumes`).
    """

    readonly_root: bool
    privileged: bool
    host_ipc: bool
    bind_sys: bool = False
    writable_cgroup: bool = False
    recursive_read_only: bool = True
    idmapped: bool = True
    volumes: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageVolume:
    """An image to mount once per pod, read-only; `sub_path` is the part of it that the container sees, or ""."""

    target: str
    image: pb.ImageSpec
    sub_path: str


def container_mounts(requested: Sequence[pb.Mount], paths: PodPaths, rules: MountRules) -> tuple[Mount, ...]:
    """The defaults, then the pod's files and the request's mounts by depth.

    A default that the request mounts over is left out; a request's /dev or /sys drops all defaults below it.
    """
    if len(requested) > MOUNTS_LIMIT:
        raise InvalidSpec(f"mounts: {len(requested)} entries, the limit is {MOUNTS_LIMIT}")
    wanted = [user_mount(mount, rules) for mount in requested]
    taken = {mount.destination for mount in wanted}
    over = {parent for parent in ("/dev", "/sys") if parent in taken}

    def kept(mount: Mount) -> bool:
        at = mount.destination
        return at not in taken and not any(at.startswith(f"{parent}/") for parent in over)

    defaults = [mount for mount in _defaults(rules) if kept(mount)]
    binds = [mount for mount in _pod_files(paths, rules) if kept(mount)]
    return (*defaults, *_own(rules.own), *sorted((*binds, *wanted), key=lambda mount: mount.destination.count("/")))


def own_volumes(paths: Sequence[str], requested: Iterable[pb.Mount]) -> tuple[str, ...]:
    """Those of an image's VOLUMEs that are the container's to have: the request's mounts, and what lies below one, go
    before them. In the order in which they are mounted. Raises InvalidSpec.
    """
    if len(paths) > MOUNTS_LIMIT:
        raise InvalidSpec(f"image: {len(paths)} volumes, the limit is {MOUNTS_LIMIT}")
    for path in paths:
        bounded("image: VOLUME", path, PATH_LIMIT_BYTES)
    if (size := sum(map(len, paths))) > _VOLUMES_LIMIT_BYTES:
        raise InvalidSpec(f"image: names of volumes of {size} bytes, the limit is {_VOLUMES_LIMIT_BYTES}")
    taken = [absolute("mounts.container_path", mount.container_path) for mount in requested]
    found = {posixpath.normpath(f"/{path}").replace("//", "/") for path in paths}
    return tuple(
        path
        for path in sorted(found - {"/"})
        if not any(path == at or path.startswith(f"{at}/") for at in (*taken, *_KERNELS))
    )


def _own(volumes: Mapping[str, str]) -> Iterable[Mount]:
    """They come before anything of the request's is mounted, so that none of it is mounted on by way of a link in the
    image (CVE-2022-23648). What the file system that holds them forbids, the root allows as well."""
    options = ("bind", "rprivate", "rw", "suid", "dev", "exec", VOLUME)
    for path, source in volumes.items():
        yield Mount(destination=path, type="bind", source=source, options=options)


def _defaults(rules: MountRules) -> Iterable[Mount]:
    safe = ("nosuid", "noexec", "nodev")
    writable = "rw" if rules.privileged else "ro"
    yield Mount(destination="/proc", type="proc", source="proc", options=safe)
    yield Mount(
        destination="/dev",
        type="tmpfs",
        source="tmpfs",
        options=("nosuid", "strictatime", "mode=755", "size=65536k"),
    )
    yield Mount(
        destination="/dev/pts",
        type="devpts",
        source="devpts",
        options=("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    )
    yield Mount(destination="/dev/mqueue", type="mqueue", source="mqueue", options=safe)
    if rules.bind_sys:
        yield Mount(destination="/sys", type="bind", source="/sys", options=("bind", "rprivate", *safe, "ro", "rro"))
    else:
        yield Mount(destination="/sys", type="sysfs", source="sysfs", options=(*safe, writable))
    cgroup = "rw" if rules.privileged or rules.writable_cgroup else "ro"
    yield Mount(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=(*safe, "relatime", cgroup))


def _pod_files(paths: PodPaths, rules: MountRules) -> Iterable[Mount]:
    mode = "ro" if rules.readonly_root else "rw"
    for destination, source in (
        ("/etc/hostname", paths.hostname),
        ("/etc/hosts", paths.hosts),
        ("/etc/resolv.conf", paths.resolv_conf),
    ):
        yield Mount(destination=destination, type="bind", source=source, options=("bind", "rprivate", mode))
    shm = "/dev/shm" if rules.host_ipc else paths.shm
    yield Mount(
        destination="/dev/shm", type="bind", source=shm, options=("bind", "rprivate", "rw", "nosuid", "noexec", "nodev")
    )


def user_mount(mount: pb.Mount, rules: MountRules) -> Mount:
    """One mount of the request. Whether the source can propagate is checked where mountinfo is at hand."""
    target = absolute("mounts.container_path", mount.container_path)
    where = f"mounts {show(target)}"
    _check_target(where, target, mount)
    if _is_image(mount):
        _image_volume(mount)
        options = ("bind", "rprivate", "ro", *_mount_options(where, mount.mount_options))
        return Mount(destination=target, type="bind", source=rules.volumes[target], options=options)
    if mount.image_sub_path:
        raise InvalidSpec(f"{where}: image_sub_path {show(mount.image_sub_path)} without an image")
    source = on_host(f"{where}: host_path", mount.host_path)
    if mount.propagation not in _PROPAGATION:
        raise InvalidSpec(f"{where}: propagation {mount.propagation} is not a mode")
    flags = ["rbind", _PROPAGATION[mount.propagation], "ro" if mount.readonly else "rw"]
    if mount.recursive_read_only:
        if not mount.readonly:
            raise InvalidSpec(f"{where}: recursive_read_only needs readonly")
        if mount.propagation != pb.MountPropagation.PROPAGATION_PRIVATE:
            name = pb.MountPropagation.Name(mount.propagation)
            raise InvalidSpec(f"{where}: recursive_read_only needs PROPAGATION_PRIVATE, not {name}")
        if not rules.recursive_read_only:
            raise Unsupported(f"RROUnsupported: {where}: recursive read-only mounts are not supported on this host")
        flags.append("rro")
    flags += _mount_options(where, mount.mount_options)
    uids, gids = _mappings(where, "uidMappings", mount.uidMappings), _mappings(where, "gidMappings", mount.gidMappings)
    if bool(uids) != bool(gids):
        raise InvalidSpec(f"{where}: uidMappings and gidMappings only go together")
    if uids:
        if not rules.idmapped:
            raise Unsupported(f"{where}: idmapped mounts are not supported on this host")
        flags.append("ridmap")
    flags.append(MKDIR)
    return Mount(
        destination=target, type="bind", source=source, options=tuple(flags), uid_mappings=uids, gid_mappings=gids
    )


def image_volumes(requested: Iterable[pb.Mount]) -> tuple[ImageVolume, ...]:
    """The image volumes of a request, whose layers have to be known before it can be translated.

    The sub path is relative and stays inside by its text; its symlinks are for whoever resolves it below the image.
    """
    return tuple(_image_volume(mount) for mount in requested if _is_image(mount))


def _is_image(mount: pb.Mount) -> bool:
    return bool(mount.image.image or mount.image.image_ref)


def _image_volume(mount: pb.Mount) -> ImageVolume:
    target = absolute("mounts.container_path", mount.container_path)
    where = f"mounts {show(target)}"
    if not mount.readonly:
        raise InvalidSpec(f"{where}: an image volume has to be readonly")
    if mount.host_path:
        raise InvalidSpec(f"{where}: host_path {show(mount.host_path)} and image exclude each other")
    if mount.propagation != pb.MountPropagation.PROPAGATION_PRIVATE:
        name = pb.MountPropagation.Name(mount.propagation)
        raise InvalidSpec(f"{where}: an image volume can't have propagation {name}")
    sub_path = mount.image_sub_path
    if sub_path:
        no_backsteps(f"{where}: image_sub_path", bounded(f"{where}: image_sub_path", sub_path, PATH_LIMIT_BYTES))
        if sub_path.startswith("/"):
            raise InvalidSpec(f"{where}: image_sub_path {show(sub_path)}: not a relative path")
    return ImageVolume(target, mount.image, "" if posixpath.normpath(sub_path) == "." else posixpath.normpath(sub_path))


def _check_target(where: str, target: str, mount: pb.Mount) -> None:
    if target == "/":
        raise InvalidSpec(f"{where}: would hide the container's root")
    if target == "/proc" and posixpath.normpath(mount.host_path or "/") != "/proc":
        raise InvalidSpec(f"{where}: only the host's /proc can be mounted over /proc")
    if target.startswith("/proc/") and target not in _OVER_PROC:
        raise InvalidSpec(f"{where}: may not be mounted over")


def _mount_options(where: str, requested: Iterable[str]) -> Iterable[str]:
    chosen: dict[frozenset[str], str] = {}
    for option in requested:
        group = next((group for group in _OPTIONS if option in group), None)
        if group is None:
            raise InvalidSpec(f"{where}: mount_options {show(option)} is not one of {_known()}")
        if chosen.setdefault(group, option) != option:
            raise InvalidSpec(f"{where}: mount_options {option} and {chosen[group]} exclude each other")
    return chosen.values()


def _known() -> str:
    return ", ".join(sorted(option for group in _OPTIONS for option in group))


def _mappings(where: str, field: str, requested: Iterable[pb.IDMapping]) -> tuple[IDMapping, ...]:
    mappings = tuple(
        IDMapping(container_id=mapping.container_id, host_id=mapping.host_id, size=mapping.length)
        for mapping in requested
    )
    if not mappings:
        return ()
    for mapping in mappings:
        if mapping.size == 0 or max(mapping.container_id, mapping.host_id) + mapping.size > (1 << 32) - 1:
            raise InvalidSpec(f"{where}: {field} of length {mapping.size} is empty or beyond the greatest id")
    if len(mappings) > 340:
        raise InvalidSpec(f"{where}: {field} has {len(mappings)} entries, the kernel's limit is 340")
    for side in ("container_id", "host_id"):
        ranges = sorted((getattr(mapping, side), mapping.size) for mapping in mappings)
        for (first, size), (following, _) in itertools.pairwise(ranges):
            if first + size > following:
                raise InvalidSpec(f"{where}: {field}: {side} {following} is in two of the mappings")
    return mappings

"""Container Device Interface: what a request's device names mean, and their edits of the OCI spec.

Source: the CDI specification up to 1.1, container-device-interface/SPEC.md. Reading the files is the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import field

from cri.api import cri_pb2 as pb
from cri.translate.devices import HostDevice, permissions
from cri.translate.document import decode
from cri.translate.field import absolute, identity, show
from cri.translate.mounts import VOLUME
from runtime.errors import InvalidSpec, Unsupported
from runtime.spec import Device, DeviceCgroup, Hooks, Linux, Mount, Resources, Spec
from runtime.spec import Hook as OciHook

DIRECTORIES = ("/etc/cdi", "/run/cdi")
"""Where the files are, the later directory winning; names end in .json or .yaml."""
FILE_LIMIT_BYTES = 8 << 20
DEVICES_LIMIT = 1024
ANNOTATION_PREFIX = "cdi.k8s.io/"
_KIND = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"(0\.[3-9]|1\.[01])\.\d+")
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*", re.DOTALL)
_STAGES = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """An unknown member is refused: a later version's edit must not be left out in silence."""


class DeviceNode(_Part, frozen=True):
    path: str
    host_path: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None

    @property
    def source(self) -> str:
        return self.host_path or self.path

    @property
    def looked_up(self) -> bool:
        """Whether the node's type and numbers are the host's."""
        return not self.type or (self.type != "p" and not self.major)


class Hook(_Part, frozen=True):
    hook_name: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class BindMount(_Part, frozen=True):
    host_path: str
    container_path: str
    options: tuple[str, ...] = ()
    type: str = ""

    @property
    def binds(self) -> bool:
        return self.type in ("", "bind") or not {"bind", "rbind"}.isdisjoint(self.options)


class Edits(_Part, frozen=True):
    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    hooks: tuple[Hook, ...] = ()
    mounts: tuple[BindMount, ...] = ()
    additional_gids: tuple[int, ...] = field(name="additionalGIDs", default=())
    net_devices: object = None
    intel_rdt: object = None

    @property
    def unmade(self) -> str:
        """An edit that crib doesn't make; "" where there is none."""
        return "netDevices" if self.net_devices else "intelRdt" if self.intel_rdt else ""


class CdiDevice(_Part, frozen=True):
    name: str
    container_edits: Edits
    annotations: dict[str, str] = field(default_factory=dict)


class CdiFile(_Part, frozen=True):
    cdi_version: str
    kind: str
    devices: tuple[CdiDevice, ...]
    container_edits: Edits = Edits()
    annotations: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """One file that was read: its path, the place of its directory in DIRECTORIES, and its content or what is wrong."""

    path: str
    priority: int
    content: CdiFile | None
    error: str = ""


def requested(config: pb.ContainerConfig) -> tuple[str, ...]:
    """The fully qualified names that a request has, each once: by field, and by annotation for older kubelets."""
    names = [device.name for device in config.CDI_devices]
    for key in sorted(config.annotations):
        if key.startswith(ANNOTATION_PREFIX):
            names += config.annotations[key].split(",")
    for name in names:
        kind, _, device = name.partition("=")
        if not (_KIND.fullmatch(kind) and _NAME.fullmatch(device)):
            raise InvalidSpec(f"CDI_devices {show(name)}: not a name like vendor.com/class=name")
    if len(names) > DEVICES_LIMIT:
        raise InvalidSpec(f"CDI_devices: {len(names)} entries, the limit is {DEVICES_LIMIT}")
    return tuple(dict.fromkeys(names))


def parse(path: str, priority: int, content: bytes) -> Source:
    """A file's content. Nothing is raised: a broken file must only matter to those who need its devices."""
    try:
        if len(content) > FILE_LIMIT_BYTES:
            raise InvalidSpec(f"longer than {FILE_LIMIT_BYTES} bytes")
        found = decode(content, CdiFile, yaml=not path.endswith(".json"))
        _check(found)
    except InvalidSpec as error:
        return Source(path, priority, None, str(error))
    return Source(path, priority, found)


def _check(file: CdiFile) -> None:
    if not _VERSION.fullmatch(file.cdi_version):
        raise InvalidSpec(f"cdiVersion {show(file.cdi_version)} is not between 0.3 and 1.1")
    if not _KIND.fullmatch(file.kind):
        raise InvalidSpec(f"kind {show(file.kind)} is not vendor/class")
    names = [device.name for device in file.devices]
    if len(set(names)) < len(names):
        raise InvalidSpec("two devices have the same name")
    for device in file.devices:
        if not _NAME.fullmatch(device.name):
            raise InvalidSpec(f"device {show(device.name)} is not a name")
    for edits in (file.container_edits, *(device.container_edits for device in file.devices)):
        _check_edits(edits)


def _check_edits(edits: Edits) -> None:
    for entry in edits.env:
        if not _ENV.fullmatch(entry):
            raise InvalidSpec(f"env {show(entry.partition('=')[0])} is not NAME=value")
    for node in edits.device_nodes:
        absolute("deviceNodes.path", node.path)
        absolute("deviceNodes.hostPath", node.source)
        permissions(node.permissions)
        if node.type not in ("", "b", "c", "u", "p"):
            raise InvalidSpec(f"deviceNodes.type {show(node.type)} is not b, c, u or p")
    for mount in edits.mounts:
        if mount.binds or not mount.host_path:  # of a tmpfs it is any word
            absolute("mounts.hostPath", mount.host_path)
        absolute("mounts.containerPath", mount.container_path)
    for hook in edits.hooks:
        absolute("hooks.path", hook.path)
        if hook.hook_name not in _STAGES:
            raise InvalidSpec(f"hooks.hookName {show(hook.hook_name)} is not one of {', '.join(_STAGES)}")
    for gid in edits.additional_gids:
        identity("additionalGIDs", gid)


def resolve(names: Iterable[str], sources: Sequence[Source]) -> tuple[Edits, ...]:
    """The edits for these devices, in order: a file's own once, before those of its first device.

    Raises:
        InvalidSpec: a device that no file has, or that two files of one directory have.
        Unsupported: a device with an edit of an interface of the host's, or of Intel's RDT.
    """
    edits: dict[tuple[str, str], Edits] = {}
    for name in names:
        kind, _, device = name.partition("=")
        holders = [
            (source, found)
            for source in sources
            if source.content is not None and source.content.kind == kind
            for found in source.content.devices
            if found.name == device
        ]
        if not holders:
            broken = "; ".join(f"{source.path}: {source.error}" for source in sources if source.error)
            raise InvalidSpec(f"CDI_devices {show(name)}: no such device{f' ({broken})' if broken else ''}")
        best = max(source.priority for source, _ in holders)
        winners = [(source, found) for source, found in holders if source.priority == best]
        if len(winners) > 1:
            paths = " and ".join(source.path for source, _ in winners)
            raise InvalidSpec(f"CDI_devices {show(name)}: in {paths}")
        source, found = winners[0]
        assert source.content is not None
        for edit in (source.content.container_edits, found.container_edits):
            if edit.unmade:
                raise Unsupported(
                    f"CDI_devices {show(name)}: crib doesn't make the edit {edit.unmade} of {source.path}"
                )
        edits.setdefault((source.path, ""), source.content.container_edits)
        edits[(source.path, device)] = found.container_edits
    return tuple(edits.values())


def paths(edits: Iterable[Edits]) -> tuple[str, ...]:
    """The host's device nodes that have to be looked up before `apply`."""
    nodes = (node for edit in edits for node in edit.device_nodes if node.looked_up)
    return tuple(dict.fromkeys(absolute("deviceNodes.hostPath", node.source) for node in nodes))


def apply(spec: Spec, edits: Iterable[Edits], found: Mapping[str, Sequence[HostDevice]], *, hooks: bool) -> Spec:
    """The spec with the edits made; what they replace goes, and the request's mounts are sorted by depth again.

    `found` holds what each of `paths(edits)` is. `hooks`: whether they can be run.
    """
    linux = spec.linux or Linux()
    resources = linux.resources or Resources()
    env = {entry.partition("=")[0]: entry for entry in spec.process.env}
    devices = {device.path: device for device in linux.devices}
    rules = list(resources.devices)
    mounts = {mount.destination: mount for mount in spec.mounts}
    gids = set(spec.process.user.additional_gids)
    added: dict[str, list[OciHook]] = {}
    for edit in edits:
        env |= {entry.partition("=")[0]: entry for entry in edit.env}
        for node in edit.device_nodes:
            device = _device(node, found, spec)
            devices[device.path] = device
            if device.type != "p":
                access = permissions(node.permissions)
                kind = "c" if device.type == "u" else device.type
                rules.append(DeviceCgroup(allow=True, type=kind, major=device.major, minor=device.minor, access=access))
        for bind in edit.mounts:
            mount = _mount(bind)
            mounts[mount.destination] = mount
        gids |= set(edit.additional_gids) - {0}
        for hook in edit.hooks:
            added.setdefault(_STAGES[hook.hook_name], []).append(
                OciHook(path=hook.path, args=hook.args, env=hook.env, timeout=hook.timeout)
            )
    if added and not hooks:
        raise Unsupported("CDI_devices: their hooks can't be run by this handler")
    before = spec.hooks or Hooks()
    merged = {stage: (*getattr(before, stage), *extra) for stage, extra in added.items()}
    replace = msgspec.structs.replace
    user = replace(spec.process.user, additional_gids=tuple(sorted(gids)))
    return replace(
        spec,
        process=replace(spec.process, env=tuple(env.values()), user=user),
        mounts=_by_depth(list(mounts.values())),
        hooks=replace(before, **merged) if merged else spec.hooks,
        linux=replace(linux, devices=tuple(devices.values()), resources=replace(resources, devices=tuple(rules))),
    )


def _by_depth(mounts: list[Mount]) -> tuple[Mount, ...]:
    """Sorted, but for what comes before the last of the image's own volumes: those are made before anything else is
    mounted that a link in the image could lead to."""
    own = [number for number, mount in enumerate(mounts) if VOLUME in mount.options]
    first = own[-1] + 1 if own else 0
    return (*mounts[:first], *sorted(mounts[first:], key=lambda mount: mount.destination.count("/")))


def _mount(bind: BindMount) -> Mount:
    options = bind.options
    if bind.binds and {"bind", "rbind"}.isdisjoint(options):
        options = ("rbind", *options)
    target = absolute("mounts.containerPath", bind.container_path)
    return Mount(destination=target, type=bind.type or "bind", source=bind.host_path, options=options)


def _device(node: DeviceNode, found: Mapping[str, Sequence[HostDevice]], spec: Spec) -> Device:
    kind, major, minor, mode = node.type, node.major, node.minor, node.file_mode
    if node.looked_up:
        source = absolute("deviceNodes.hostPath", node.source)
        here = next(iter(found.get(source, ())), None)
        if here is None or (kind and kind != here.type and not (kind == "u" and here.type == "c")):
            raise InvalidSpec(f"CDI_devices: {show(source)}: no {kind or 'device'} there")
        kind, major, minor = kind or here.type, here.major, here.minor
        mode = here.mode if mode is None else mode
    user = spec.process.user
    return Device(
        path=absolute("deviceNodes.path", node.path),
        type=kind,
        major=major,
        minor=minor,
        file_mode=None if mode is None else mode & 0o7777,
        uid=user.uid or None if node.uid is None else node.uid,
        gid=user.gid or None if node.gid is None else node.gid,
    )

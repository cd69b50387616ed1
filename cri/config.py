"""cribd's configuration: a TOML file, every key of which has a default.

An unknown key is an error that names it, so that a misspelt limit is noticed at start and not in production.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from cri.daemon.log import LEVELS
from cri.translate.capabilities import DEFAULT as DEFAULT_CAPABILITIES
from cri.translate.defaults import RLIMITS, SHM_BYTES, UNLIMITED, Defaults, Handler
from net import CniConfig
from net.node import CHOICES as NETWORK_PLUGINS
from runtime.spec import Rlimit

DEFAULT_ROOT = Path("/var/lib/crib")
DEFAULT_STATE = Path("/run/crib")
DEFAULT_LISTEN = "unix:///run/crib/crib.sock"


_HANDLER = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?")


class ConfigError(Exception):
    """The file can't be used; the message names it and the key."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ImagesSection(_Section, frozen=True):
    """`hosts_dir`: registries' mirrors and certificates, a directory per registry with a hosts.toml.

    `pinned` are globs over tags and digests. `auth_file` is a docker config.json, `verifiers` a directory of programs
    that must accept an image; "" for none. `containers_dir` is where writable layers are, "" for beside the images.
    """

    hosts_dir: str = "/etc/crib/certs.d"
    max_parallel: int = 3
    max_ranges: int = 4
    progress_timeout_s: float = 60.0
    pinned: tuple[str, ...] = ()
    auth_file: str = ""
    verifiers: str = ""
    verifier_timeout_s: float = 10.0
    containers_dir: str = ""
    layer_limit_bytes: int = 64 << 30
    unpacked_limit_bytes: int = 64 << 30
    ratio_limit: int = 1000
    entries_limit: int = 2_000_000


class NetworkSection(_Section, frozen=True):
    """`plugin` is auto (CNI where there is a configuration, else the built-in bridge), cni or builtin.

    Of the bridge: `subnet` empty takes the kubelet's pod CIDR or a free one, `subnet6` empty means no IPv6 unless the
    kubelet gives a CIDR, `bridge` (its name) empty derives it from the instance, `mtu` 0 is the uplink's.
    Of CNI: `cni_template` makes a configuration of the kubelet's pod CIDRs; `cni_cache_dir` empty is /var/lib/cni, or
    below `root` where that isn't the default.
    """

    plugin: str = "auto"
    subnet: str = ""
    subnet6: str = ""
    bridge: str = ""
    mtu: int = 0
    masquerade: bool = True
    cni_conf_dir: str = CniConfig().conf_dir
    cni_plugin_dirs: tuple[str, ...] = CniConfig().plugin_dirs
    cni_cache_dir: str = ""
    cni_template: str = ""
    cni_timeout_s: float = CniConfig().timeout_s


class CgroupSection(_Section, frozen=True):
    """`driver` is auto, cgroupfs or systemd; `parent` is for pods whose request names none, empty is "/<instance>"."""

    driver: str = "auto"
    parent: str = ""


class DefaultsSection(_Section, frozen=True):
    """What a container gets that its request doesn't speak of.

    `capabilities` are names like "CAP_CHOWN". `rlimits` maps the kernel's names in lower case, as in "nofile", to
    [soft, hard] with -1 for no limit, and changes only those it names. `seccomp`: whether a container that asks for
    no profile gets the default one.
    """

    capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES
    rlimits: dict[str, tuple[int, int]] = {}
    shm_bytes: int = SHM_BYTES
    sysctls: dict[str, str] = {}
    seccomp: bool = False

    def translated(self) -> Defaults:
        """As the translation takes them."""
        limits = {limit.type: limit for limit in RLIMITS}
        for name, pair in self.rlimits.items():
            soft, hard = (UNLIMITED if value < 0 else value for value in pair)
            kind = f"RLIMIT_{name.upper()}"
            limits[kind] = Rlimit(type=kind, soft=soft, hard=hard)
        return Defaults(
            capabilities=self.capabilities,
            rlimits=tuple(limits.values()),
            shm_bytes=self.shm_bytes,
            sysctls=self.sysctls,
            seccomp_unset=self.seccomp,
        )


class StreamingSection(_Section, frozen=True):
    """The server for exec, attach and port-forward, for the kubelet alone: its address must be one the kubelet reaches.

    `port` 0 takes a free one. With `tls_cert` and `tls_key`, PEM files, it speaks TLS; replaced files are noticed.
    `creation_timeout_s` is for a client's request, and then for the streams that it needs.
    """

    address: str = "127.0.0.1"
    port: int = 0
    tls_cert: str = ""
    tls_key: str = ""
    idle_timeout_s: float = 4 * 3600
    creation_timeout_s: float = 30


class HandlerSection(_Section, frozen=True):
    """A RuntimeClass handler: the built-in engine, or the OCI runtime whose program is at `path`.

    `args` come before the runtime's own command. `cni_conf_dir`: where its pods' network is configured, if elsewhere.
    `annotations` are patterns, as for a shell, of those annotations of pods and containers that reach the OCI spec and
    so hooks. `writable_cgroup`: containers may write to their cgroup. `privileged_without_host_devices`: what it says.
    """

    path: str = ""
    args: tuple[str, ...] = ()
    cni_conf_dir: str = ""
    annotations: tuple[str, ...] = ()
    privileged_without_host_devices: bool = False
    writable_cgroup: bool = False

    def translated(self) -> Handler:
        """As the translation takes it."""
        return Handler(
            annotations=self.annotations,
            privileged_without_host_devices=self.privileged_without_host_devices,
            writable_cgroup=self.writable_cgroup,
        )


class LogsSection(_Section, frozen=True):
    """Of containers' logs: with `max_bytes` not 0, cribd rotates one that has grown to it, and keeps `max_files` of it.

    The kubelet does so by itself, and doesn't need it.
    """

    max_bytes: int = 0
    max_files: int = 5


class LimitsSection(_Section, frozen=True):
    """Bounds on what one call may take; times in seconds."""

    workers: int = 24
    pulls: int = 8
    start_timeout_s: float = 120.0
    kill_timeout_s: float = 15.0
    exec_drain_s: float = 1.0


class MetricsSection(_Section, frozen=True):
    """Where Prometheus finds cribd's figures. `port` 0: nowhere. `address` must be this machine's own."""

    address: str = "127.0.0.1"
    port: int = 0


class Config(_Section, frozen=True):
    """`hooks_dirs`: directories of OCI hooks (oci-hooks(5)), of which a later one wins. `handlers`: by the name that a
    RuntimeClass has; "" is what a pod without one gets. `selinux`: whether containers are
    labelled."""

    listen: str = DEFAULT_LISTEN
    root: str = str(DEFAULT_ROOT)
    state: str = str(DEFAULT_STATE)
    log_level: str = "info"
    log_format: str = "text"
    hooks_dirs: tuple[str, ...] = ("/etc/crib/hooks.d",)
    selinux: bool = False
    images: ImagesSection = ImagesSection()
    network: NetworkSection = NetworkSection()
    cgroup: CgroupSection = CgroupSection()
    defaults: DefaultsSection = DefaultsSection()
    streaming: StreamingSection = StreamingSection()
    logs: LogsSection = LogsSection()
    metrics: MetricsSection = MetricsSection()
    limits: LimitsSection = LimitsSection()
    handlers: dict[str, HandlerSection] = {}

    @property
    def instance(self) -> str:
        """Tells cribds with different directories apart in the names of cgroups, bridges and tables."""
        if Path(self.root) == DEFAULT_ROOT:
            return "crib"
        return "crib-" + hashlib.sha256(self.root.encode()).hexdigest()[:8]

    @property
    def socket(self) -> Path:
        return Path(self.listen.removeprefix("unix://"))


def load(path: Path | None, **overrides: str | None) -> Config:
    """The configuration in `path` (None: all defaults), with `overrides` that are not None above it.

    Raises ConfigError.
    """
    found: dict[str, Any] = {}
    if path is not None:
        try:
            found = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"config file {path}: {error}") from error
    found |= {key: value for key, value in overrides.items() if value is not None}
    where = f"config file {path}" if path else "arguments"
    try:
        config = msgspec.convert(found, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_named(str(error))}") from error
    if problem := _problem(config):
        raise ConfigError(f"{where}: {problem}")
    return config


def _named(message: str) -> str:
    """msgspec's message with the key's full name: "unknown key network.subnett"."""
    text, _, at = message.partition(" - at `$")
    at = at.strip("`.")
    unknown = "Object contains unknown field `"
    if text.startswith(unknown):
        name = text.removeprefix(unknown).rstrip("`")
        return f"unknown key {at}.{name}" if at else f"unknown key {name}"
    return f"key {at}: {text[:1].lower()}{text[1:]}" if at else text


def _problem(config: Config) -> str | None:
    """What is wrong with values that have the right type."""
    if not config.listen.startswith("unix:///"):
        return f"key listen: {config.listen!r} is not unix:///PATH"
    if len(config.listen.removeprefix("unix://").encode()) > 107:
        return f"key listen: {config.listen!r} is longer than a socket's path can be (107 bytes)"
    for key in ("root", "state"):
        if not getattr(config, key).startswith("/"):
            return f"key {key}: {getattr(config, key)!r} is not an absolute path"
    choices = {
        "log_level": (config.log_level, LEVELS),
        "log_format": (config.log_format, ("text", "json")),
        "network.plugin": (config.network.plugin, NETWORK_PLUGINS),
        "cgroup.driver": (config.cgroup.driver, ("auto", "cgroupfs", "systemd")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            return f"key {key}: {value!r} is none of {', '.join(allowed)}"
    for name in config.handlers:
        if not _HANDLER.fullmatch(name):
            return f"key handlers: {name!r} is not the name of a handler (a DNS label)"
    for name, handler in config.handlers.items():
        for key, value in (("path", handler.path), ("cni_conf_dir", handler.cni_conf_dir)):
            if value and not value.startswith("/"):
                return f"key handlers.{name}.{key}: {value!r} is not an absolute path"
        if handler.args and not handler.path:
            return f"key handlers.{name}.args: the built-in engine takes none"
    if config.cgroup.parent and not config.cgroup.parent.startswith("/"):
        return f"key cgroup.parent: {config.cgroup.parent!r} is not an absolute path"
    if ".." in config.cgroup.parent.split("/"):
        return f"key cgroup.parent: {config.cgroup.parent!r} has a .. in it"
    if not 0 <= config.streaming.port <= 65535:
        return f"key streaming.port: {config.streaming.port} is not a port"
    try:
        ipaddress.ip_address(config.streaming.address)
    except ValueError:
        return f"key streaming.address: {config.streaming.address!r} is not an IP address"
    if bool(config.streaming.tls_cert) != bool(config.streaming.tls_key):
        return "keys streaming.tls_cert and streaming.tls_key: one without the other"
    if not 0 <= config.metrics.port <= 65535:
        return f"key metrics.port: {config.metrics.port} is not a port"
    if not _is_loopback(config.metrics.address):
        return f"key metrics.address: {config.metrics.address!r} is not a loopback address, and who asks needs no token"
    if config.logs.max_bytes < 0:
        return f"key logs.max_bytes: {config.logs.max_bytes} is below zero"
    known = {limit.type.removeprefix("RLIMIT_").lower() for limit in RLIMITS}
    if unknown := sorted(config.defaults.rlimits.keys() - known):
        return f"key defaults.rlimits: {unknown[0]!r} is none of {', '.join(sorted(known))}"
    positive = {
        **{
            f"images.{name}": number
            for name in config.images.__struct_fields__
            if isinstance(number := getattr(config.images, name), (int, float))
        },
        "streaming.idle_timeout_s": config.streaming.idle_timeout_s,
        "streaming.creation_timeout_s": config.streaming.creation_timeout_s,
        "logs.max_files": config.logs.max_files,
        "network.cni_timeout_s": config.network.cni_timeout_s,
        "defaults.shm_bytes": config.defaults.shm_bytes,
        **{f"limits.{name}": getattr(config.limits, name) for name in config.limits.__struct_fields__},
    }
    for key, number in positive.items():
        if number <= 0:
            return f"key {key}: {number} is not above zero"
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False

"""What the image room hands to its callers: images, prepared root file systems, settings."""

from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """How an image wants to be run: the `config` object of an OCI image configuration. Hostile, of bounded size."""

    user: str = ""
    env: tuple[str, ...] = field(default=(), repr=False)
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    exposed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is complete in the store.

    `id` is the digest of the configuration. `layers` are short names below the layers' directory, bottom first.
    `size_bytes` is what the image occupies on disk, layers shared with others included. `created` is the
    configuration's own RFC 3339 text, "" when absent. `manifest_digest` is that of this platform's manifest.
    """

    id: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size_bytes: int
    config: ImageConfig
    layers: tuple[str, ...]
    chain_id: str
    pinned: bool
    created: str
    manifest_digest: str
    diff_ids: tuple[str, ...]
    architecture: str
    os: str
    raw_config: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RootFs:
    """What a container's overlay is mounted from.

    `base` is the directory that holds the layers' short names; `lowers` are those names, topmost first. `upper` and
    `work` are absolute and on one file system.
    """

    base: str
    lowers: tuple[str, ...]
    upper: str
    work: str


@dataclass(frozen=True, slots=True)
class Auth:
    """Credentials for one pull. They are sent to the reference's own registry and its token service only.

    `auth` is base64 of `username:password`. With `server_address` they are for that host alone. Never logged.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    server_address: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it to show to anybody."""
        return not (self.username or self.auth or self.identity_token or self.registry_token)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one layer is. `state` is waiting, downloading, unpacking, done or exists; bytes are compressed ones."""

    digest: str
    state: str
    current_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class FsUsage:
    """What the store occupies on the file system that holds `mountpoint` (a directory of the store)."""

    mountpoint: str
    used_bytes: int
    inodes_used: int


@dataclass(frozen=True, slots=True)
class ImagesConfig:
    """Settings of the store.

    A blob of at least two `range_bytes` comes in up to `max_ranges` requests at once, where one is slower than
    unpacking is. A host that didn't answer is
    asked after the others for `unhealthy_s`.

    `hosts_dir` holds containerd's per-registry `<host>/hosts.toml`, read at each pull. `progress_timeout_s` is how long
    a transfer may stand still. `pinned` are globs over repo tags and digests. `auth_file` is a docker config.json for
    pulls without credentials, `verifiers` a directory of programs that must accept each image. `containers` is where
    writable layers are, when not beside the images.
    """

    hosts_dir: Path | None = None
    max_parallel: int = 3
    progress_timeout_s: float = 60.0
    connect_timeout_s: float = 10.0
    attempts: int = 4
    backoff_s: float = 0.5
    retry_after_limit_s: float = 30.0
    unhealthy_s: float = 60.0
    max_ranges: int = 4
    range_bytes: int = 32 * MIB
    pinned: tuple[str, ...] = ()
    auth_file: Path | None = None
    verifiers: Path | None = None
    verifier_timeout_s: float = 10.0
    containers: Path | None = None
    manifest_limit_bytes: int = 4 * MIB
    config_limit_bytes: int = 8 * MIB
    layer_limit_bytes: int = 64 * GIB
    unpacked_limit_bytes: int = 64 * GIB
    ratio_limit: int = 1000
    ratio_from_bytes: int = 256 * MIB
    entries_limit: int = 2_000_000

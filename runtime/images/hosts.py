"""Where a registry's images come from: containerd's `hosts.toml`, read at each pull.

Format: containerd docs/hosts.md. A directory per registry below `hosts_dir`: `<host>`, `<host>_<port>_` or `_default`.
"""

import ipaddress
import ssl
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runtime.errors import InvalidSpec
from runtime.images.reference import DEFAULT_REGISTRY

_DOCKER_HUB = "registry-1.docker.io"
_CAPABILITIES = frozenset(("pull", "resolve", "push"))


@dataclass(frozen=True, slots=True)
class Tls:
    """How to verify a host and to identify oneself; files are PEM."""

    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str | None], ...] = ()
    skip_verify: bool = False

    def context(self) -> ssl.SSLContext:
        """The system's authorities and those of `ca`. Raises InvalidSpec naming an unusable file."""
        context = ssl.create_default_context()
        file = ""
        try:
            for file in self.ca:
                context.load_verify_locations(cafile=file)
            for file, key in self.client:
                context.load_cert_chain(file, key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSpec(f"certificate file {file}: {error}") from error
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place to ask. `base` is the URL up to and with `/v2`; only the `upstream` is given a pull's credentials.

    `headers` come from configuration and may hold secrets.
    """

    base: str
    upstream: bool
    capabilities: frozenset[str] = _CAPABILITIES
    tls: Tls = Tls()
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.base).netloc


def is_loopback(host: str) -> bool:
    """`host` may have a port."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def endpoints(registry: str, hosts_dir: Path | None) -> list[Endpoint]:
    """Where to ask for images of `registry`, in order; the upstream is last. Raises InvalidSpec for a bad file."""
    directory = _directory(registry, hosts_dir)
    if directory is not None and (directory / "hosts.toml").is_file():
        return _from_file(registry, directory / "hosts.toml")
    tls = _docker_style(directory) if directory is not None else Tls()
    return [Endpoint(_default_base(registry, https=tls != Tls()), True, tls=tls)]


def _directory(registry: str, hosts_dir: Path | None) -> Path | None:
    if hosts_dir is None:
        return None
    host, colon, port = registry.rpartition(":")
    names = [registry, "_default"]
    if colon and not port.endswith("]"):
        names.insert(0, f"{host}_{port}_")
    return next((hosts_dir / name for name in names if (hosts_dir / name).is_dir()), None)


def _default_base(registry: str, https: bool = False) -> str:
    host = _DOCKER_HUB if registry == DEFAULT_REGISTRY else registry
    # As containerd: what is on this machine speaks plain HTTP unless it says otherwise.
    plain = is_loopback(host) and not host.endswith(":443") and not https
    return f"{'http' if plain else 'https'}://{host}/v2"


def _from_file(registry: str, path: Path) -> list[Endpoint]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSpec(f"{path}: {error}") from error
    hosts = table.get("host", {})
    if not isinstance(hosts, dict):
        raise InvalidSpec(f"{path}: host is not a table")
    found = [_endpoint(path, url, settings, registry) for url, settings in hosts.items()]
    server = table.get("server", "")
    if not isinstance(server, str):
        raise InvalidSpec(f"{path}: server is not a string")
    upstream = _endpoint(path, server or _default_base(registry), {**table, "host": {}}, registry, upstream=True)
    found = [replace(e, upstream=e.upstream or e.base == upstream.base) for e in found]
    if all(endpoint.base != upstream.base for endpoint in found):
        found.append(upstream)
    return [e for e in found if e.capabilities & {"pull", "resolve"}]


def _endpoint(path: Path, url: str, settings: Any, registry: str, upstream: bool = False) -> Endpoint:
    if not isinstance(settings, dict):
        raise InvalidSpec(f"{path}: host {url} is not a table")
    if "://" not in url:
        url = f"{'http' if is_loopback(url) else 'https'}://{url}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise InvalidSpec(f"{path}: {url!r} is not the URL of a host")
    host = _DOCKER_HUB if parts.netloc == DEFAULT_REGISTRY else parts.netloc
    base = parts.path.rstrip("/")
    if not _boolean(path, settings, "override_path") and not base.endswith("/v2"):
        base += "/v2"
    capabilities = frozenset(_strings(path, settings, "capabilities")) or _CAPABILITIES
    if capabilities - _CAPABILITIES:
        raise InvalidSpec(f"{path}: unknown capabilities {sorted(capabilities - _CAPABILITIES)}")
    return Endpoint(
        base=f"{parts.scheme}://{host}{base}",
        upstream=upstream or host in (registry, urlsplit(_default_base(registry)).netloc),
        capabilities=capabilities,
        tls=Tls(
            ca=tuple(str(path.parent / name) for name in _strings(path, settings, "ca")),
            client=_clients(path, settings.get("client", [])),
            skip_verify=_boolean(path, settings, "skip_verify"),
        ),
        headers=_headers(path, settings.get("header", {})),
    )


def _boolean(path: Path, settings: dict[str, Any], key: str) -> bool:
    value = settings.get(key, False)
    if not isinstance(value, bool):
        raise InvalidSpec(f"{path}: {key} is not true or false")
    return value


def _strings(path: Path, settings: dict[str, Any], key: str) -> list[str]:
    value = settings.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise InvalidSpec(f"{path}: {key} is neither a string nor a list of strings")
    return values


def _clients(path: Path, value: Any) -> tuple[tuple[str, str | None], ...]:
    """One PEM file with certificate and key, a list of such, or a list of [certificate, key]."""
    pairs: list[tuple[str, str | None]] = []
    for item in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
        match item:
            case str():
                pairs.append((str(path.parent / item), None))
            case [str() as certificate, str() as key]:
                pairs.append((str(path.parent / certificate), str(path.parent / key) if key else None))
            case _:
                raise InvalidSpec(f"{path}: client is neither a file nor a list of [certificate, key]")
    return tuple(pairs)


def _headers(path: Path, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise InvalidSpec(f"{path}: header is not a table")
    return tuple((name, ", ".join(_strings(path, value, name))) for name in value)


def _docker_style(directory: Path) -> Tls:
    """A directory without hosts.toml as Docker's: *.crt are authorities, *.cert with *.key identify this client."""
    client = [(str(file), str(file.with_suffix(".key"))) for file in sorted(directory.glob("*.cert"))]
    return Tls(ca=tuple(str(file) for file in sorted(directory.glob("*.crt"))), client=tuple(client))

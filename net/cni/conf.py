"""CNI network configurations: files of a directory, of which the first valid one by name is the network.

The directory is looked at whenever somebody asks, by the names, times and sizes of its files; parsed only when they
changed. So a file counts from the moment that it is there, and none does once it is gone.
"""

import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from net.errors import InvalidSpec

Json = dict[str, object]
VERSIONS: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Those of the specification that plugins are spoken to in, oldest first."""

_SUFFIXES: Final = (".conf", ".conflist", ".json")
_LIMIT_BYTES: Final = 1 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_TYPE: Final = re.compile(r"[^/\0]{1,255}")


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin of a chain: the executable's name, what the configuration has for it, and what it can be told."""

    type: str
    conf: Json
    capabilities: frozenset[str]


@dataclass(frozen=True, slots=True)
class NetworkConf:
    """A network: plugins in the order of ADD. `source` is the list as JSON, whole."""

    name: str
    version: str
    plugins: tuple[Plugin, ...]
    check: bool
    gc: bool
    source: bytes
    path: str

    def speaks(self, version: str) -> bool:
        """Whether plugins know what came with that version of the specification."""
        return VERSIONS.index(self.version) >= VERSIONS.index(version)


@dataclass(frozen=True, slots=True)
class Found:
    """What a directory holds. `problems` are of the files before the one that counts, or of all where none does."""

    conf: NetworkConf | None = None
    problems: tuple[str, ...] = ()

    @property
    def configured(self) -> bool:
        """Whether somebody has put a configuration there, be it a broken one."""
        return self.conf is not None or bool(self.problems)


class Directory:
    """The directory that CNI configurations are put into. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: object = None
        self._found = Found()

    def look(self) -> Found:
        """What is there now."""
        with self._lock:
            seen = tuple(_signature(str(self.path)))
            if seen != self._seen:
                self._found = self._read()
                self._seen = seen
            return self._found

    def _read(self) -> Found:
        problems: list[str] = []
        try:
            names = sorted(name for name in os.listdir(self.path) if name.endswith(_SUFFIXES))
        except FileNotFoundError:
            return Found()
        except OSError as error:
            return Found(problems=(f"{self.path}: {error.strerror}",))
        for name in names:
            path = self.path / name
            try:
                return Found(parse(_file(path), str(path), self.path), tuple(problems))
            except InvalidSpec as error:
                problems.append(str(error))
        return Found(problems=tuple(problems))


def _signature(directory: str, depth: int = 1) -> Iterator[object]:
    """Of every file of this directory and those just below, what changes when it is written."""
    try:
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                found = entry.stat()
                if stat.S_ISDIR(found.st_mode):
                    if depth:
                        yield from _signature(entry.path, depth - 1)
                    continue
                yield entry.path, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
    except OSError as error:
        yield directory, error.errno


def _file(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise InvalidSpec(f"{path}: not a file")
            data = file.read(_LIMIT_BYTES + 1)
    except OSError as error:
        raise InvalidSpec(f"{path}: {error.strerror}") from error
    if len(data) > _LIMIT_BYTES:
        raise InvalidSpec(f"{path}: larger than {_LIMIT_BYTES} bytes")
    return data


def parse(data: bytes, path: str, directory: Path | None = None) -> NetworkConf:
    """A list of plugins, or a single one, which is a list of one.

    A list that doesn't say `loadOnlyInlinedPlugins` also has the plugins in DIRECTORY/NAME/*.conf. Raises InvalidSpec,
    naming `path`.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        empty = "empty" if not data.strip() else f"not JSON: {error}"
        raise InvalidSpec(f"{path}: {empty}") from error
    if not isinstance(found, dict):
        raise InvalidSpec(f"{path}: not a JSON object")
    if "plugins" not in found and "type" in found:
        keys = ("name", "cniVersion", "cniVersions")
        found = {key: found[key] for key in keys if key in found} | {"plugins": [found]}
    name = found.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidSpec(f"{path}: name {name!r}: not a network's name")
    inline = found.get("plugins", [])
    if not isinstance(inline, list):
        raise InvalidSpec(f"{path}: plugins: not a list")
    if directory and not _flag(found, "loadOnlyInlinedPlugins", path):
        inline = [*inline, *_folder(directory / name)]
        found = found | {"plugins": inline, "loadOnlyInlinedPlugins": True}
    if not inline:
        raise InvalidSpec(f"{path}: plugins: none")
    return NetworkConf(
        name=name,
        version=_version(found, path),
        plugins=tuple(_plugin(one, f"{path}: plugins[{index}]") for index, one in enumerate(inline)),
        check=not _flag(found, "disableCheck", path),
        gc=not _flag(found, "disableGC", path),
        source=json.dumps(found, separators=(",", ":")).encode(),
        path=path,
    )


def _folder(directory: Path) -> Iterator[object]:
    """The plugins that are files of their own, by name."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".conf"))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise InvalidSpec(f"{directory}: {error.strerror}") from error
    for name in names:
        path = directory / name
        try:
            yield json.loads(_file(path))
        except (ValueError, RecursionError) as error:
            raise InvalidSpec(f"{path}: not JSON: {error}") from error


def _plugin(found: object, where: str) -> Plugin:
    if not isinstance(found, dict):
        raise InvalidSpec(f"{where}: not a JSON object")
    kind = found.get("type")
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind) or kind in (".", ".."):
        raise InvalidSpec(f"{where}: type {kind!r}: not the name of a plugin")
    capabilities = found.get("capabilities") or {}
    if not isinstance(capabilities, dict):
        raise InvalidSpec(f"{where}: capabilities: not a JSON object")
    return Plugin(kind, found, frozenset(key for key, value in capabilities.items() if value is True))


def _version(found: Json, path: str) -> str:
    """The newest that the configuration offers and crib knows."""
    several = found.get("cniVersions", [])
    offered = [*(several if isinstance(several, list) else [several]), found.get("cniVersion")]
    known = [version for version in VERSIONS if version in offered]
    if not known:
        told = ", ".join(str(version) for version in offered if version) or "none"
        raise InvalidSpec(f"{path}: cniVersion {told}: crib knows {VERSIONS[0]} to {VERSIONS[-1]}")
    return known[-1]


def _flag(found: Json, key: str, path: str) -> bool:
    """A flag, also as the text that some versions of the specification allow."""
    value = found.get(key, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if not isinstance(value, bool):
        raise InvalidSpec(f"{path}: {key}: neither true nor false")
    return value

"""Records of attachments, in the format and place that libcni and its users know: <directory>/results/NET-ID-IFNAME.

An entry is written before the first plugin runs, without a result, and once more with it; so whatever plugins have
made is known to somebody. Entries of other runtimes in the same directory are seen and left alone.
"""

import base64
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from net.cni.conf import Json
from net.errors import Exhausted, Unavailable

_KIND: Final = "cniCacheV1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One attachment. `config` is the list that made it, `args` what CNI_ARGS said; `owner` "" is another runtime."""

    network: str
    container_id: str
    interface: str
    netns: str
    config: bytes
    args: tuple[tuple[str, str], ...]
    capabilities: Json
    result: Json | None
    owner: str


class Cache:
    """The entries. Raises Unavailable when a file can't be used, Exhausted when the disk is full."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "results"

    def put(self, entry: Entry, *, durable: bool) -> None:
        """Write the entry whole; `durable`: on the disk once it returns, as is what plugins lease."""
        found: Json = {
            "kind": _KIND,
            "containerId": entry.container_id,
            "config": base64.b64encode(entry.config).decode(),
            "ifName": entry.interface,
            "networkName": entry.network,
            "netns": entry.netns,
            "cniArgs": [list(pair) for pair in entry.args],
            "capabilityArgs": entry.capabilities,
            "crib": entry.owner,
        }
        if entry.result is not None:
            found["result"] = entry.result
        path = self._path(entry)
        new = path.with_name(f".{path.name}.new")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "wb", buffering=0) as file:
                file.write(json.dumps(found).encode())
                if durable:
                    os.fdatasync(fd)
            os.rename(new, path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (Exhausted if full else Unavailable)(f"CNI cache {path}: {error.strerror}") from error

    def remove(self, entry: Entry) -> None:
        try:
            self._path(entry).unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"CNI cache {self._path(entry)}: {error.strerror}") from error

    def of(self, container_id: str, owner: str) -> list[Entry]:
        """This runtime's entries for a sandbox."""
        return [entry for entry in self._read(f"-{container_id}-") if entry.owner == owner]

    def all(self) -> list[Entry]:
        """Every readable entry, other runtimes' as well."""
        return list(self._read(""))

    def _path(self, entry: Entry) -> Path:
        return self._directory / f"{entry.network}-{entry.container_id}-{entry.interface}"

    def _read(self, part: str) -> Iterator[Entry]:
        try:
            names = sorted(os.listdir(self._directory))
        except FileNotFoundError:
            return
        except OSError as error:
            raise Unavailable(f"CNI cache {self._directory}: {error.strerror}") from error
        for name in names:
            if part in name and not name.startswith("."):
                try:
                    yield _entry(json.loads((self._directory / name).read_bytes()))
                except (OSError, ValueError, TypeError, KeyError, AttributeError):
                    continue  # of another format, or gone meanwhile


def _entry(found: Json) -> Entry:
    if found["kind"] != _KIND:
        raise ValueError(found["kind"])
    args, result, capabilities = found.get("cniArgs"), found.get("result"), found.get("capabilityArgs")
    return Entry(
        network=str(found["networkName"]),
        container_id=str(found["containerId"]),
        interface=str(found["ifName"]),
        netns=str(found.get("netns", "")),
        config=base64.b64decode(str(found["config"])),
        args=tuple((str(key), str(value)) for key, value in args) if isinstance(args, list) else (),
        capabilities=capabilities if isinstance(capabilities, dict) else {},
        result=result if isinstance(result, dict) else None,
        owner=str(found.get("crib", "")),
    )

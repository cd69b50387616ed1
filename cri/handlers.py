"""RuntimeClass handlers: who runs a pod's containers, and with which options."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Final

from cri.config import HandlerSection
from cri.translate.defaults import Handler, Host
from runtime.errors import InvalidSpec, Unavailable
from runtime.external import Features, Runtime, features

_logger = logging.getLogger(__name__)
_BUILTIN: Final = HandlerSection()


class Handlers:
    """The configured handlers by name, "" for pods that name none. `refresh` blocks; it is for a worker thread."""

    def __init__(self, sections: dict[str, HandlerSection], host: Host) -> None:
        self._sections = {"": _BUILTIN, **sections}
        self._host = host
        self._features: dict[str, tuple[tuple[int, ...], Features]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._sections))

    def options(self, name: str) -> Handler:
        """Raises InvalidSpec for a handler that isn't configured, or not any more."""
        return self._section(name).translated()

    def cni_conf_dir(self, name: str) -> str:
        """Where the network of its pods is configured, "" for the node's. Raises InvalidSpec as `options` does."""
        return self._section(name).cni_conf_dir

    def runtime(self, name: str) -> Runtime | None:
        """The external runtime of new pods, None for the built-in engine.

        Raises InvalidSpec for an unknown handler, and for one whose program is gone.
        """
        section = self._section(name)
        if not section.path:
            return None
        if not (os.path.isfile(section.path) and os.access(section.path, os.X_OK)):
            raise InvalidSpec(f"runtime_handler {name!r}: {section.path} is no program")
        return Runtime(name=name, path=section.path, args=section.args)

    def host(self, name: str) -> Host:
        """The host as the handler's pods can use it: what it has been asked, and has said, that it can do."""
        section = self._sections.get(name, _BUILTIN)
        if not section.path:
            return self._host
        found = self._features[name][1] if name in self._features else Features()
        return dataclasses.replace(
            self._host,
            recursive_read_only=self._host.recursive_read_only and found.recursive_read_only_mounts,
            user_namespaces=self._host.user_namespaces and found.user_namespaces,
            idmapped_mounts=self._host.idmapped_mounts and found.user_namespaces,
        )

    def refresh(self) -> None:
        """Ask the external runtimes what they can do, where a program has come, gone or changed. Blocks."""
        for name, section in self._sections.items():
            if not section.path:
                continue
            try:
                status = os.stat(section.path)
                version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if self._features.get(name, ((), None))[0] == version:
                    continue
                self._features.pop(name, None)
                runtime = Runtime(name=name, path=section.path, args=section.args)
                self._features[name] = version, features(runtime)
            except (OSError, Unavailable) as error:
                if self._features.pop(name, None):
                    _logger.warning("runtime is gone", extra={"fields": {"handler": name, "error": str(error)}})

    def _section(self, name: str) -> HandlerSection:
        try:
            return self._sections[name]
        except KeyError:
            raise InvalidSpec(f"runtime_handler {name!r}: this node has {', '.join(map(repr, self))}") from None

"""The operations of CNI on a network's plugins: ADD, DEL, CHECK, STATUS, GC and VERSION. Source: CNI 1.1.0.

Plugins of a chain run one after the other without a shell between them. Each gets the configuration as its own, with
name, version, what the runtime tells it and the result so far put in.
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from net.cni import invoke
from net.cni.conf import VERSIONS, Json, NetworkConf, Plugin
from net.cni.invoke import Output, PluginFailed
from net.cni.result import convert
from net.errors import CribError

_TEXT_LIMIT: Final = 1000
_PLACEHOLDERS: Final = {"CNI_CONTAINERID": "none", "CNI_NETNS": "none", "CNI_IFNAME": "none"}
"""Plugins built with an old library want these for VERSION as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is connected: `netns` "" where the namespace is gone. `capabilities` go to plugins that declare them."""

    container_id: str
    netns: str
    interface: str
    args: tuple[tuple[str, str], ...] = ()
    capabilities: Json = field(default_factory=dict)


class Chain:
    """Runs plugins found in `directories`, each operation with `timeout_s` for all of them. Safe in several threads.

    Every operation raises PluginFailed and DeadlineExceeded, naming the plugin.
    """

    def __init__(self, directories: Sequence[str], timeout_s: float) -> None:
        self._directories = directories
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._versions: dict[tuple[str, int, int, int], tuple[str, ...]] = {}

    def add(self, conf: NetworkConf, target: Target) -> Json:
        """Connect; the last plugin's result. What the plugins before a failure have made is for `delete` to undo."""
        deadline = time.monotonic() + self._timeout_s
        result: Json | None = None
        for plugin in conf.plugins:
            answer = self._run("ADD", conf, plugin, deadline, target, result)
            try:
                result = convert(_object(answer.stdout), conf.version)
            except PluginFailed as error:
                raise PluginFailed(f"plugin {plugin.type}: ADD: {error}{_hint(answer)}") from error
        assert result is not None  # a configuration without plugins is none
        return result

    def delete(self, conf: NetworkConf, target: Target, result: Json | None) -> None:
        """Disconnect, last plugin first, all of them even where one fails; raises the first failure then."""
        deadline = time.monotonic() + self._timeout_s
        told = convert(result, conf.version) if result and conf.speaks("0.4.0") else None
        failures: list[CribError] = []
        for plugin in reversed(conf.plugins):
            try:
                self._run("DEL", conf, plugin, deadline, target, told)
            except CribError as error:
                failures.append(error)
        _raise_first(failures)

    def check(self, conf: NetworkConf, target: Target, result: Json) -> None:
        """Raises where the attachment isn't as its result says. Networks before 0.4.0, or with disableCheck: never."""
        if not conf.check or not conf.speaks("0.4.0"):
            return
        deadline = time.monotonic() + self._timeout_s
        for plugin in conf.plugins:
            self._run("CHECK", conf, plugin, deadline, target, convert(result, conf.version))

    def status(self, conf: NetworkConf, timeout_s: float) -> None:
        """Raises where a plugin couldn't do an ADD now."""
        if conf.speaks("1.1.0"):
            deadline = time.monotonic() + timeout_s
            for plugin in conf.plugins:
                self._run("STATUS", conf, plugin, deadline)

    def gc(self, conf: NetworkConf, valid: Iterable[tuple[str, str]]) -> None:
        """Let plugins give up what belongs to none of the attachments (container id, interface); all are asked."""
        if not conf.gc or not conf.speaks("1.1.0"):
            return
        deadline = time.monotonic() + self._timeout_s
        listed = [{"containerID": container_id, "ifname": interface} for container_id, interface in sorted(valid)]
        known: Json = {
            "cni.dev/valid-attachments": listed,
            "cni.dev/attachments": listed,
        }  # the second: before 1.1.0 was final
        failures: list[CribError] = []
        for plugin in conf.plugins:
            try:
                self._run("GC", conf, plugin, deadline, more=known)
            except CribError as error:
                failures.append(error)
        _raise_first(failures)

    def validate(self, conf: NetworkConf, timeout_s: float) -> None:
        """Raises where a plugin is missing or doesn't speak the configuration's version. Remembers what they answer."""
        deadline = time.monotonic() + timeout_s
        for plugin in conf.plugins:
            self._find(plugin.type, conf, deadline)

    def find(self, kind: str, conf: NetworkConf, timeout_s: float) -> str:
        """The executable of one plugin, which may be one that another plugin starts. Raises as `validate`."""
        return self._find(kind, conf, time.monotonic() + timeout_s)

    def _find(self, kind: str, conf: NetworkConf, deadline: float) -> str:
        path = invoke.find(kind, self._directories)
        spoken = self._spoken(path, deadline)
        if conf.version not in spoken:
            known = ", ".join(version for version in spoken if version in VERSIONS) or "none that crib knows"
            text = f"plugin {kind}: does not speak version {conf.version} of {conf.path} (it speaks {known})"
            raise PluginFailed(text)
        return path

    def _spoken(self, path: str, deadline: float) -> tuple[str, ...]:
        try:
            found = os.stat(path)
        except OSError as error:
            raise PluginFailed(f"plugin {path}: {error.strerror}") from error
        key = (path, found.st_ino, found.st_mtime_ns, found.st_size)
        with self._lock:
            if key in self._versions:
                return self._versions[key]
        environment = {"CNI_COMMAND": "VERSION", "CNI_PATH": self._path(), **_PLACEHOLDERS}
        body = json.dumps({"cniVersion": VERSIONS[-1]}).encode()
        name = os.path.basename(path)
        answer = invoke.run(path, environment, body, deadline)
        _judge(name, "VERSION", answer)
        try:
            spoken = _object(answer.stdout).get("supportedVersions")
        except PluginFailed as error:
            raise PluginFailed(f"plugin {name}: VERSION: {error}{_hint(answer)}") from error
        if not isinstance(spoken, list):
            raise PluginFailed(f"plugin {name}: VERSION: no supportedVersions{_hint(answer)}")
        versions = tuple(str(version) for version in spoken)
        with self._lock:
            self._versions[key] = versions
        return versions

    def _run(
        self,
        command: str,
        conf: NetworkConf,
        plugin: Plugin,
        deadline: float,
        target: Target | None = None,
        previous: Json | None = None,
        more: Json | None = None,
    ) -> Output:
        body: Json = {**plugin.conf, "name": conf.name, "cniVersion": conf.version, **(more or {})}
        environment = {"CNI_COMMAND": command, "CNI_PATH": self._path()}
        if target:
            told = {key: value for key, value in target.capabilities.items() if key in plugin.capabilities}
            if told:
                body["runtimeConfig"] = told
            environment |= {
                "CNI_CONTAINERID": target.container_id,
                "CNI_NETNS": target.netns,
                "CNI_IFNAME": target.interface,
                "CNI_ARGS": ";".join(f"{key}={value}" for key, value in target.args),
            }
        if previous is not None:
            body["prevResult"] = previous
        path = invoke.find(plugin.type, self._directories)
        answer = invoke.run(path, environment, json.dumps(body).encode(), deadline)
        _judge(plugin.type, command, answer)
        return answer

    def _path(self) -> str:
        return ":".join(self._directories)


def _judge(name: str, command: str, answer: Output) -> None:
    """Raises PluginFailed for a plugin that failed, or ended well and printed an error."""
    try:
        found = _object(answer.stdout)
    except PluginFailed:
        found = {}
    code = found.get("code")
    failed = isinstance(code, int) and code != 0 and "msg" in found
    if answer.code == 0 and not failed:
        return
    if failed:
        text = ": ".join(str(found[key]) for key in ("msg", "details") if found.get(key))
    elif answer.code < 0:
        text = f"killed by signal {-answer.code}"
    else:
        text = f"exit code {answer.code}, and no error as CNI has them: {_shown(answer.stdout)}"
    message = f"plugin {name}: {command}: {text[:_TEXT_LIMIT]}{_hint(answer)}"
    raise PluginFailed(message, code if failed and isinstance(code, int) else 0)


def _object(stdout: bytes) -> Json:
    try:
        found = json.loads(stdout)
    except (ValueError, RecursionError) as error:
        raise PluginFailed(f"printed no JSON: {_shown(stdout)}") from error
    if not isinstance(found, dict):
        raise PluginFailed(f"printed no JSON object: {_shown(stdout)}")
    return found


def _shown(stdout: bytes) -> str:
    text = stdout[:200].decode(errors="replace").strip()
    return repr(text) if text else "nothing"


def _hint(answer: Output) -> str:
    return f" (stderr: {answer.stderr[-500:]})" if answer.stderr else ""


def _raise_first(failures: list[CribError]) -> None:
    for other in failures[1:]:
        failures[0].add_note(str(other))
    if failures:
        raise failures[0]

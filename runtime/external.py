"""External OCI runtimes: any program with runc's command line, handed the spec that the built-in engine would run.

The runtime's processes come and go, the pod's monitor stays the parent of what they make: it runs `create` and `exec`,
and adopts the process whose pid they wrote. `start` and `delete` are run from here. A signal or a kill needs no
runtime: it goes to the process, or to the cgroup, which is crib's. A container's bundle, with all that the runtime
keeps of it, is in its pod's directory and goes with that; what is mounted in a bundle, only the runtime sees.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from socket import AF_UNIX, SOCK_NONBLOCK, SOCK_STREAM, socket
from typing import Final

import msgspec

from runtime.errors import CribError, Unavailable
from runtime.images import RootFs
from runtime.plan.bundle import ENVIRONMENT, compile_bundle, compile_command, handed_process
from runtime.plan.compile import Environment
from runtime.plan.plan import Plan
from runtime.spec import Process, Spec

_COMMAND_TIMEOUT_S: Final = 60.0
_FEATURES_TIMEOUT_S: Final = 10.0
_LOG_BYTES: Final = 64 << 10
_MESSAGE_CHARACTERS: Final = 2048


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """An OCI runtime's program: `args` come before the command's name. `name` is its handler's."""

    name: str
    path: str
    args: tuple[str, ...] = ()


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime has said that it can do (the runtime spec's features.md); nothing where it doesn't say."""

    recursive_read_only_mounts: bool = False
    user_namespaces: bool = False


class _Enabled(msgspec.Struct):
    enabled: bool = False


class _MountExtensions(msgspec.Struct):
    idmap: _Enabled = msgspec.field(default_factory=_Enabled)


class _LinuxFeatures(msgspec.Struct, rename="camel"):
    namespaces: tuple[str, ...] = ()
    mount_extensions: _MountExtensions = msgspec.field(default_factory=_MountExtensions)


class _FeaturesDocument(msgspec.Struct, rename="camel"):
    mount_options: tuple[str, ...] = ()
    linux: _LinuxFeatures = msgspec.field(default_factory=_LinuxFeatures)


class _LogEntry(msgspec.Struct):
    level: str = ""
    msg: str = ""


def features(runtime: Runtime) -> Features:
    """Ask the runtime. Blocks for as long as its program takes to start. Raises Unavailable where there is none."""
    try:
        done = subprocess.run(
            [runtime.path, *runtime.args, "features"],
            env=_environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_FEATURES_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{runtime.path} features: no answer within {_FEATURES_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise Unavailable(f"{runtime.path}: {(error.strerror or str(error)).lower()}") from error
    try:
        found = msgspec.json.decode(done.stdout, type=_FeaturesDocument)
    except msgspec.MsgspecError:  # an older one, that has no such command
        return Features()
    return Features(
        recursive_read_only_mounts="rro" in found.mount_options,
        user_namespaces="user" in found.linux.namespaces and found.linux.mount_extensions.idmap.enabled,
    )


@dataclass(frozen=True, slots=True)
class Call:
    """A command that the monitor is to run: its plan, and the fields and descriptor of the message beside it.

    `adopt` names the file, below the pod's directory, that the made process's pid is in.
    """

    plan: Plan
    adopt: str
    console: socket | None

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.console.fileno(),) if self.console else ()

    def close(self) -> None:
        """The message is sent, and what it carried is the monitor's."""
        if self.console:
            self.console.close()


class Bundle:
    """A bundle in the pod's directory: config.json, what the runtime writes, where its parts are mounted."""

    def __init__(self, runtime: Runtime, pod_directory: str, container_id: str) -> None:
        self._runtime = runtime
        self._id = container_id
        self._pod = os.path.realpath(pod_directory)
        self._name = f"bundle-{container_id}"
        self._directory = f"{self._pod}/{self._name}"
        self.title = f"runtime handler {runtime.name!r} ({runtime.path})"
        self._cgroup: dict[str, int] = {}  # its directories, and what tells them from later ones of the same names

    def create(self, spec: Spec, rootfs: RootFs, environment: Environment, cgroup: tuple[str, ...]) -> Call:
        """Write the bundle; what makes the container, and doesn't start it yet. `cgroup` are its cgroup's directories.

        Raises Unsupported, OSError, or CribError where there is no cgroup.
        """
        self._cgroup = _inodes(cgroup)
        call = self._call("create", spec.process, "--bundle", self._directory)
        command, host = call.plan[-1].values()[0], f"/proc/{os.getpid()}/ns"
        bundle = compile_bundle(spec, rootfs, environment, self._directory, command, host)
        if bundle.user:
            os.symlink(bundle.user, f"{self._directory}/user")
        self._write("config.json", bundle.spec)
        return Call(bundle.plan, call.adopt, call.console)

    async def start(self, pid: int) -> None:
        """Have the process that `create` has made become its program.

        Raises CribError, also where the cgroup was removed meanwhile: the runtime makes another, which has no limits.
        """
        if _inodes(self._cgroup) != self._cgroup:
            raise CribError(f"cgroup {next(iter(self._cgroup))}: was removed while the container was made")
        await self._run("start", "start", self._id)

    def exec(self, exec_id: str, process: Process, environment: Environment) -> Call:
        """What runs one more process in the container. Raises OSError."""
        call = self._call(
            exec_id, process, "--detach", "--process", f"{self._directory}/{exec_id}.json", command="exec"
        )
        self._write(f"{exec_id}.json", handed_process(process, environment))
        return call

    async def delete(self) -> None:
        """Have the runtime forget the container, which runs its poststop hooks, and remove the bundle.

        Raises CribError, with the bundle gone all the same.
        """
        if not self._written:
            return
        try:
            await self._run("delete", "delete", "--force", self._id)
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _written(self) -> bool:
        return os.path.exists(f"{self._directory}/config.json")

    def discard(self, name: str) -> None:
        """Remove the files of a command that is through."""
        for suffix in ("json", "log", "pid", "sock"):
            with suppress(FileNotFoundError):
                os.unlink(f"{self._directory}/{name}.{suffix}")

    def complaint(self, name: str, otherwise: str) -> str:
        """What the runtime has logged last as an error of the command `name`."""
        try:
            with open(f"{self._directory}/{name}.log", "rb") as file:
                text = file.read(_LOG_BYTES).decode("utf-8", "replace")
        except OSError:
            return otherwise
        for entry in reversed(list(_entries(text))):
            try:
                found = msgspec.convert(entry, _LogEntry)
            except msgspec.MsgspecError:
                continue
            if found.level in ("error", "fatal") and found.msg:
                return found.msg.strip()[:_MESSAGE_CHARACTERS]
        return otherwise

    def _call(self, name: str, process: Process, *words: str, command: str = "") -> Call:
        os.makedirs(self._directory, 0o700, exist_ok=True)
        arguments = self._arguments(name, command or name, "--pid-file", f"{name}.pid", *words)
        console = self._listen(f"{name}.sock") if process.terminal else None
        arguments = (*arguments, "--console-socket", f"{name}.sock") if console else arguments
        plan = compile_command(process, self._directory, (*arguments, self._id))
        return Call(plan, f"{self._name}/{name}.pid", console)

    def _arguments(self, log: str, *words: str) -> tuple[str, ...]:
        given = self._runtime
        own = ("--root", f"{self._pod}/runtime", "--log", f"{self._directory}/{log}.log", "--log-format", "json")
        return (given.path, *given.args, *own, *words)

    def _listen(self, name: str) -> socket:
        """The runtime sends a terminal's master there. By the directory's descriptor: a path may be too long."""
        directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
        try:
            listener.bind(f"/proc/self/fd/{directory}/{name}")
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(directory)
        return listener

    def _write(self, name: str, content: Spec | Process) -> None:
        path = f"{self._directory}/{name}"
        try:
            with open(path, "wb") as file:
                file.write(msgspec.json.encode(content))
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None

    async def _run(self, name: str, *words: str) -> None:
        """A command that makes no process of the container's. Raises CribError."""
        title = f"{self._runtime.path} {words[0]}"
        try:
            process = await asyncio.create_subprocess_exec(
                *self._arguments(name, *words),
                env=_environment(),
                cwd=self._directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise CribError(f"{title}: {(error.strerror or str(error)).lower()}") from error
        try:
            async with asyncio.timeout(_COMMAND_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            raise CribError(f"{title}: took longer than {_COMMAND_TIMEOUT_S:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if code:
            raise CribError(f"{title}: {self.complaint(name, f'exit code {code}')}")


def _entries(text: str) -> Iterator[object]:
    """The JSON values of a log: runc's are a line each, crun's have several. What is none is left out, by the line."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            found, at = decoder.raw_decode(text, at)
            yield found
        except ValueError:
            at = text.find("\n", at) + 1 or len(text)


def _inodes(directories: Iterable[str]) -> dict[str, int]:
    """Of a cgroup's directories. Raises CribError where one is gone."""
    try:
        return {directory: os.stat(directory).st_ino for directory in directories}
    except FileNotFoundError as error:
        raise CribError(f"cgroup {error.filename}: was removed") from error


def _environment() -> dict[str, str]:
    return dict(item.split("=", 1) for item in ENVIRONMENT)

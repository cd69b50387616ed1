"""The engine: what cribd calls to run pods. It makes monitors through the zygote and finds them again."""

import asyncio
import json
import logging
import os
import resource
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import AF_UNIX, SO_PEERCRED, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair
from struct import unpack
from typing import Any, Final

from runtime import hooks
from runtime.channel import Channel
from runtime.errors import AlreadyExists, CribError, DeadlineExceeded, Unavailable
from runtime.execs import Exec
from runtime.external import Bundle, Runtime
from runtime.linux.caps import NUMBERS, last_cap
from runtime.linux.probe import Probes
from runtime.plan.compile import Cgroup, Environment, Maps, Namespaces
from runtime.plan.identity import RLIMIT_NAMES
from runtime.pod import END_TIMEOUT_S, REQUEST_TIMEOUT_S, Pod, gone
from runtime.replies import checked, container_exit
from runtime.request import (
    ContainerExit,
    ContainerFact,
    ContainerStart,
    ExecExit,
    ExecStart,
    LogFile,
    LogLoss,
    PodStart,
    Started,
    StepTiming,
)
from runtime.spec import Hook, Spec
from runtime.volumes import Volumes
from runtime.zygote.launch import Zygote
from runtime.zygote.log import open_log
from runtime.zygote.messages import Kind, close_all
from runtime.zygote.server import SOCKET_NAME

POD_TIMEOUT_S: Final = 20.0
_AGAIN_S: Final = (1.0, 60.0)
"""Between attempts to start a zygote: at first, and at most."""
_logger = logging.getLogger(__name__)

__all__ = [
    "Cgroup",
    "ContainerExit",
    "ContainerFact",
    "ContainerStart",
    "Engine",
    "Exec",
    "ExecExit",
    "ExecStart",
    "LogFile",
    "LogLoss",
    "Maps",
    "Namespaces",
    "Pod",
    "PodStart",
    "Runtime",
    "Started",
    "StepTiming",
    "open_log",
]


class Engine:
    """Runs pods below `state`, cribd's state directory. Lives in one asyncio loop; `volumes` is for threads."""

    def __init__(self, state: Path, zygote: Zygote, probes: Probes) -> None:
        self._state = state
        self._probes = probes
        self._last_cap = last_cap()
        self._hard_limits = _hard_limits()
        self._staging = str(state / "rootfs")
        self._pods: dict[str, Pod] = {}
        os.makedirs(self._staging, 0o700, exist_ok=True)
        self.volumes = Volumes(state / "mnt", overlay_of_descriptors=probes.overlay_of_descriptors)
        self._zygote = zygote
        self._zygote_channel = self._to_zygote()
        self._relaunch: asyncio.Task[None] | None = None

    def _to_zygote(self) -> Channel:
        channel = Channel(self._zygote.control)
        channel.on_closed = self._zygote_lost
        return channel

    def _zygote_lost(self) -> None:
        _logger.error("the zygote is gone: no pod can be made until there is another one")
        self._relaunch = asyncio.create_task(self._launch_again())

    async def _launch_again(self) -> None:
        wait_s, longest_s = _AGAIN_S
        while True:
            try:
                await asyncio.to_thread(self._zygote.relaunch)
                break
            except (CribError, OSError) as error:
                _logger.error("no zygote", extra={"fields": {"error": str(error)}})
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, longest_s)
        self._zygote_channel = self._to_zygote()
        _logger.info("a new zygote is there")

    @property
    def ready(self) -> bool:
        """Whether pods can be made now: the zygote is there."""
        return not self._zygote_channel.closed

    def pod(self, pod_id: str) -> Pod | None:
        """The connected pod of that id."""
        return self._pods.get(pod_id)

    def directory(self, pod_id: str) -> Path:
        """Where a pod's socket and exit records are."""
        return self._state / "pods" / pod_id

    async def start_pod(self, request: PodStart) -> Pod:
        """Make a pod's monitor and namespaces.

        Raises AlreadyExists, InvalidSpec (a kernel parameter), Unavailable (what else the kernel refused) or
        DeadlineExceeded, and leaves nothing then.
        """
        if request.id in self._pods:
            raise AlreadyExists(f"pod {request.id} has a monitor")
        if self._relaunch is not None:
            done, _ = await asyncio.wait((self._relaunch,), timeout=POD_TIMEOUT_S)
            if not done:
                raise Unavailable("the process that makes pods is gone, and can't be started")
        os.makedirs(self.directory(request.id), 0o700, exist_ok=True)
        shm = ""
        if request.shm_bytes and not self._probes.clone_detached_mount:
            shm = self.volumes.shm(request.id)
        mine, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        mine.setblocking(False)
        channel, zygote, number = Channel(mine), self._zygote_channel, 0
        try:
            with theirs:
                number = zygote.post(
                    Kind.SPAWN,
                    (theirs.fileno(),),
                    lambda _: channel.close(),  # answered only when the fork failed
                    id=request.id,
                    directory=str(self.directory(request.id)),
                    usual=request.net and request.ipc and request.hostname is not None and not request.uids,
                )
            reply = await channel.request(
                Kind.POD,
                (),
                POD_TIMEOUT_S,
                net=request.net,
                ipc=request.ipc,
                pid=request.pid,
                uids=request.uids,
                gids=request.gids,
                hostname=request.hostname,
                shm_bytes=request.shm_bytes,
                shm_path=shm,
                mount_label=request.mount_label,
                sysctls=dict(request.sysctls),
                init_cgroup=request.init_cgroup,
            )
            try:
                pod = self._adopt(request.id, channel, checked(reply))
            except BaseException:
                close_all(reply.fds)
                raise
        except BaseException:
            channel.close()
            await self._discard(request.id)
            raise
        finally:
            zygote.forget(number)
        if request.net:
            pod.netns_fd = reply.fds[0]
            pod.rtnl = socket(fileno=reply.fds[1])
        return pod

    async def connect(self, pod_id: str) -> Pod | None:
        """Find the monitor that an earlier cribd left; None when it is gone. Ends are told by `Pod.containers`.

        Raises DeadlineExceeded or Unavailable for one that is there and doesn't answer, as one of a build whose
        messages are others.
        """
        found = self._pods.get(pod_id)
        if found:
            return found
        sock = self._reach(pod_id)
        if sock is None:
            return None
        channel = Channel(sock)
        try:
            return self._adopt(pod_id, channel, checked(await channel.request(Kind.FACTS, (), REQUEST_TIMEOUT_S)))
        except Unavailable as error:
            channel.close()
            left = self._reach(pod_id)
            if left is None:
                return None
            left.close()
            raise Unavailable(f"pod {pod_id}: its monitor lives, and doesn't answer: {error}") from error
        except BaseException:
            channel.close()
            raise

    async def run_hooks(self, stage: str, wanted: tuple[Hook, ...], state: Mapping[str, object]) -> None:
        """Run hooks in the host's namespaces, one after the other, with `state` on stdin.

        Raises CribError for the first that fails, with what it wrote; one that takes too long is killed with all that
        it has started.
        """
        if not wanted:
            return
        mine, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        mine.setblocking(False)
        channel, zygote, number = Channel(mine), self._zygote_channel, 0
        try:
            with theirs:
                number = zygote.post(Kind.RUNNER, (theirs.fileno(),), lambda _: channel.close())
            plain, limit_s = hooks.plain(wanted), hooks.deadline_s(wanted)
            reply = await channel.request(Kind.HOOKS, (), limit_s, stage=stage, hooks=plain, state=json.dumps(state))
        finally:
            zygote.forget(number)
            channel.close()
        if reply.kind == Kind.FAILED:
            raise CribError(str(reply.fields["detail"]))

    async def stopped(
        self, pod_id: str, container_id: str, find_spec: Callable[[], Spec], runtime: Runtime | None = None
    ) -> None:
        """Run the poststop hooks of a container that had been started and is gone, and remove its bundle.

        Needs no monitor. Raises CribError; nothing is run for a container without a bundle, nor `find_spec` asked.
        """
        if runtime:
            await Bundle(runtime, str(self.directory(pod_id)), container_id).delete()
            return
        bundle = self.directory(pod_id) / f"bundle-{container_id}"
        if not bundle.is_dir() or not (spec := find_spec()).hooks:
            return
        state = hooks.state(container_id, "stopped", str(bundle), spec.annotations)
        try:
            await self.run_hooks("poststop", spec.hooks.poststop, state)
        finally:
            shutil.rmtree(bundle, ignore_errors=True)

    def _reach(self, pod_id: str) -> socket | None:
        """A socket to the pod's monitor, whether it answers or not; None when it is gone."""
        try:
            directory = os.open(self.directory(pod_id), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        sock = socket(AF_UNIX, SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            sock.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return None
        except BlockingIOError:
            sock.close()
            raise Unavailable(f"pod {pod_id}: its monitor takes no connections") from None
        finally:
            os.close(directory)
        return sock

    async def stop_pod(self, pod_id: str) -> None:
        """End a pod's monitor with all that runs under it, and remove what it made, the pod's volumes too. Idempotent.

        Raises DeadlineExceeded when the monitor can't be killed, Unavailable when a volume can't be unmounted.
        """
        try:
            pod = await self.connect(pod_id)
        except (DeadlineExceeded, Unavailable):
            await self._kill_monitor(pod_id)
            pod = None
        if pod:
            await pod.end()
            self._pods.pop(pod_id, None)
        if self.volumes.holds(pod_id):
            await asyncio.to_thread(self.volumes.remove, pod_id)

    async def _kill_monitor(self, pod_id: str) -> None:
        """End a monitor that answers nobody, and that this cribd has never talked to."""
        pidfd = -1
        try:
            for _ in range(
                2
            ):  # the second time tells that it lived on after the pidfd was opened: the number is its own
                sock = self._reach(pod_id)
                if sock is None:
                    return
                with sock:
                    pid = unpack("iII", sock.getsockopt(SOL_SOCKET, SO_PEERCRED, 12))[0]
                if pidfd < 0:
                    pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not await gone(pidfd, END_TIMEOUT_S):
                raise DeadlineExceeded(f"pod {pod_id}: its monitor (pid {pid}) does not die")
        except ProcessLookupError:
            return
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def drop(self, pod_id: str) -> None:
        """Forget a pod whose monitor was lost, so that `connect` looks for it anew."""
        pod = self._pods.pop(pod_id, None)
        if pod:
            pod.close()

    def exits_on_disk(self, pod_id: str) -> list[ContainerExit]:
        """The ends that a monitor recorded, for when it is gone itself. A damaged record is passed over."""
        found = []
        for path in self.directory(pod_id).glob("exit-*.json"):
            try:
                found.append(container_exit(json.loads(path.read_bytes())))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def close(self) -> None:
        """Let go of everything; pods and their monitors live on."""
        for pod in self._pods.values():
            pod.close()
        self._pods.clear()
        if self._relaunch is not None:
            self._relaunch.cancel()
        self._zygote_channel.close()
        self._zygote.close()

    def _adopt(self, pod_id: str, channel: Channel, facts: dict[str, Any]) -> Pod:
        """Hold on to a monitor that has just said who it is."""
        pid = facts["pid"]
        pidfd = os.pidfd_open(pid)
        made = facts["pod"]
        ns = f"/proc/{pid}/ns"
        namespaces = Namespaces(
            network=f"{ns}/net" if made["net"] else "",
            ipc=f"{ns}/ipc" if made["ipc"] else "",
            uts=f"{ns}/uts" if made["hostname"] is not None else "",
            pid=f"/proc/{facts['init_pid']}/ns/pid" if made["pid"] else "",
            user=f"/proc/{pid}/fd/{facts['user']}" if made["uids"] else "",
        )
        shm = made["shm_path"] or (f"{self.directory(pod_id)}/shm" if made["shm_bytes"] else "")
        environment = Environment(
            self._staging,
            namespaces,
            shm,
            bool(made["shm_path"]),
            self._last_cap,
            str(self.directory(pod_id)),
            self._probes.overlay_of_descriptors,
            self._hard_limits,
        )
        pod = Pod(pod_id, channel, environment, pidfd, pid, self.run_hooks)
        pod.init_pid = facts["init_pid"]
        self._pods[pod_id] = pod
        return pod

    async def _discard(self, pod_id: str) -> None:
        """Undo a start that failed: whatever monitor there is by now ends."""
        self.drop(pod_id)
        await self.stop_pod(pod_id)
        (self.directory(pod_id) / SOCKET_NAME).unlink(missing_ok=True)


def _hard_limits() -> tuple[int, ...]:
    """What resource limits can't be raised above here, by number; () for a process that may raise them."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    if effective >> NUMBERS["CAP_SYS_RESOURCE"] & 1:
        return ()
    return tuple(resource.getrlimit(number)[1] % (1 << 64) for number in range(len(RLIMIT_NAMES)))

"""A running pod as cribd holds it: its monitor's channel, its containers' starts, execs and ends."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from socket import AF_UNIX, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair
from typing import Any, Final

from runtime.channel import Channel
from runtime.errors import DeadlineExceeded, Unavailable
from runtime.execs import Exec, Execs
from runtime.hooks import Run
from runtime.plan.compile import Environment, Namespaces
from runtime.replies import checked, container_exit, container_fact
from runtime.request import ContainerExit, ContainerFact, ContainerStart, ExecStart, LogFile, Started
from runtime.starts import Starts
from runtime.zygote.messages import Kind

REQUEST_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 10.0
_SO_SNDBUFFORCE: Final = 32  # include/uapi/asm-generic/socket.h; the socket module lacks it
ATTACH_BUFFER_BYTES: Final = 4 << 20
"""What a client that is attached may lag behind the container's output before it loses some; taken only as it does."""


class Pod:
    """A pod whose monitor is connected.

    `netns_fd` and `rtnl` (a NETLINK_ROUTE socket inside) are there after the start of a pod with its own network
    namespace, until `release_network`. `on_exit` is called once per container that ends, `on_log` with what is
    known of a container whose log loses output or is full, `on_lost` when the monitor is gone without having been asked
    to end. `over` is set when it is gone, or let go of.
    """

    def __init__(
        self, pod_id: str, channel: Channel, environment: Environment, pidfd: int, pid: int, run_hooks: Run
    ) -> None:
        self.id = pod_id
        self.monitor_pid = pid
        self.init_pid = 0
        self.environment = environment
        self.netns_fd = -1
        self.rtnl: socket | None = None
        self.on_exit: Callable[[ContainerExit], None] | None = None
        self.on_log: Callable[[ContainerFact], None] | None = None
        self.on_lost: Callable[[], None] | None = None
        self.over = asyncio.Event()
        self._pidfd = pidfd
        self._channel = channel
        self._starts = Starts(channel, environment, self.request, run_hooks)
        self._execs = Execs(channel, environment, self.request)
        channel.peer_pid = pid
        channel.on_event = self._event
        channel.on_closed = self._lost

    @property
    def namespaces(self) -> Namespaces:
        return self.environment.namespaces

    @property
    def shm_path(self) -> str:
        """What stands for the pod's /dev/shm as a mount's source; "" where it has none of its own."""
        return self.environment.shm_path

    def release_network(self) -> None:
        """Close `netns_fd` and `rtnl`: the namespace is pinned and configured."""
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1
        if self.rtnl:
            self.rtnl.close()
            self.rtnl = None

    async def request(self, kind: str, timeout_s: float = REQUEST_TIMEOUT_S, **fields: Any) -> dict[str, Any]:
        """Ask the monitor. Raises WrongState (nothing runs by that name), Unavailable or DeadlineExceeded."""
        return checked(await self._channel.request(kind, (), timeout_s, **fields))

    async def set_sysctls(self, sysctls: Mapping[str, str]) -> None:
        """Set kernel parameters of the pod's namespaces. Raises InvalidSpec, Unavailable or DeadlineExceeded."""
        await self.request(Kind.SYSCTLS, sysctls=dict(sysctls))

    def prepare(self, request: ContainerStart) -> bool:
        """See `Starts.prepare`."""
        return self._starts.prepare(request)

    async def start(self, request: ContainerStart) -> Started:
        """See `Starts.start`."""
        return await self._starts.start(request)

    def exec(self, request: ExecStart, stdin: int = -1, stdout: int = -1, stderr: int = -1) -> Exec:
        """See `Execs.start`."""
        return self._execs.start(request, stdin, stdout, stderr)

    async def attach(self, container_id: str, stdin: bool) -> socket:
        """Share a container's streams by `runtime.zygote.packets`, on the returned non-blocking socket.

        Raises WrongState when the container does not run, Unavailable or DeadlineExceeded.
        """
        mine, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        try:
            with theirs:
                for end in (mine, theirs):
                    end.setsockopt(SOL_SOCKET, _SO_SNDBUFFORCE, ATTACH_BUFFER_BYTES)
                reply = await self._channel.request(
                    Kind.ATTACH, (theirs.fileno(),), REQUEST_TIMEOUT_S, id=container_id, stdin=stdin
                )
            checked(reply)
            mine.setblocking(False)
        except BaseException:
            mine.close()
            raise
        return mine

    async def tcp_socket(self, family: int) -> socket:
        """A new non-blocking TCP socket in the pod's network namespace. Raises Unavailable or DeadlineExceeded."""
        reply = await self._channel.request(Kind.SOCKET, (), REQUEST_TIMEOUT_S, family=int(family))
        checked(reply)
        return socket(fileno=reply.fds[0])

    async def resize(self, container_id: str, rows: int, columns: int) -> None:
        """Set the size of a container's terminal. Raises WrongState or Unavailable."""
        await self.request(Kind.RESIZE, id=container_id, rows=rows, columns=columns)

    async def signal(self, container_id: str, number: int) -> None:
        """Send a signal to a container's first process. Raises WrongState when it does not run."""
        await self.request(Kind.SIGNAL, id=container_id, signal=int(number))

    async def kill(self, container_id: str) -> None:
        """SIGKILL for all processes of a container; none is fine."""
        await self.request(Kind.KILL, id=container_id)

    async def reopen_log(self, container_id: str, log: LogFile) -> None:
        """Go on in a new log file: nothing goes to the old one any more then.

        Raises WrongState when the container does not run, Unavailable where the old file's disk doesn't answer.
        """
        reply = await self._channel.request(
            Kind.REOPEN, (log.fd,), REQUEST_TIMEOUT_S, id=container_id, log_size=log.size
        )
        checked(reply)

    async def forget(self, container_id: str) -> None:
        """Drop the monitor's record of a container that has exited, or what waits for its start."""
        self._starts.forget(container_id)
        self._execs.forget(container_id)
        await self.request(Kind.FORGET, id=container_id)

    async def containers(self) -> list[ContainerFact]:
        """What runs and what has ended here."""
        facts = await self.request(Kind.FACTS)
        self.init_pid = facts["init_pid"]
        return [container_fact(item) for item in facts["containers"]]

    async def end(self) -> None:
        """Kill whatever is left of the pod and end its monitor, by force where it does not answer.

        A monitor with a log on a disk that doesn't answer is gone but for that: the kernel keeps it until that does.
        Raises DeadlineExceeded when the monitor does not even die.
        """
        self._channel.on_closed = None
        hung = False
        try:
            hung = (await self._channel.request(Kind.END, (), END_TIMEOUT_S)).fields.get("hung", False)
        except (DeadlineExceeded, Unavailable):
            pass
        if not hung and not await gone(self._pidfd, END_TIMEOUT_S / 4):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            if not await gone(self._pidfd, END_TIMEOUT_S):
                raise DeadlineExceeded(f"pod {self.id}: its monitor (pid {self.monitor_pid}) does not die")
        self.close()

    def close(self) -> None:
        """Let go of the monitor, which lives on if it does."""
        self.release_network()
        self._channel.close()
        self._gone()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == Kind.PAUSED:
            self._starts.paused(fields["id"], fields["pid"])
        if kind in (Kind.LOG, Kind.EXITED) and self.on_log:
            self.on_log(container_fact(fields))
        if kind == Kind.EXITED and self.on_exit:
            self.on_exit(container_exit(fields))
        elif kind == Kind.EXEC_EXITED:
            self._execs.exited(fields["exec"], fields["code"], fields["exited_ns"])

    def _lost(self) -> None:
        self._gone()
        if self.on_lost:
            self.on_lost()

    def _gone(self) -> None:
        self.over.set()
        self._execs.fail(Unavailable(f"pod {self.id}: its monitor is gone"))


async def gone(pidfd: int, timeout_s: float) -> bool:
    """Whether the process behind a pidfd ends in time."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def ended() -> None:
        loop.remove_reader(pidfd)
        future.set_result(None)

    loop.add_reader(pidfd, ended)
    try:
        async with asyncio.timeout(timeout_s):
            await future
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True

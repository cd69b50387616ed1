"""A running pod as cribd holds it: its monitor's channel, its containers' starts, execs and ends."""

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from socket import AF_UNIX, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from runtime import hooks
from runtime.channel import Channel, Reply
from runtime.errors import CribError, DeadlineExceeded, InvalidSpec, StepFailed, Unavailable, WrongState
from runtime.external import Bundle, Call
from runtime.linux.userns import mapped
from runtime.plan.compile import (
    HOOKS_ROOT,
    Environment,
    Namespaces,
    Start,
    compile_exec,
    compile_start,
    id_maps,
    watches,
)
from runtime.plan.plan import Plan, encode
from runtime.request import (
    ContainerExit,
    ContainerFact,
    ContainerStart,
    ExecExit,
    ExecStart,
    LogFile,
    LogLoss,
    Started,
    StepTiming,
)
from runtime.spec import Hooks, Linux
from runtime.zygote.messages import Kind

START_TIMEOUT_S: Final = 60.0
REQUEST_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 10.0
_SO_SNDBUFFORCE: Final = 32  # include/uapi/asm-generic/socket.h; the socket module lacks it
ATTACH_BUFFER_BYTES: Final = 4 << 20
"""What a client that is attached may lag behind the container's output before it loses some; taken only as it does."""
_ESRCH: Final = 3


@dataclass(frozen=True, slots=True)
class _Command:
    """A command and its plan; `held`: others in the pod are frozen until it runs."""

    request: ExecStart
    plan: Plan
    encoded: bytes
    held: bool

    def fits(self, request: ExecStart) -> bool:
        """Whether this is the plan of `request` as well: by identity, where comparing would cost more than it saves."""
        mine = self.request
        where = request.clone_dir, request.join_files
        same = request.process is mine.process and request.linux is mine.linux
        return same and where == (mine.clone_dir, mine.join_files)


class Exec:
    """An exec'd process."""

    def __init__(
        self, pod: "Pod", exec_id: str, started: asyncio.Future[int], exited: asyncio.Future[ExecExit]
    ) -> None:
        self._pod = pod
        self._id = exec_id
        self._started = started
        self._exited = exited

    async def started(self) -> int:
        """Wait until one with a terminal has become its program; the terminal's master, the caller's from here on.

        Raises what `wait` raises. Cancelling the wait leaves the process alone.
        """
        either: set[asyncio.Future[Any]] = {self._started, self._exited}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._started.done():
            self._exited.result()
        return self._started.result()

    async def wait(self) -> ExecExit:
        """How it ended. Raises StepFailed or WrongState if it never became its program, Unavailable if the monitor
        is lost. Cancelling the wait leaves the process alone."""
        return await asyncio.shield(self._exited)

    async def kill(self) -> None:
        """End it, with all its descendants. Raises Unavailable or DeadlineExceeded."""
        await self._pod.request(Kind.KILL, exec=self._id)


class Pod:
    """A pod whose monitor is connected.

    `netns_fd` and `rtnl` (a NETLINK_ROUTE socket inside) are there after the start of a pod with its own network
    namespace, until `release_network`. `on_exit` is called once per container that ends, `on_log` with what is
    known of a container whose log loses output or is full, `on_lost` when the monitor is gone without having been asked
    to end.
    """

    def __init__(self, pod_id: str, channel: Channel, environment: Environment, pidfd: int, pid: int) -> None:
        self.id = pod_id
        self.monitor_pid = pid
        self.init_pid = 0
        self.environment = environment
        self.netns_fd = -1
        self.rtnl: socket | None = None
        self.on_exit: Callable[[ContainerExit], None] | None = None
        self.on_log: Callable[[ContainerFact], None] | None = None
        self.on_lost: Callable[[], None] | None = None
        self._pidfd = pidfd
        self._channel = channel
        self._execs: dict[str, tuple[int, asyncio.Future[ExecExit]]] = {}  # with the request's number
        self._commands: dict[str, _Command] = {}  # by container, the last one
        self.run_hooks: hooks.Run = hooks.none
        self._prepared: dict[str, tuple[Start, bytes]] = {}
        self._starting: dict[str, Callable[[int], Awaitable[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
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

    def prepare(self, request: ContainerStart) -> bool:
        """Have the process of a `start` to come cloned ahead, without its log: it waits, until `forget` at the latest.

        False where others would have to be held still meanwhile, or hooks or a runtime are to be run. Raises
        InvalidSpec, Unsupported, Unavailable.
        """
        if request.runtime or request.spec.hooks or request.pid_target:
            return False
        start = compile_start(request.spec, request.rootfs, request.cgroup, self.environment)
        if start.pid != "new":
            return False
        plan = encode(start.plan)
        memfd = _memfd(plan)
        try:
            self._channel.post(Kind.PREPARE, (memfd,), lambda _: None, **_asked(request, start))
        finally:
            os.close(memfd)
        self._prepared[request.id] = start, plan
        return True

    async def start(self, request: ContainerStart) -> Started:
        """Start a container. Raises StepFailed, with the cause, after which nothing of it is left in the monitor."""
        begun_ns = time.time_ns()
        found = request.spec.hooks or Hooks()
        external: Bundle | None = None
        call: Call | None = None
        state: dict[str, object] = {}
        created: Callable[[int], Awaitable[None]] = partial(self._created, found, state)
        if request.id in self._prepared:
            start, plan = self._prepared.pop(request.id)
        elif request.runtime:
            external = Bundle(request.runtime, self.environment.directory, request.id)
            call = external.create(request.spec, request.rootfs, self.environment, request.cgroup.kill_dirs)
            start = Start(call.plan, "host", "", request.spec.process.terminal)
            plan, created = encode(start.plan), external.start
            request = dataclasses.replace(request, pid_target="")  # the runtime joins what paths lead to
        else:
            bundle = self._bundle(request) if request.spec.hooks else ""
            state = hooks.state(request.id, "creating", bundle, request.spec.annotations)
            start = compile_start(request.spec, request.rootfs, request.cgroup, self.environment, state)
            plan, created = encode(start.plan), partial(self._created, found, state)
        sent_ns = time.time_ns()
        memfd = _memfd(plan)
        log = request.log
        self._starting[request.id] = created
        try:
            answer = self._channel.request(
                Kind.START,
                (memfd, *(call.descriptors if call else ()), *((log.fd,) if log else ())),
                START_TIMEOUT_S,
                **_asked(request, start, log, call),
            )
            steps = [(step.phase, step.describe()) for step in start.plan]  # while the monitor is at it
            reply = await answer
        except DeadlineExceeded:
            await self.kill(request.id)
            raise
        finally:
            self._starting.pop(request.id, None)
            os.close(memfd)
            if call:
                call.close()
        if reply.kind == Kind.FAILED:
            raise _failure(start.plan, reply.fields, external, "create")
        fields = reply.fields
        durations = fields["durations_ns"]
        last = fields["running_ns"] - fields["started_ns"] - sum(durations)
        timeline = (
            StepTiming("plan", f"compile {len(start.plan)} steps", sent_ns - begun_ns),
            StepTiming("namespaces", "have the monitor clone the process", fields["started_ns"] - sent_ns),
            *(StepTiming(*step, ns) for step, ns in zip(steps, [*durations, last], strict=True)),
        )
        warnings = tuple(fields["warnings"])
        if found.poststart and not call:
            try:
                await self.run_hooks("poststart", found.poststart, state | {"status": "running", "pid": fields["pid"]})
            except CribError as error:
                warnings = (*warnings, str(error))
        return Started(fields["pid"], fields["running_ns"], timeline, warnings)

    def _bundle(self, request: ContainerStart) -> str:
        """The directory with config.json that hooks are told of; root.path is where createContainer hooks find it.

        It belongs to the container's root, who shall read it in there.
        """
        bundle = f"{self.environment.directory}/bundle-{request.id}"
        root = replace(request.spec.root, path=HOOKS_ROOT if self.namespaces.user else self.environment.staging)
        linux = request.spec.linux or Linux()
        owner = mapped(0, id_maps(linux.uid_mappings)), mapped(0, id_maps(linux.gid_mappings))
        os.makedirs(bundle, 0o700, exist_ok=True)
        os.chown(bundle, *owner)
        with open(os.open(f"{bundle}/config.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(replace(request.spec, root=root)))
            os.fchown(file.fileno(), *owner)
        return bundle

    async def _created(self, wanted: Hooks, state: Mapping[str, object], pid: int) -> None:
        """A start has come to where its createRuntime hooks are run. Raises CribError."""
        await self.run_hooks("prestart", wanted.prestart, {**state, "pid": pid})
        await self.run_hooks("createRuntime", wanted.create_runtime, {**state, "pid": pid})

    async def _resume(self, container_id: str, pid: int) -> None:
        """A container is made, and waits to be started."""
        detail = ""
        try:
            if created := self._starting.get(container_id):
                await created(pid)
        except CribError as error:
            detail = str(error)
        await self.request(Kind.RESUME, id=container_id, detail=detail)

    def exec(self, request: ExecStart, stdin: int = -1, stdout: int = -1, stderr: int = -1) -> Exec:
        """Run a process in a container with these descriptors, which stay the caller's, or with a terminal of the
        container's own, as the request's process says.

        A failure to start is what `Exec.wait` raises. Raises Unavailable when the monitor is gone.
        """
        external: Bundle | None = None
        call: Call | None = None
        if request.runtime:
            external = Bundle(request.runtime, self.environment.directory, request.container_id)
            call = external.exec(request.id, request.process, self.environment)
            compiled = _Command(request, call.plan, encode(call.plan), False)
        else:
            compiled = self._compiled(request)
        loop = asyncio.get_running_loop()
        started: asyncio.Future[int] = loop.create_future()
        exited: asyncio.Future[ExecExit] = loop.create_future()
        exited.add_done_callback(lambda future: future.cancelled() or future.exception())

        def replied(reply: Reply) -> None:
            if reply.kind != Kind.FAILED:
                started.set_result(reply.fds[0] if reply.fds else -1)
            else:
                self._execs.pop(request.id, None)
                if not exited.done():
                    exited.set_exception(_failure(compiled.plan, reply.fields, external, request.id))
            if external:
                external.discard(request.id)

        memfd = _memfd(compiled.encoded)
        streams = () if request.process.terminal else (stdin, stdout, stderr)
        try:
            number = self._channel.post(
                Kind.EXEC,
                (memfd, *(call.descriptors if call else ()), *streams),
                replied,
                id=request.container_id,
                exec=request.id,
                clone_dir="" if compiled.held or call else request.clone_dir,
                join_files=request.join_files if compiled.held else (),
                adopt=call.adopt if call else "",
                quiet=not (call or request.process.terminal),
            )
        finally:
            os.close(memfd)
            if call:
                call.close()
        self._execs[request.id] = number, exited
        return Exec(self, request.id, started, exited)

    def _compiled(self, request: ExecStart) -> "_Command":
        """A probe's command is the one before, for its container: the same plan."""
        kept = self._commands.get(request.container_id)
        if kept is None or not kept.fits(request):
            process, linux = request.process, request.linux
            plan = compile_exec(process, linux, request.join_files, request.clone_dir, self.environment.last_cap)
            kept = self._commands[request.container_id] = _Command(request, plan, encode(plan), watches(process, linux))
        return kept

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
        self._prepared.pop(container_id, None)
        self._commands.pop(container_id, None)
        await self.request(Kind.FORGET, id=container_id)

    async def containers(self) -> list[ContainerFact]:
        """What runs and what has ended here."""
        facts = await self.request(Kind.FACTS)
        self.init_pid = facts["init_pid"]
        return [_fact(item) for item in facts["containers"]]

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
        self._fail_execs()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == Kind.PAUSED:
            task = asyncio.create_task(self._resume(fields["id"], fields["pid"]))
            self._tasks.add(task)
            task.add_done_callback(self._resumed)
        if kind in (Kind.LOG, Kind.EXITED) and self.on_log:
            self.on_log(_fact(fields))
        if kind == Kind.EXITED and self.on_exit:
            self.on_exit(container_exit(fields))
        elif kind == Kind.EXEC_EXITED:
            number, future = self._execs.pop(fields["exec"], (0, None))
            self._channel.forget(number)
            if future and not future.done():
                future.set_result(ExecExit(fields["code"], fields["exited_ns"]))

    def _resumed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the monitor is gone, which `on_lost` tells

    def _lost(self) -> None:
        self._fail_execs()
        if self.on_lost:
            self.on_lost()

    def _fail_execs(self) -> None:
        for _, future in self._execs.values():
            if not future.done():
                future.set_exception(Unavailable(f"pod {self.id}: its monitor is gone"))
        self._execs.clear()


def container_exit(fields: Mapping[str, Any]) -> ContainerExit:
    """A monitor's record of an end, from a message or from disk. Raises KeyError."""
    names = ("id", "pid", "code", "started_ns", "exited_ns", "oom_killed")
    return ContainerExit(*(fields[name] for name in names))


def checked(reply: Reply) -> dict[str, Any]:
    """The fields of an answer. Raises WrongState, InvalidSpec or Unavailable for FAILED."""
    if reply.kind == Kind.FAILED:
        detail = reply.fields.get("detail", "")
        if reply.fields.get("invalid"):
            raise InvalidSpec(detail)
        raise (WrongState if reply.fields.get("errno") == _ESRCH else Unavailable)(detail)
    return reply.fields


def _fact(fields: Mapping[str, Any]) -> ContainerFact:
    exited = container_exit(fields) if fields["exited_ns"] else None
    loss = LogLoss(*fields.get("log_lost", ()))
    return ContainerFact(fields["id"], fields["pid"], fields["started_ns"], exited, loss, fields.get("log_full", False))


def _failure(plan: Plan, fields: Mapping[str, Any], external: Bundle | None, command: str) -> Exception:
    """What a FAILED answer to a plan means; `failed` is there when a step failed, -1 for a runtime's command."""
    index, detail, errno = fields.get("failed"), fields.get("detail", ""), fields.get("errno", 0)
    if fields.get("lost"):
        return Unavailable(detail)
    if errno == _ESRCH and index is None:
        return WrongState(detail)
    if external and index == -1:
        return StepFailed(external.title, len(plan), len(plan), errno, external.complaint(command, detail))
    if index is None or not 0 <= index < len(plan):
        return StepFailed("make the process", 0, len(plan), errno, detail)
    failure = StepFailed(plan[index].describe(), index + 1, len(plan), errno, detail)
    return WrongState(f"what it was to join has ended: {failure}") if errno == _ESRCH else failure


def _asked(
    request: ContainerStart, start: Start, log: LogFile | None = None, call: Call | None = None
) -> dict[str, Any]:
    """What PREPARE and START say."""
    cgroup, target = request.cgroup, request.pid_target
    return {
        "id": request.id,
        "pid": "target" if target else start.pid,
        "pid_ns": target or start.pid_ns,
        "own_pid": start.pid == "new" and not target,
        "terminal": start.terminal,
        "watches": start.watches,
        "stdin": request.stdin,
        "stdin_once": request.stdin_once,
        "log": log.path if log else "",
        "log_size": log.size if log else 0,
        "log_max_bytes": log.max_bytes if log else 0,
        "cgroup": cgroup.path,
        "clone_dir": "" if call else cgroup.clone_dir,
        "kill_dirs": cgroup.kill_dirs,
        "memory_events": cgroup.memory_events,
        "adopt": call.adopt if call else "",
    }


def _memfd(plan: bytes) -> int:
    data = memoryview(plan)
    fd = os.memfd_create("crib-plan", os.MFD_CLOEXEC)
    while data:
        data = data[os.write(fd, data) :]
    return fd


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

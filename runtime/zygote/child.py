"""What runs between clone3 and execve: the plan, and a report to the monitor.

Threat model: after its plan has entered a container's mount namespace, this process sees a hostile image at every
path. It imports nothing, opens nothing but what the plan's steps open, prints no traceback; what went wrong
travels as numbers and a string.

The handshake on the SEQPACKET socket `sync`:
 0. a child that clones another process in its place sends {"pid": n} with the pidfd, and ends; that one goes on
 0a. a child that was cloned ahead has begun with its plan, and goes on when it gets a byte; without one it ends
 0b. a child that waits for hooks sends {"pause": True}, and goes on when it gets a word, which tells what is wrong
 1. the child runs every step but the last, and sends {"d": [ns, …], "s": started_ns, "w": [warning, …]}, with the
    terminal's master if one was opened; a quiet one, of which nobody wants to know that, sends nothing
 2. the child runs the last step, execve; the socket closes by itself
 2b. or a step fails: {"failed": index, "errno": n, "detail": text}, and the child exits
"""

from __future__ import annotations

import os
import socket

from runtime.linux.lib import SyscallError, call, failure
from runtime.linux.process import PTRACE_TRACEME, close_all_but, ptrace
from runtime.plan import external, hooks, identity, layers, mounts, user  # noqa: F401 - the kinds of steps that a plan can name
from runtime.plan.lower import CONTAINER, LABEL, SYNC, descriptors
from runtime.plan.plan import Context, Outcome, decode, run
from runtime.zygote.messages import pack

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from runtime.plan.lower import Call, Lowered
    from runtime.plan.plan import Plan


def become(
    plan: bytes | Plan,
    fds: dict[str, int],
    sync: socket.socket,
    *,
    traced: bool,
    waits: bool = False,
    quiet: bool = False,
) -> None:
    """Run the plan, encoded or not, in this process, `traced` by the one that cloned it; never returns.

    It `waits` for a word after the first step, whose time is none of the start's then.
    """
    try:
        if traced:
            ptrace(PTRACE_TRACEME)
        keep = (0, 1, 2, sync.fileno(), *fds.values())
        close_all_but(keep)
        steps = decode(plan) if isinstance(plan, bytes) else plan
        context = Context(fds)
        context.announce = lambda pid, pidfd: _announce(sync, pid, pidfd)
        context.pause = lambda: _pause(sync)
        ahead, last = int(waits), len(steps) - 1
        outcome = run(steps, context, 0, ahead)
        if waits and outcome.failed < 0 and not sync.recv(1):
            return
        if outcome.failed < 0:
            outcome = run(steps, context, ahead, last)
        if outcome.failed < 0:
            if not quiet:
                terminal = [context.fds["terminal"]] if "terminal" in context.fds else []
                durations = [0] * ahead + outcome.durations_ns
                report = {"d": durations, "s": outcome.started_ns, "w": context.warnings}
                socket.send_fds(sync, [pack(report)], terminal)
            outcome = run(steps, context, last, last + 1)
        sync.send(pack({"failed": outcome.failed, "errno": outcome.errno, "detail": outcome.detail}))
    except BaseException as error:
        detail = str(error) if isinstance(error, SyscallError) else f"bug: {type(error).__name__}: {error}"
        try:
            sync.send(pack({"failed": -1, "errno": 0, "detail": detail}))
        except OSError:
            pass
    finally:
        os._exit(127)


def become_by_calls(lowered: Lowered, fds: dict[str, int], sync: socket.socket) -> None:
    """As `become`, for a quiet child: by calls, and by the plan from the step on of which one fails; never returns."""
    try:
        if not _made(descriptors(fds, sync.fileno()), {}):
            become(lowered.plan, fds, sync, traced=False, quiet=True)  # nothing is lost
        done = _steps_made(lowered)
        if done == len(lowered.steps) and (path := lowered.named or _found(lowered)):
            outcome = _executed(lowered, path)
        else:
            call(*lowered.close)
            context = Context({"stdin": 0, "stdout": 1, "stderr": 2, "container": CONTAINER, "label": LABEL})
            outcome = run(lowered.plan, context, done)
        os.write(SYNC, pack({"failed": outcome.failed, "errno": outcome.errno, "detail": outcome.detail}))
    except BaseException as error:
        os.write(SYNC, pack({"failed": -1, "errno": 0, "detail": f"bug: {type(error).__name__}: {error}"}))
    finally:
        os._exit(127)


def _steps_made(lowered: Lowered) -> int:
    """How many went well."""
    for index, calls in enumerate(lowered.steps):
        if not _made(calls, lowered.instead):
            return index
    return len(lowered.steps)


def _made(calls: list[Call], instead: dict[Call, Call]) -> bool:
    """Whether all went well."""
    for arguments in calls:
        if call(*arguments) == -1 and (arguments not in instead or call(*instead[arguments]) == -1):
            return False
    return True


def _found(lowered: Lowered) -> bytes:
    for path, can_be_executed, is_directory in lowered.candidates:
        if call(*can_be_executed) == 0 and call(*is_directory) == -1:
            return path
    return b""


def _executed(lowered: Lowered, path: bytes) -> Outcome:
    """The last step, which only comes back when it fails: it can't be begun anew."""
    for arguments in lowered.execute:
        if call(*arguments) == -1:
            error = failure(arguments[0])
            break
    else:
        lowered.program.path = path
        error = SyscallError(f'exec: "{lowered.program.name}"', lowered.program.run())
    return Outcome(0, [], len(lowered.plan) - 1, error.errno or 0, str(error))


def _pause(sync: socket.socket) -> str:
    sync.send(pack({"pause": True}))
    return sync.recv(65536).decode("utf-8", "replace").removesuffix("\0")


def _announce(sync: socket.socket, pid: int, pidfd: int) -> None:
    socket.send_fds(sync, [pack({"pid": pid})], [pidfd])

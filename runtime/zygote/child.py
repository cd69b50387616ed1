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

from runtime.linux.lib import SyscallError
from runtime.linux.process import PTRACE_TRACEME, close_all_but, ptrace
from runtime.plan import external, hooks, identity, layers, mounts, user  # noqa: F401 - the kinds of steps that a plan can name
from runtime.plan.plan import Context, decode, run
from runtime.zygote.messages import pack

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
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


def _pause(sync: socket.socket) -> str:
    sync.send(pack({"pause": True}))
    return sync.recv(65536).decode("utf-8", "replace").removesuffix("\0")


def _announce(sync: socket.socket, pid: int, pidfd: int) -> None:
    socket.send_fds(sync, [pack({"pid": pid})], [pidfd])

"""The process that runs hooks in the host's namespaces: a fork of the zygote's, for one stage of one container.

It is a subreaper: whatever a hook has started is found below it, sessions of their own or not. A hook that fails, or
takes longer than it may, is killed with all of that; what one that succeeds leaves running is left running.
"""

from __future__ import annotations

import os
import signal
import socket
import time

from runtime.linux.lib import SyscallError
from runtime.linux.process import PR_SET_CHILD_SUBREAPER, prctl, set_title
from runtime.plan.hooks import run_hook
from runtime.plan.identity import Detach
from runtime.plan.plan import Context
from runtime.zygote.messages import Kind, receive, send

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

_KILL_S: Final = 5.0


def run_stage(connection: socket.socket) -> None:
    """Take a HOOKS request from the connection, run them in order, answer, and end; never returns."""
    try:
        set_title(b"crib-hooks")
        Detach("").run(Context({}))
        os.umask(0o022)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        message = receive(connection)
        if message is not None and message[0] == Kind.HOOKS:
            fields = message[1]
            detail = _run(fields)
            send(connection, Kind.FAILED if detail else Kind.OK, re=fields["n"], errno=0, detail=detail)
        os._exit(0)
    finally:
        os._exit(70)


def _run(fields: dict[str, Any]) -> str:
    for path, args, env, timeout_s in fields["hooks"]:
        try:
            run_hook(f"{fields['stage']} hook {path}", path, args, env, timeout_s, fields["state"].encode())
        except OSError as error:
            _kill_all()
            return error.call if isinstance(error, SyscallError) else f"{fields['stage']} hook {path}: {error}"
    return ""


def _kill_all() -> None:
    """Kill every descendant: each that dies hands its children to this process."""
    until = time.monotonic() + _KILL_S
    own = str(os.getpid()).encode()
    while time.monotonic() < until:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
                if parent == own and state != b"Z":  # a child's pid is its own until it is waited for
                    os.kill(int(pid), signal.SIGKILL)
            except (OSError, ValueError):
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)

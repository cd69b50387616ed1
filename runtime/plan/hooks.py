"""Hooks of the OCI runtime spec that run in the middle of a start: config.md, "POSIX-platform Hooks".

Threat model: a startContainer hook's path is the image's, so it gets no more than the container's process; a
createContainer hook's is the host's. Neither sees an environment that isn't its own.
"""

from __future__ import annotations

import binascii
import os
import select
import signal
import time
from errno import EIO, ETIME

from runtime.linux import caps
from runtime.linux.lib import SyscallError
from runtime.linux.process import CLOSE_RANGE_CLOEXEC, PR_SET_NO_NEW_PRIVS, Exec, clone3, close_range, prctl
from runtime.linux.seccomp import Filter
from runtime.plan.plan import Context, Step

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from collections.abc import Callable

_SAID_BYTES = 4096
_PIPE_BYTES = 65536  # as much as a pipe holds: one read empties it


class Pause(Step):
    """Wait for the hooks that run in the host's namespaces: the container's are made, its / is still the host's."""

    phase = "hooks"

    def run(self, context: Context) -> None:
        assert context.pause is not None
        if problem := context.pause():
            raise SyscallError(problem, EIO)

    def describe(self) -> str:
        return "wait for the createRuntime hooks"


class RunHook(Step):
    """Run one hook in this process's namespaces, with `state` (a JSON object that lacks the pid) on its stdin.

    `confined`: with these capability sets, no_new_privs and seccomp filter (base64), else with this process's own.
    """

    phase = "hooks"

    stage: str
    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout_s: int
    state: str
    confined: bool
    bounding: int
    permitted: int
    last_cap: int
    no_new_privileges: bool
    seccomp: str
    seccomp_flags: int

    def run(self, context: Context) -> None:
        title, state = f"{self.stage} hook {self.path}", f'{{"pid":{os.getpid()},{self.state[1:]}'.encode()
        confine = self._confine if self.confined else None
        run_hook(title, self.path, self.args, self.env, self.timeout_s, state, confine)

    def _confine(self) -> None:
        program = Filter(binascii.a2b_base64(self.seccomp)) if self.seccomp else None
        caps.drop_bounding(self.bounding, self.last_cap)
        if self.no_new_privileges:
            prctl(PR_SET_NO_NEW_PRIVS, 1)
        elif program:
            program.load(self.seccomp_flags)
        caps.capset(self.permitted, self.permitted, 0)
        if self.no_new_privileges and program:
            program.load(self.seccomp_flags)

    def describe(self) -> str:
        return f"run {self.stage} hook {self.path}"


def run_hook(
    title: str,
    path: str,
    args: tuple[str, ...],
    env: tuple[str, ...],
    timeout_s: int,
    stdin: bytes,
    confine: Callable[[], None] | None = None,
) -> None:
    """Run a program as a hook, in a session of its own and with nothing of this process's but its namespaces.

    `confine` is called before execve. Raises SyscallError, whose call tells what it wrote, where it fails or takes
    longer than `timeout_s`: its session is killed then.
    """
    state = os.memfd_create("crib-hook", os.MFD_CLOEXEC)
    os.write(state, stdin)
    os.lseek(state, 0, os.SEEK_SET)
    program = Exec(path, tuple(args) or (path,), tuple(env))
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = clone3(0)
        if pid == 0:
            _become(program, state, write, confine)
    finally:
        os.close(state)
        os.close(write)
    try:
        status, said = _wait(title, pid, pidfd, read, timeout_s)
    finally:
        os.close(read)
        os.close(pidfd)
    if status:
        raise SyscallError(f"{title}: exit code {status}: {said.strip()}", EIO)


def _become(program: Exec, stdin: int, stderr: int, confine: Callable[[], None] | None) -> None:
    try:
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(stderr, 1)
        os.dup2(stderr, 2)
        close_range(3, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC)
        os.umask(0o022)
        os.chdir("/")
        if confine:
            confine()
        number = program.run()
        os.write(2, os.strerror(number).lower().encode())
    finally:
        os._exit(127)


def _wait(title: str, pid: int, pidfd: int, read: int, timeout_s: int) -> tuple[int, str]:
    """The exit code and what was written last; past the deadline the hook's session is killed. Raises SyscallError."""
    until = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(read, select.POLLIN)
    said = b""
    while True:
        ready = dict(poll.poll(max(0, int((until - time.monotonic()) * 1000))))
        if read in ready:
            data = os.read(read, _PIPE_BYTES)
            said = (said + data)[-_SAID_BYTES:]
            if not data:
                poll.unregister(read)
        if pidfd in ready:  # what it wrote was read; what it left running may write for ever
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode("utf-8", "replace")
        if time.monotonic() >= until:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise SyscallError(f"{title}: took longer than {timeout_s} s", ETIME)

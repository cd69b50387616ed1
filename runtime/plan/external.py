"""Steps that prepare a bundle for an OCI runtime (runc and its like), and that become it.

All of them run in a mount namespace of the runtime's own: what they mount nobody else sees, and it goes with the last
process in there.
"""

from __future__ import annotations

import os
import stat

from runtime.linux.files import make_source
from runtime.linux.lib import SyscallError
from runtime.linux.mount import MS, mount, move_mount
from runtime.linux.process import CLOSE_RANGE_CLOEXEC, Exec, close_range
from runtime.plan.identity import Execute
from runtime.plan.plan import Context, Step


class SlaveAround(Step):
    """Keep what is mounted at or below `path` from the host, while all other mounts still propagate both ways.

    `path` has no symbolic links. For a container with a Bidirectional mount, which must stay a peer of the host's.
    """

    path: str

    def run(self, context: Context) -> None:
        point = self.path
        number = _mount_id(point)
        while point != "/" and _mount_id(os.path.dirname(point)) == number:
            point = os.path.dirname(point)
        mount("", point, "", MS.SLAVE)

    def describe(self) -> str:
        return f"make the mount that {self.path} is on a slave"


def _mount_id(path: str) -> str:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            return next(line for line in file if line.startswith("mnt_id:"))
    finally:
        os.close(fd)


class MakeSource(Step):
    """Make a bind's missing source a directory, 0755."""

    path: str

    def run(self, context: Context) -> None:
        try:
            os.lstat(self.path)
        except FileNotFoundError:
            make_source(self.path)

    def describe(self) -> str:
        return f"make {self.path} if it is missing"


class AttachAt(Step):
    """Attach the detached mount `key` at `path` in this mount namespace, which is made to fit it."""

    key: str
    path: str

    def run(self, context: Context) -> None:
        tree = context.take(self.key)
        try:
            if stat.S_ISDIR(os.fstat(tree).st_mode):
                os.makedirs(self.path, 0o700, exist_ok=True)
            else:
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            target = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
            try:
                move_mount(tree, target, self.path)
            finally:
                os.close(target)
        finally:
            os.close(tree)

    def describe(self) -> str:
        return f"attach at {self.path}"


class RunCommand(Step):
    """Become a program of the host's, in `directory`, with this process's streams and privileges."""

    phase = "exec"

    args: tuple[str, ...]
    env: tuple[str, ...]
    directory: str

    def run(self, context: Context) -> None:
        Execute.standard_streams(context)
        program = Exec(self.args[0], tuple(self.args), tuple(self.env))
        close_range(3, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC)
        os.umask(0o022)
        os.chdir(self.directory)
        raise SyscallError(f"exec {self.args[0]}", program.run())

    def describe(self) -> str:
        return f"execute {' '.join(self.args)}"

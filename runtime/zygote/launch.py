"""cribd's side of the zygote: start it, before anything heavy is imported here."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.errors import Unavailable
from runtime.zygote.messages import Kind, ProtocolError, receive

_READY_TIMEOUT_S: Final = 20.0


@dataclass(slots=True)
class Zygote:
    """A running zygote: cribd's end of its control socket, its process, and what took it into its cgroup."""

    control: socket.socket
    process: subprocess.Popen[bytes]
    cgroup_files: tuple[str, ...] = ()

    def relaunch(self) -> None:
        """Put a new one in the place of one that has gone. Blocks; raises Unavailable, and can be called again."""
        self.control.close()
        self.process.kill()
        self.process.wait()
        made = launch(self.cgroup_files)
        self.control, self.process = made.control, made.process

    def close(self) -> None:
        """Let it go: it ends by itself, its monitors live on."""
        self.control.close()
        self.process.wait(_READY_TIMEOUT_S)


def interpreter() -> str:
    """The real path of this Python, behind any virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def launch(cgroup_files: tuple[str, ...] = ()) -> Zygote:
    """Start a zygote in the cgroup whose join files are given, and wait until it is ready.

    No loader or interpreter setting of ours reaches a container's parent. The loader looks up all names at once: what
    is looked up when first called each child would look up for itself.
    Raises Unavailable.
    """
    root = Path(__file__).resolve().parents[2]
    program = Path(__file__).with_name("__main__.py")
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    python = interpreter()
    arguments = [str(root), str(theirs.fileno()), "mount", "-1", *cgroup_files]
    with theirs:
        process = subprocess.Popen(
            [python, "-I", "-S", "-B", str(program), *arguments],
            executable=python,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env={"LD_BIND_NOW": "1"},
            cwd="/",
        )
    mine.settimeout(_READY_TIMEOUT_S)
    try:
        ready = receive(mine)
    except (OSError, ProtocolError) as error:
        ready, cause = None, f": {error}"
    else:
        cause = ""
    if ready is None or ready[0] != Kind.OK:
        process.kill()
        process.wait()
        mine.close()
        raise Unavailable(f"the zygote did not start{cause} (its messages are above)")
    mine.setblocking(False)
    return Zygote(mine, process, cgroup_files)

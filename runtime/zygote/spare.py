"""Monitors as the zygote's children: one for a pod, and a spare one for the next.

Making a pod's namespaces is a third of the time that the pod takes. So one monitor waits with the usual ones made
(`podspace.USUAL`), for the next pod that asks for these. It belongs to no pod and has nothing on disk; it ends when the
zygote does, for all it holds is a socket of that. It is replaced when the zygote has been idle, so that this is not in
the way of the pod that took the last one; and when it has become old, since a network namespace has the kernel
parameters that the host had when it was made.
"""

from __future__ import annotations

import os
import socket

from runtime.linux.process import set_title
from runtime.zygote.messages import Kind, receive, send
from runtime.zygote.monitor import Monitor
from runtime.zygote.podspace import PodSpace

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final, NoReturn

_IDLE_S: Final = 0.05
_AGE_S: Final = 60.0


class Spare:
    """The zygote's spare monitor, if there is one."""

    def __init__(self) -> None:
        self._pid = 0
        self._order: socket.socket | None = None

    @property
    def due_s(self) -> float:
        """How long the zygote is to be idle before another one is made."""
        return _AGE_S if self._order else _IDLE_S

    def make(self) -> int:
        """Fork one: its pid, -1 where that is not possible, or in the child, which is to `wait_for_pod`, 0.

        One that failed counts as one until it has become old: the next pod is told why.
        """
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._pid = os.fork()
        except OSError:
            self._pid = -1
        self._order, other = (mine, theirs) if self._pid else (theirs, mine)
        other.close()
        return self._pid

    def give(self, fields: dict[str, Any], fds: list[int]) -> bool:
        """Let it be the monitor of a SPAWN request; False where there is none."""
        if self._order is None:
            return False
        try:
            send(self._order, Kind.SPAWN, tuple(fds), **fields)
        except OSError:  # it could not make the namespaces, or was killed
            return False
        finally:
            self.close()
        return True

    def wait_for_pod(self) -> NoReturn:
        """The forked child: be ready, until there is a pod or no zygote."""
        assert self._order is not None
        try:
            set_title(b"crib-spare")
            space = PodSpace()
            space.prepare()
            message = receive(self._order)
            if message is None:
                os._exit(0)
            self._order.close()
        except BaseException:  # the zygote makes the pod's monitor then, and that says what is wrong
            os._exit(70)
        become_monitor(message[1], message[2][0], space)

    def close(self) -> None:
        """Know of none any more."""
        if self._order:
            self._order.close()
            self._order = None

    def end(self) -> None:
        """End it, if it is there, and wait until it has ended."""
        if self._order:
            self.close()
            try:
                if self._pid > 0:
                    os.waitpid(self._pid, 0)
            except ChildProcessError:  # it has failed
                pass


def become_monitor(fields: dict[str, Any], fd: int, space: PodSpace) -> NoReturn:
    """The forked child: the monitor of a SPAWN request until its pod ends. `fd` is its connection to cribd."""
    pod_id = fields["id"]
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1):
            os.dup2(null, number)
        os.close(null)
        Monitor(pod_id, fields["directory"], socket.socket(fileno=fd), space).run()
        os._exit(0)
    except BaseException as error:  # the journal gets the one line; the pod is lost, and cribd sees that
        os.write(2, f"crib monitor {pod_id}: {type(error).__name__}: {error}\n".encode())
        os._exit(70)

"""The zygote: a lean interpreter with everything loaded, which forks monitors and does nothing else."""

import array  # noqa: F401 - loaded now: socket.recv_fds imports it when called
import codecs
import gc
import os
import signal
import socket
import sys

from runtime.linux.process import PR_SET_DUMPABLE, prctl, set_name, set_title
from runtime.zygote.messages import Kind, close_all, receive, send
from runtime.zygote.monitor import Monitor


class Zygote:
    """Serves one cribd on `control`, until that is closed. Its monitors live on."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def serve(self) -> None:
        """Fork a monitor per SPAWN message; return when cribd is gone."""
        self._settle()
        while message := receive(self._control):
            kind, fields, fds = message
            if kind != Kind.SPAWN:
                close_all(fds)
                continue
            try:
                pid = os.fork()
            except OSError as error:
                send(self._control, Kind.FAILED, re=fields["n"], errno=error.errno, detail="fork a monitor")
            else:
                if pid == 0:
                    self._control.close()
                    _become_monitor(fields["id"], fields["directory"], socket.socket(fileno=fds[0]))
            close_all(fds)

    def _settle(self) -> None:
        """Everything is loaded: from here on nothing is imported, by anybody."""
        set_name("crib-zygote")
        set_title("crib-zygote")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # monitors are reaped by the kernel
        for encoding in ("ascii", "utf-8", "latin-1"):
            codecs.lookup(encoding)
        sys.path.clear()
        sys.meta_path.clear()
        sys.path_hooks.clear()
        sys.path_importer_cache.clear()
        prctl(PR_SET_DUMPABLE, 0)
        gc.collect()
        gc.freeze()
        gc.disable()
        os.chdir("/")
        send(self._control, Kind.OK, re=0, pid=os.getpid())


def _become_monitor(pod_id: str, directory: str, connection: socket.socket) -> None:
    """The forked child: a monitor until its pod ends."""
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1):
            os.dup2(null, number)
        os.close(null)
        Monitor(pod_id, directory, connection).run()
        os._exit(0)
    except BaseException as error:  # the journal gets the one line; the pod is lost, and cribd sees that
        os.write(2, f"crib monitor {pod_id}: {type(error).__name__}: {error}\n".encode())
        os._exit(70)

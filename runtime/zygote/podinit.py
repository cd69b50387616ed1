"""The first process of a pod that shares its pid namespace: it reaps, and holds nothing of the host."""

import os
import signal

from runtime.cgroup.files import join
from runtime.linux.caps import capset, drop_bounding, last_cap
from runtime.linux.mount import MS, mount, pivot_root, umount
from runtime.linux.namespaces import CLONE, unshare
from runtime.linux.process import PR_SET_NO_NEW_PRIVS, close_all_but, prctl, set_title

_EMPTY = "/dev"  # any directory will do: it is covered in this mount namespace only


def reap_for_ever(cgroup: tuple[str, ...], ready: int = -1) -> None:
    """Become the pod's init in this process, the first of its pid namespace; never returns.

    `cgroup` are the files that take it into its own cgroup. Its root is an empty read-only file system; it has
    no descriptors and no capabilities once the descriptor `ready` is closed. As a namespace's init it ignores every
    signal from inside.
    """
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        set_title(b"pod-init")
        join(cgroup)
        capabilities = last_cap()
        unshare(CLONE.NEWNS | CLONE.NEWCGROUP)
        mount("", "/", "", MS.REC | MS.PRIVATE)
        flags = MS.NOSUID | MS.NODEV | MS.NOEXEC
        mount("tmpfs", _EMPTY, "tmpfs", flags | MS.RDONLY, "nr_blocks=1,nr_inodes=1")
        os.chdir(_EMPTY)
        pivot_root(".", ".")
        umount(".")
        os.chdir("/")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        close_all_but((ready,) if ready >= 0 else ())
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        drop_bounding(0, capabilities)
        capset(0, 0, 0)
        if ready >= 0:
            os.close(ready)
        while True:
            while _reaped():
                pass
            signal.sigwait({signal.SIGCHLD})
    finally:
        os._exit(1)


def _reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False

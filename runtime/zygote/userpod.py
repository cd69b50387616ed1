"""The namespaces of a pod with its own user namespace: that one is first, and owns the others."""

from __future__ import annotations

import os

from runtime.linux import namespaces, userns
from runtime.linux.namespaces import CLONE
from runtime.linux.process import clone3
from runtime.zygote.podinit import reap_for_ever

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Final

    from runtime.linux.userns import Maps

_NEWUSER: Final = int(CLONE.NEWUSER)
_NEWPID: Final = int(CLONE.NEWPID)


def join_user_pod(flags: int, uids: Maps, gids: Maps, init_cgroup: tuple[str, ...] | None) -> tuple[int, int]:
    """Make a user namespace with that mapping, and the namespaces in `flags` owned by it, and join the latter.

    With `init_cgroup` (join files, maybe none) a pod init is started in a pid namespace. Returns a descriptor of the
    user namespace and the pid of the init, or 0. This process, a subreaper, stays in its own user namespace. Steps:
     1. a helper is cloned into the user namespace; it joins the init's cgroup while its files are still its own
     2. this process writes the mapping, and says so
     3. the helper becomes root inside, makes the namespaces, which have that owner then, and clones the init; it tells
        the init's pid, or what went wrong as a negative errno
     4. this process joins the namespaces, and the helper ends
    """
    wait, go = os.pipe2(os.O_CLOEXEC)
    tell, told = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = clone3(_NEWUSER)
        if pid == 0:
            os.close(go)
            _help(wait, told, flags, init_cgroup)
        try:
            userns.write_maps(pid, uids, gids)
            user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            os.write(go, b"\0")
            os.close(told)
            told = -1
            init = int(os.read(tell, 16) or b"-3")  # ESRCH
            if init < 0:
                raise OSError(-init, f"the pod's namespaces: {os.strerror(-init)}")
            if flags:
                namespaces.setns(pidfd, flags)
        finally:
            os.close(pidfd)
        return user, init
    finally:
        for fd in (wait, go, tell, told):
            if fd >= 0:
                os.close(fd)


def _help(wait: int, told: int, flags: int, init_cgroup: tuple[str, ...] | None) -> None:
    try:
        for name in init_cgroup or ():
            with open(name, "wb", buffering=0) as file:
                file.write(b"0")
        if os.read(wait, 1):
            userns.become_root()
            if flags:
                namespaces.unshare(flags)
            pid = 0
            if init_cgroup is not None:
                pid, _ = clone3(_NEWPID)
                if pid == 0:
                    reap_for_ever(())
            os.write(told, str(pid).encode())
            os.read(wait, 1)  # until the namespaces are joined: then it is closed
    except OSError as error:
        os.write(told, str(-(error.errno or 0)).encode())
    finally:
        os._exit(0)

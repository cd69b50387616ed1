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
     1. a helper is cloned into the new namespaces; it joins the init's cgroup while its files are still its own
     2. this process writes the mapping, joins the namespaces, and says so
     3. the helper becomes root inside, clones the init, tells its pid, and ends
    """
    wait, go = os.pipe2(os.O_CLOEXEC)
    tell, told = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = clone3(_NEWUSER | flags)
        if pid == 0:
            os.close(go)
            _help(wait, told, init_cgroup)
        try:
            userns.write_maps(pid, uids, gids)
            user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            if flags:
                namespaces.setns(pidfd, flags)
            os.write(go, b"\0")
            os.close(told)
            told = -1
            answer = os.read(tell, 16)
        finally:
            os.close(pidfd)
        if init_cgroup is not None and not answer:
            raise OSError(0, "the pod init did not start")
        return user, int(answer or b"0")
    finally:
        for fd in (wait, go, tell, told):
            if fd >= 0:
                os.close(fd)


def _help(wait: int, told: int, init_cgroup: tuple[str, ...] | None) -> None:
    try:
        for name in init_cgroup or ():
            with open(name, "wb", buffering=0) as file:
                file.write(b"0")
        if os.read(wait, 1) and init_cgroup is not None:
            userns.become_root()
            pid, _ = clone3(_NEWPID)
            if pid == 0:
                reap_for_ever(())
            os.write(told, str(pid).encode())
    finally:
        os._exit(0)

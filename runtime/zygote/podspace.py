"""What a pod's containers share, held by its monitor: namespaces, the init of a shared pid namespace, /dev/shm.

The monitor itself lives in the pod's network, ipc and uts namespaces, so its children inherit them. Only a container
that shares or leaves the pid namespace needs more: its process is cloned into it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct

from runtime.cgroup.files import write
from runtime.linux import mount, namespaces
from runtime.linux.lib import SyscallError
from runtime.linux.namespaces import CLONE
from runtime.linux.process import clone3, set_effective_user, set_title
from runtime.linux.userns import mapped
from runtime.zygote.podinit import reap_for_ever
from runtime.zygote.userpod import join_user_pod

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any, Final

    from runtime.linux.userns import Maps

# As plain numbers: an enum's arithmetic is Python code, and what it touches is memory of each monitor's own.
_NEWNET: Final = int(CLONE.NEWNET)
_NEWIPC: Final = int(CLONE.NEWIPC)
_NEWUTS: Final = int(CLONE.NEWUTS)
NEWPID: Final = int(CLONE.NEWPID)
_CLEAR_SIGHAND: Final = int(CLONE.CLEAR_SIGHAND)
USUAL: Final = _NEWNET | _NEWIPC | _NEWUTS
"""The namespaces that a pod makes for itself where nothing else is asked for."""
_SHM_ATTRIBUTES: Final = int(mount.MountAttr.NOSUID | mount.MountAttr.NODEV | mount.MountAttr.NOEXEC)
_SIOCSIFFLAGS: Final = 0x8914
# What the next cribd is told of how the pod was made.
_MADE: Final = ("net", "ipc", "pid", "uids", "gids", "hostname", "shm_bytes", "shm_path")
_SYSCTL_PATH: Final = str.maketrans("./", "/.")  # as sysctl(8): "eth0/1" in a dotted name is the file eth0.1


class BadSysctl(SyscallError):
    """The kernel doesn't know a parameter, or not with this value: the request's fault."""


class PodSpace:
    """One pod's. `user` and `shm` are descriptors, -1 where the pod has none of its own; `null` is one of /dev/null."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.user = -1
        self.shm = -1
        self.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._own_pid_ns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._prepared = 0  # the namespaces that this process has already
        self._pid_ns = -1
        self._init: tuple[int, int] | None = None  # pid, pidfd
        self._init_ready = -1  # at its end once the init holds nothing of the host

    @property
    def init_pid(self) -> int:
        """The pod init's pid, 0 where there is none, or none any more."""
        return self._init[0] if self._init else 0

    def prepare(self) -> None:
        """Make the namespaces of a usual pod before it is known which. Raises OSError."""
        namespaces.unshare(USUAL)
        self._prepared = USUAL

    def make(self, fields: dict[str, Any]) -> tuple[int, ...]:
        """Make the pod's namespaces in this process, as the POD message asks; its children inherit them.

        Returns descriptors of the network namespace and of a NETLINK_ROUTE socket inside, if it is the pod's own; they
        are the caller's. Raises OSError.
        """
        self.made = {name: fields[name] for name in _MADE}
        flags = _NEWNET if fields["net"] else 0
        flags |= _NEWIPC if fields["ipc"] else 0
        flags |= _NEWUTS if fields["hostname"] is not None else 0
        if fields["uids"]:
            init = tuple(fields["init_cgroup"]) if fields["pid"] else None
            self.user, pod_init = join_user_pod(flags, fields["uids"], fields["gids"], init)
            if pod_init:
                self._take_init(pod_init, os.pidfd_open(pod_init))
        else:
            if flags & ~self._prepared:
                namespaces.unshare(flags & ~self._prepared)
            if fields["pid"]:
                self._start_init(tuple(fields["init_cgroup"]))
        found: tuple[int, ...] = ()
        if fields["net"]:
            # Opened inside, so that cribd can configure the namespace without ever entering it.
            rtnl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
            found = (os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC), rtnl.detach())
        if fields["hostname"] is not None:
            socket.sethostname(fields["hostname"])
        self.set_sysctls(fields["sysctls"])
        if fields["shm_bytes"]:
            self._make_shm(fields)
        return found

    def set_sysctls(self, sysctls: dict[str, str]) -> None:
        """Set kernel parameters, by their dotted names, in the pod's namespaces. Raises BadSysctl."""
        for name, value in sysctls.items():
            try:
                _set_sysctl(f"/proc/sys/{name.translate(_SYSCTL_PATH)}", value, self.made["uids"])
            except OSError as error:
                raise BadSysctl(f"sysctls {name} {value!r}", error.errno or 0) from None

    def clone(self, pid_ns: int, flags: int, cgroup_dir: str) -> tuple[int, int]:
        """clone3 with the child in the pid namespace of descriptor `pid_ns` (-1: as it is). Raises OSError.

        The child has no command line that tells of crib: what enters a container is seen there. Signals do to it what
        they do by default.
        """
        flags |= _CLEAR_SIGHAND
        cgroup = os.open(cgroup_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if cgroup_dir else -1
        title = set_title(b"")
        pid = -1
        try:
            if pid_ns < 0:
                pid, pidfd = clone3(flags, cgroup, cgroup_dir)
                return pid, pidfd
            namespaces.setns(pid_ns, NEWPID)
            try:
                pid, pidfd = clone3(flags, cgroup, cgroup_dir)
            except SyscallError:
                self._restore_pid_ns()
                raise
            if pid:
                self._restore_pid_ns()
            return pid, pidfd
        finally:
            if pid:
                set_title(title)
            if cgroup >= 0:
                os.close(cgroup)

    def shared_pid_ns(self) -> int:
        """A descriptor, the caller's, of the pid namespace that containers share."""
        if self._init_ready >= 0:  # a container must not find the init while it still has the host's tree
            os.read(self._init_ready, 1)
            os.close(self._init_ready)
            self._init_ready = -1
        return os.dup(self._pid_ns)

    def init_ended(self) -> None:
        """The pod init has been reaped."""
        if self._init:
            os.close(self._init[1])
            self._init = None

    def kill_init(self) -> None:
        if self._init:
            signal.pidfd_send_signal(self._init[1], signal.SIGKILL)

    def disconnect(self) -> None:
        """Take the pod's own network down: this process may keep it in being for longer than the pod lives."""
        if self.made["net"]:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                for _, name in socket.if_nameindex():
                    fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", name.encode(), 0))

    def close(self) -> None:
        """Close what a pod without an init or a user namespace holds: for the zygote's warm-up."""
        for fd in (self._own_pid_ns, self.shm, self.null):
            os.close(fd)

    def _restore_pid_ns(self) -> None:
        # If this fails every later child would be born in a container: better no monitor than that one.
        namespaces.setns(self._own_pid_ns, NEWPID)

    def _start_init(self, cgroup: tuple[str, ...]) -> None:
        self._init_ready, ready = os.pipe2(os.O_CLOEXEC)
        pid, pidfd = clone3(NEWPID)
        if pid == 0:
            reap_for_ever(cgroup, ready)
        os.close(ready)
        self._take_init(pid, pidfd)

    def _take_init(self, pid: int, pidfd: int) -> None:
        self._init = (pid, pidfd)
        self._pid_ns = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def _make_shm(self, fields: dict[str, Any]) -> None:
        options: tuple[tuple[str, str], ...] = (("size", str(fields["shm_bytes"])), ("mode", "1777"))
        if fields["uids"]:
            root = mapped(0, fields["uids"]), mapped(0, fields["gids"])
            options = (*options, ("uid", str(root[0])), ("gid", str(root[1])))
        if fields["mount_label"]:
            options = (*options, ("context", fields["mount_label"]))
        self.shm = mount.detached("tmpfs", options, _SHM_ATTRIBUTES)
        if fields["shm_path"]:  # this kernel can't clone a detached mount: it has to be somewhere
            target = os.open(fields["shm_path"], os.O_PATH | os.O_CLOEXEC)
            mount.move_mount(self.shm, target, fields["shm_path"])
            os.close(target)


def _set_sysctl(path: str, value: str, uids: Maps) -> None:
    """Write a kernel parameter; those of an ipc namespace belong to the root of its user namespace."""
    try:
        write(path, value)
    except PermissionError:
        if not uids:
            raise
        set_effective_user(mapped(0, uids))
        try:
            write(path, value)
        finally:
            set_effective_user(0)

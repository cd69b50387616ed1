"""Steps around a container's processes: what they inherit, where they are, who they are, and execve.

The end of a start is fixed: executable found, arguments encoded, everything allocated; then seccomp (last of
all with no_new_privs, else before the identity change), identity, execve, nothing else in between.
"""

from __future__ import annotations

import binascii
import fcntl
import os
import resource
import socket
import struct
from errno import EACCES, ENOENT, ENOTTY, EPERM

from runtime.linux import caps, files
from runtime.linux.lib import SyscallError
from runtime.linux.namespaces import CLONE, setns, unshare
from runtime.linux.process import (
    CLOSE_RANGE_CLOEXEC,
    PR_SET_KEEPCAPS,
    PR_SET_NO_NEW_PRIVS,
    Exec,
    close_range,
    default_scheduling,
    join_session_keyring,
    prctl,
    set_identity,
)
from runtime.linux.seccomp import Filter
from runtime.linux.userns import become_root
from runtime.plan.plan import Context, Step

# By number; asm-generic/resource.h. The standard library's `resource` lacks LOCKS.
RLIMIT_NAMES = (
    "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME".split()
)
KEY_LABEL = "/proc/self/attr/keycreate"
TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441
NEWUSER = int(CLONE.NEWUSER)
_PTMX = os.makedev(5, 2)
TIOCSWINSZ = 0x5414


class Detach(Step):
    """Let go of what the parent was: session, keyring, scheduling, directory.

    Of signals there is nothing to let go: a monitor blocks none and ignores none (see `Zygote`), what it handles the
    kernel resets in a child, and also the signal of its parent's death. The umask is 0 until `Execute` sets the
    process's own: what the steps make has exactly the modes they say.
    `key_label` is the SELinux label of the keyring, or "".
    """

    phase = "identity"

    key_label: str

    def run(self, context: Context) -> None:
        if self.key_label:  # until execve
            _write(KEY_LABEL, self.key_label)
        try:
            join_session_keyring()
        except SyscallError as error:  # kernels without keyrings, or a nested runtime's filter
            context.warnings.append(str(error))
        default_scheduling()
        os.umask(0)
        os.chdir("/")
        os.setsid()

    def describe(self) -> str:
        return "new session and keyring, default scheduling"


def _write(path: str, value: str, call: str = "write") -> None:
    """Write to a file of the kernel's, on the host's /proc and /sys. Raises SyscallError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise SyscallError(call, error.errno or 0, path) from None


class JoinCgroup(Step):
    """Move this process into its cgroup, by writing 0 to each file."""

    phase = "cgroup"

    files: tuple[str, ...]

    def run(self, context: Context) -> None:
        for name in self.files:
            _write(name, "0", "join cgroup")

    def describe(self) -> str:
        return f"join cgroup {os.path.dirname(self.files[-1]) if self.files else '(none)'}"


class Unshare(Step):
    """Make new namespaces for this process."""

    phase = "namespaces"

    flags: int

    def run(self, context: Context) -> None:
        unshare(self.flags)

    def describe(self) -> str:
        return f"new namespaces: {flag_names(self.flags)}"


class Hostname(Step):
    """Set the host name in this process's uts namespace, which must be its own."""

    phase = "namespaces"

    name: str

    def run(self, context: Context) -> None:
        socket.sethostname(self.name)

    def describe(self) -> str:
        return f"hostname {self.name}"


class Sysctl(Step):
    """Write a kernel parameter of a namespace that this process is in, while /proc is the host's.

    `file` is its path below /proc/sys.
    """

    phase = "namespaces"

    file: str
    value: str

    def run(self, context: Context) -> None:
        _write(f"/proc/sys/{self.file}", self.value)

    def describe(self) -> str:
        return f"kernel parameter {self.file} = {self.value}"


class JoinNamespace(Step):
    """Join the namespace at `path` (below /proc or /run/netns)."""

    phase = "namespaces"

    path: str
    flag: int

    def run(self, context: Context) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(fd, self.flag)
        finally:
            os.close(fd)

    def describe(self) -> str:
        return f"join {flag_names(self.flag)} namespace {self.path}"


class JoinProcess(Step):
    """Join several namespaces of the process behind the pidfd `name` in one call; a user namespace as its root."""

    phase = "namespaces"

    name: str
    flags: int

    def run(self, context: Context) -> None:
        setns(context.fds[self.name], self.flags)
        if self.flags & NEWUSER:  # what is made from here on, a terminal too, must have an owner inside
            become_root()

    def describe(self) -> str:
        return f"join the container's namespaces: {flag_names(self.flags)}"


def flag_names(flags: int) -> str:
    """CLONE flags as `mount, pid`."""
    return ", ".join(str(flag.name)[3:].lower().replace("ns", "mount") for flag in CLONE if flags & flag) or "none"


class OomScoreAdj(Step):
    """Set oom_score_adj; where lowering it is not allowed the nearest allowed value stays, with a warning."""

    phase = "identity"

    value: int

    def run(self, context: Context) -> None:
        fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, str(self.value).encode())
        except PermissionError:
            context.warnings.append(
                f"oom_score_adj {self.value} not permitted, {os.read(fd, 16).decode().strip()} kept"
            )
        finally:
            os.close(fd)

    def describe(self) -> str:
        return f"oom_score_adj {self.value}"


class Rlimits(Step):
    """Set resource limits, as (resource number, soft, hard); 2^64-1 is infinity.

    A hard limit that may not be raised stays, with a warning, and the soft one stops at it.
    """

    phase = "identity"

    limits: tuple[tuple[int, int, int], ...]

    def run(self, context: Context) -> None:
        for number, soft, hard in self.limits:
            wanted = (limit(soft), limit(hard))
            try:
                resource.setrlimit(number, wanted)
            except (ValueError, PermissionError):
                kept = resource.getrlimit(number)[1]
                name = RLIMIT_NAMES[number].lower()
                context.warnings.append(f"rlimit {name}: hard limit {_shown(hard)} not permitted, {kept} kept")
                low = wanted[0] if kept == resource.RLIM_INFINITY or 0 <= wanted[0] <= kept else kept
                resource.setrlimit(number, (low, kept))

    def describe(self) -> str:
        limits = (f"{RLIMIT_NAMES[n].lower()}={_shown(soft)}:{_shown(hard)}" for n, soft, hard in self.limits)
        return "resource limits " + " ".join(limits)


def _shown(value: int) -> str:
    return "unlimited" if value >= 1 << 63 else str(value)


def limit(value: int) -> int:
    return resource.RLIM_INFINITY if value >= 1 << 63 else value


class OpenTerminal(Step):
    """Open a terminal of the container's own devpts: its slave becomes stdin, stdout and stderr.

    The slave is the one that the master names itself, whatever is at its path. The master is kept as descriptor
    `terminal` for the parent. Runs after pivot_root.
    """

    phase = "identity"

    rows: int
    columns: int
    uid: int

    def run(self, context: Context) -> None:
        master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        if os.fstat(master).st_rdev != _PTMX:  # the container's own /dev can hold anything (CVE-2025-52565)
            raise SyscallError("open", ENOTTY, "/dev/pts/ptmx, not a terminal")
        fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
        slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        if self.rows and self.columns:
            fcntl.ioctl(master, TIOCSWINSZ, struct.pack("HHHH", self.rows, self.columns, 0, 0))
        if self.uid:
            os.fchown(slave, self.uid, -1)
        context.fds["terminal"] = master
        context.fds["stdin"] = context.fds["stdout"] = context.fds["stderr"] = slave

    def describe(self) -> str:
        return "open a terminal from the container's devpts"


class WorkingDirectory(Step):
    """Make the working directory if it is missing, and enter it. Runs inside the root."""

    phase = "exec"

    path: str

    def run(self, context: Context) -> None:
        if self.path == "/":
            os.chdir("/")
            return
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            directory = files.make_directories(root, self.path)
        finally:
            os.close(root)
        try:
            os.fchdir(directory)
        finally:
            os.close(directory)
        if not os.getcwd().startswith("/"):  # "(unreachable)": a directory outside the root (CVE-2024-21626)
            raise SyscallError("chdir", ENOENT, self.path)
        context.directory = self.path

    def describe(self) -> str:
        return f"enter {self.path}"


class FindExecutable(Step):
    """Find what execve will run: `name` itself if it has a slash, else along `path` as execvp does."""

    phase = "exec"

    name: str
    path: str

    def run(self, context: Context) -> None:
        if "/" in self.name:
            context.executable = self.name
            return
        candidates = self.candidates()
        try:
            for candidate in candidates:
                if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
                    context.executable = candidate
                    return
            denied = any(os.access(candidate, os.F_OK) for candidate in candidates)
        except ValueError as error:
            raise SyscallError("execve", ENOENT, self.name) from error
        raise SyscallError(f'exec: "{self.name}": executable file not found in $PATH', EACCES if denied else ENOENT)

    def candidates(self) -> list[str]:
        """Where one without a slash may be."""
        return [f"{directory or '.'}/{self.name}" for directory in self.path.split(":")]

    def describe(self) -> str:
        return f"find {self.name}"


class Execute(Step):
    """Become the process: descriptors, seccomp, identity, execve. Never returns on success.

    Capability sets are bit masks; `seccomp` is the BPF program in base64, or empty. `exec_label` goes to
    /proc/self/attr/… (`apparmor_attr` or SELinux's exec) before the container's /proc could be a fake:
    the descriptor `label` must have been opened by an earlier step.
    """

    phase = "exec"

    args: tuple[str, ...]
    env: tuple[str, ...]
    uid: int
    gid: int
    groups: tuple[int, ...]
    bounding: int
    effective: int
    permitted: int
    inheritable: int
    ambient: int
    last_cap: int
    umask: int
    no_new_privileges: bool
    seccomp: str
    seccomp_flags: int
    label: str

    def prepare(self) -> tuple[Exec, Filter | None]:
        """What `run` encodes and allocates; kept, so that a plan that is run again needn't."""
        if "prepared" not in self.__dict__:
            program = Filter(binascii.a2b_base64(self.seccomp)) if self.seccomp else None
            self.__dict__["prepared"] = Exec("", tuple(self.args), tuple(self.env)), program
        prepared: tuple[Exec, Filter | None] = self.__dict__["prepared"]
        return prepared

    def run(self, context: Context) -> None:
        self.standard_streams(context)
        execve, program = self.prepare()
        execve.path = os.fsencode(context.executable)
        close_range(3, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC)
        os.umask(self.umask)
        if self.label:
            os.write(context.fds["label"], self.label.encode())
        caps.drop_bounding(self.bounding, self.last_cap)
        if self.no_new_privileges:
            prctl(PR_SET_NO_NEW_PRIVS, 1)
        elif program:
            program.load(self.seccomp_flags)
        if self.uid:
            prctl(PR_SET_KEEPCAPS, 1)
        set_identity(self.uid, self.gid, self.groups)
        caps.capset(self.effective, self.permitted, self.inheritable)
        caps.set_ambient(self.ambient)
        if self.no_new_privileges and program:
            program.load(self.seccomp_flags)
        errno = execve.run()
        raise SyscallError(f'exec: "{self.args[0]}"', errno)

    @staticmethod
    def standard_streams(context: Context) -> None:
        # Each above 2 first, so that no dup2 overwrites the source of a later one.
        raised = [fcntl.fcntl(context.fds[name], fcntl.F_DUPFD_CLOEXEC, 3) for name in ("stdin", "stdout", "stderr")]
        for number, fd in enumerate(raised):
            os.dup2(fd, number, inheritable=True)
        if "terminal" in context.fds:
            fcntl.ioctl(0, 0x540E, 0)  # TIOCSCTTY

    def describe(self) -> str:
        who = f"{self.uid}:{self.gid}"
        extra = [name for name, on in (("no_new_privs", self.no_new_privileges), ("seccomp", self.seccomp)) if on]
        return f"execute {self.args[0] if self.args else ''} as {who}{' with ' + ', '.join(extra) if extra else ''}"


class OpenLabel(Step):
    """Open the kernel's attribute file for the security label of the next execve, on the host's /proc."""

    phase = "identity"

    path: str

    def run(self, context: Context) -> None:
        try:
            context.fds["label"] = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SyscallError("security module not enabled", EPERM, self.path) from None

    def describe(self) -> str:
        return f"open {self.path}"

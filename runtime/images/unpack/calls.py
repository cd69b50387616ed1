"""The system calls that are left to a process that unpacks: files below its root, memory, and its own threads.

CAP_SYS_ADMIN, which attributes of the form trusted.* need, would else let a process that a layer has taken over mount
what leads out of its root.
"""

import errno
from typing import Final

from runtime.linux.libseccomp import ALLOW, ERRNO, MASKED_EQ, Comparison, context, number
from runtime.linux.namespaces import CLONE
from runtime.linux.seccomp import Filter

_FILES: Final = (
    "open openat openat2 close read write lseek ftruncate fcntl dup dup2 fstat stat lstat newfstatat statx getdents64"
    " readlink readlinkat mkdir mkdirat rmdir unlink unlinkat symlink symlinkat link linkat mknod mknodat"
    " sync_file_range chown lchown fchown fchownat fchdir chroot"
    " chmod fchmod fchmodat fchmodat2 utimensat setxattr lsetxattr fsetxattr"
)
_ITSELF: Final = (
    "recvmsg brk munmap mremap madvise futex sched_yield sched_getaffinity set_robust_list rseq gettid getpid getrandom"
    " clock_gettime clock_nanosleep restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack tgkill"
    " exit exit_group"
)
_PROT_EXEC: Final = 4


def only_unpacking() -> Filter:
    """What isn't needed fails with EPERM. Raises OSError where libseccomp is not installed."""
    with context(ERRNO | errno.EPERM) as filter:
        for name in (_FILES + " " + _ITSELF).split():
            if (call := number(name)) is not None and call >= 0:
                filter.add_rule(ALLOW, call, ())
        for name in ("mmap", "mprotect"):
            # Code is loaded by now.
            if (call := number(name)) is not None:
                filter.add_rule(ALLOW, call, (Comparison(2, MASKED_EQ, _PROT_EXEC, 0),))
        thread = int(CLONE.THREAD)
        if (call := number("clone")) is not None:
            filter.add_rule(ALLOW, call, (Comparison(0, MASKED_EQ, thread, thread),))
        if (call := number("clone3")) is not None:
            # Its flags are in memory, out of a filter's sight: the C library then takes the older call.
            filter.add_rule(ERRNO | errno.ENOSYS, call, ())
        return Filter(filter.export())

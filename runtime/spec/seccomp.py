"""config.json "linux.seccomp": the system calls a container may make."""

from __future__ import annotations

from runtime.spec.base import Part


class SeccompArg(Part, frozen=True):
    """Compares argument `index`; with SCMP_CMP_MASKED_EQ `value` is the mask and `value_two` the datum."""

    index: int
    value: int
    op: str
    value_two: int = 0


class SeccompRule(Part, frozen=True):
    """OCI's LinuxSyscall: all `args` must match for `action` to be taken."""

    names: tuple[str, ...]
    action: str
    errno_ret: int | None = None
    args: tuple[SeccompArg, ...] = ()


class Seccomp(Part, frozen=True):
    """`architectures` besides the native one ("SCMP_ARCH_X86", …); errno 1 (EPERM) where `errno_ret` is None."""

    default_action: str
    default_errno_ret: int | None = None
    architectures: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    listener_path: str = ""
    listener_metadata: str = ""
    syscalls: tuple[SeccompRule, ...] = ()

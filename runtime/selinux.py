"""SELinux: whether the kernel enforces a policy, which labels it knows, and labelling what a container is to use.

Nothing of libselinux: its files are the kernel's (selinuxfs, attributes of /proc, an extended attribute).
"""

import errno
import os
from pathlib import Path
from typing import Final

from runtime.errors import InvalidSpec, Unavailable

DIRECTORY: Final = Path("/sys/fs/selinux")
CONFIG: Final = Path("/etc/selinux")
TYPES: Final = ("container_t", "container_file_t")
"""Of processes and of files, where the policy names none (container-selinux has these)."""
_CURRENT: Final = Path("/proc/self/attr/current")
_ATTRIBUTE: Final = "security.selinux"
_FILE_LIMIT_BYTES: Final = 1 << 16
# What a volume's label would make unusable for the node itself; their subdirectories are volumes' as a rule.
_NEVER: Final = frozenset(
    (
        "/ /bin /boot /dev /etc /etc/passwd /etc/pki /etc/shadow /home /lib /lib64 /media /opt /proc /root /run /sbin "
        "/srv /sys /tmp /usr /usr/bin /usr/lib /usr/lib64 /usr/local /usr/sbin /usr/share /var /var/lib /var/log "
        "/var/tmp"
    ).split()
)


def enabled(directory: Path = DIRECTORY, current: Path = _CURRENT) -> bool:
    """Whether the kernel has SELinux on, with a policy; without one everything is "kernel"."""
    try:
        return (directory / "enforce").exists() and current.read_bytes().rstrip(b"\0\n") not in (b"", b"kernel")
    except OSError:
        return False


def types(config: Path = CONFIG) -> tuple[str, str]:
    """The policy's types of a container's processes and files (selinux_lxc_contexts_path(3))."""
    try:
        lines = _assignments((config / "config").read_text()[:_FILE_LIMIT_BYTES])
        path = config / lines.get("SELINUXTYPE", "targeted") / "contexts/lxc_contexts"
        found = _assignments(path.read_text()[:_FILE_LIMIT_BYTES])
    except OSError:
        return TYPES
    kinds = [found.get(key, "").strip("\"'").split(":") for key in ("process", "file")]
    process, file = (kind[2] if len(kind) > 2 else default for kind, default in zip(kinds, TYPES, strict=True))
    return process, file


def _assignments(text: str) -> dict[str, str]:
    lines = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
    return {key.strip(): value.strip() for key, _, value in lines}


def check(label: str, directory: Path = DIRECTORY) -> None:
    """Refuses a label that the loaded policy doesn't know. Raises InvalidSpec."""
    try:
        fd = os.open(directory / "context", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:  # not for us to ask: the kernel tells at the start
        return
    try:
        os.write(fd, label.encode())
    except OSError as error:
        raise InvalidSpec(f"selinux_options: the label {label!r} is none of this host's policy") from error
    finally:
        os.close(fd)


def relabel(path: str, label: str) -> None:
    """Give a volume, with all that is in it, a container's label. Symlinks are labelled and not followed.

    A file system without labels stays as it is. Raises InvalidSpec for a directory of the host's that nobody may
    relabel, Unavailable.
    """
    real = os.path.realpath(path)
    if real in _NEVER:
        raise InvalidSpec(f"selinux_relabel of {real}: the host needs its label")
    try:
        if not os.path.isdir(real):
            _set(real, label)
            return
        # By descriptors: a container that has the volume already may exchange directories for links.
        for _, below, names, directory in os.fwalk(real, follow_symlinks=False):
            _set(f"/proc/self/fd/{directory}/.", label)
            links = [name for name in below if os.path.islink(f"/proc/self/fd/{directory}/{name}")]
            for name in (*names, *links):
                _set(f"/proc/self/fd/{directory}/{name}", label)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EROFS):
            raise Unavailable(f"selinux_relabel of {real}: {error}") from error


def _set(path: str, label: str) -> None:
    value = label.encode() + b"\0"
    try:
        try:
            if os.getxattr(path, _ATTRIBUTE, follow_symlinks=False) == value:
                return
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        os.setxattr(path, _ATTRIBUTE, value, follow_symlinks=False)
    except FileNotFoundError:  # removed as we look
        pass

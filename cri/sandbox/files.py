"""The pod's own hosts, hostname and resolv.conf, which its containers get bind-mounted.

They are under <state>/pods/<id>, a tmpfs as a rule, and written by worker threads.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from cri.translate.etc import hosts
from cri.translate.sandbox import PodPlan
from runtime import selinux
from runtime.errors import Exhausted, WrongState

_HOST_FILE_LIMIT_BYTES: Final = 1 << 20
_RESOLVER: Final = "/etc/resolv.conf"
_NO_RESOLVER: Final = b"# the node has no /etc/resolv.conf\n"


def make(directory: Path, hostname: str, resolv_conf: str | None, *, host_network: bool) -> None:
    """Write what is known before the pod has an address. `hostname` is the file's text, `resolv_conf` None copies the
    node's file.

    A pod on the node's network gets a copy of the node's hosts file; any other waits for `add_hosts`.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(directory / "hostname", hostname.encode())
    resolver = _host_file(_RESOLVER, _NO_RESOLVER) if resolv_conf is None else resolv_conf.encode()
    _write(directory / "resolv.conf", resolver)
    if host_network:
        _write(directory / "hosts", _host_file("/etc/hosts", hosts(hostname.strip(), ()).encode()))


def add_hosts(directory: Path, hostname: str, addresses: tuple[str, ...]) -> None:
    """Write the hosts file of a pod with its own network."""
    _write(directory / "hosts", hosts(hostname, addresses).encode())


def own(directory: Path, plan: PodPlan, *names: str) -> None:
    """Give those files that there are the label of the pod's containers, and to the root of its user namespace."""
    for path in (directory / name for name in names):
        if path.exists():
            if plan.user:
                os.chown(path, plan.user.uid.host_id, plan.user.gid.host_id, follow_symlinks=False)
            if plan.selinux.file:
                selinux.relabel(str(path), plan.selinux.file)


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _host_file(path: str, default: bytes) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return default
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise WrongState(f"{path} is not a regular file")
    with open(fd, "rb") as file:
        content = file.read(_HOST_FILE_LIMIT_BYTES + 1)
    if len(content) > _HOST_FILE_LIMIT_BYTES:
        raise Exhausted(f"{path} is larger than {_HOST_FILE_LIMIT_BYTES} bytes")
    return content

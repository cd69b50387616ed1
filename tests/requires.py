"""What a test needs of the machine, in a closed vocabulary.

`@requires("root", "cgroup2")` skips a test, or with `pytestmark = requires(...)` a module, where something is missing,
and says what. A fixture calls `need("registry")`. What CRIB_CI_REQUIRES names (separated by commas) was promised:
there its absence is a failure.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from runtime import selinux
from tests import enclosure
from tests.limits import scaled

PROMISED = "CRIB_CI_REQUIRES"


def requires(*names: str) -> pytest.MarkDecorator:
    """Run only where all of `names` are there; ValueError for a name outside the vocabulary."""
    for name in names:
        if name not in VOCABULARY:
            raise ValueError(f"no such requirement: {name} (there are {', '.join(sorted(VOCABULARY))})")
    return pytest.mark.requires(*names)


def need(*names: str) -> None:
    """Skip, or fail where it was promised, unless all of `names` are there."""
    for name in names:
        if reason := missing(name):
            refuse(name, reason)


def refuse(name: str, reason: str) -> NoReturn:
    if name in promised():
        pytest.fail(f"{PROMISED} promises {name}: {reason}", pytrace=False)
    pytest.skip(f"needs {name}: {reason}")


def promised() -> frozenset[str]:
    """The names in CRIB_CI_REQUIRES; ValueError for one outside the vocabulary."""
    names = frozenset(name for name in os.environ.get(PROMISED, "").split(",") if name)
    if unknown := names - VOCABULARY.keys():
        raise ValueError(f"{PROMISED}: no such requirement: {', '.join(sorted(unknown))}")
    return names


@cache
def missing(name: str) -> str | None:
    """Why `name` isn't there, None when it is."""
    return VOCABULARY[name]()


def _program(name: str, package: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        return None if shutil.which(name) else f"no {name} on PATH ({package})"

    return probe


def _builtin() -> str | None:
    """The engine itself: what a test shows of it isn't another runtime's."""
    runtime = os.environ.get("CRIB_TEST_RUNTIME")
    return f"{runtime} runs the containers (CRIB_TEST_RUNTIME)" if runtime else None


def _root() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    return enclosure.refusal()


def _rooted(command: str) -> str | None:
    """Try a shell command in throw-away mount and network namespaces; what it printed when it failed."""
    if reason := _root():
        return reason
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-euc", command],
        capture_output=True,
        text=True,
        timeout=scaled(30),
        check=False,
    )
    return None if tried.returncode == 0 else (tried.stderr.strip() or f"exit code {tried.returncode} of {command}")


def _cgroup2() -> str | None:
    # Version 2 means that /sys/fs/cgroup itself is cgroup2; v1 with `unified` is v1.
    return None if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "/sys/fs/cgroup is not cgroup2"


def _cgroup1() -> str | None:
    return None if Path("/sys/fs/cgroup/memory/cgroup.procs").exists() else "no v1 memory hierarchy"


def _systemd() -> str | None:
    return None if Path("/run/systemd/system").is_dir() else "systemd is not this machine's init"


def _seccomp() -> str | None:
    if not Path("/proc/sys/kernel/seccomp/actions_avail").exists():
        return "the kernel has no seccomp filters"
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        return f"{error} (libseccomp2)"
    return None


def _overlay() -> str | None:
    return _rooted(
        "d=$(mktemp -d); trap 'umount -l $d/m; rm -rf $d' EXIT; mkdir $d/l $d/u $d/w $d/m;"
        " mount -t overlay overlay -o lowerdir=$d/l,upperdir=$d/u,workdir=$d/w $d/m"
    )


def _userns() -> str | None:
    return _rooted("unshare --user true")


def _loop() -> str | None:
    """A file system that can be frozen."""
    return _program("mkfs.ext4", "e2fsprogs")() or _rooted(
        "d=$(mktemp -d); trap 'umount -l $d/m; rm -rf $d' EXIT; mkdir $d/m; truncate -s 8M $d/i;"
        " mkfs.ext4 -q $d/i; mount -o loop $d/i $d/m"
    )


def _bridge() -> str | None:
    return _rooted("ip link add br-probe type bridge; ip link add v-probe type veth peer name w-probe")


def _nft() -> str | None:
    return _program("nft", "nftables")() or _rooted("nft add table inet probe")


def _tbf() -> str | None:
    return _program("tc", "iproute2")() or _rooted("tc qdisc add dev lo root tbf rate 1mbit burst 10kb latency 1ms")


def _sctp() -> str | None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError as error:
        return f"the kernel has no SCTP: {error.strerror}"
    return None


def cni_plugins() -> str:
    """Where CNI's usual plugins are: CRIB_CNI_PLUGINS, or the first of the usual places that has them."""
    places = [os.environ.get("CRIB_CNI_PLUGINS") or "/opt/cni/bin", "/usr/lib/cni"]
    return next((place for place in places if Path(place, "bridge").exists()), places[-1])


def _cni() -> str | None:
    place = cni_plugins()
    return None if Path(place, "bridge").exists() else f"no CNI plugins in {place} (containernetworking-plugins)"


def _cni_1_1() -> str | None:
    """Plugins that know STATUS and GC."""
    if reason := _cni():
        return reason
    path = Path(cni_plugins(), "bridge")
    environment = {"CNI_COMMAND": "VERSION"}
    told = subprocess.run([path], env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False).stdout
    return None if b'"1.1.0"' in told else f"{path} does not speak CNI 1.1.0 (CRIB_CNI_PLUGINS names others)"


def _xtables() -> str | None:
    """What the portmap plugin asks of iptables."""
    rule = "-A x -m comment --comment x -j MARK --set-xmark 0x2000/0x2000"
    return _program("ip6tables", "iptables")() or _rooted(
        "; ".join(f"{name} -t nat -N x; {name} -t nat {rule}" for name in ("iptables", "ip6tables"))
    )


def _apparmor() -> str | None:
    return None if Path("/sys/kernel/security/apparmor/profiles").exists() else "AppArmor is not on"


def _selinux() -> str | None:
    return None if selinux.enabled() else "SELinux is not on, or has no policy"


def _vm() -> str | None:
    named = os.environ.get("CRIB_VM", "0") != "0" or os.environ.get("CRIB_VM_KERNEL")
    return None if named else "neither CRIB_VM nor CRIB_VM_KERNEL is set: hack/vm is not to be used"


def _newest() -> str | None:
    return None if os.environ.get("CRIB_VM_KERNEL") else "CRIB_VM_KERNEL names no kernel for hack/vm"


def _recordings() -> str | None:
    return None if os.environ.get("CRIB_RECORDED_CALLS") else "CRIB_RECORDED_CALLS names no directory of recorded calls"


VOCABULARY: dict[str, Callable[[], str | None]] = {
    "apparmor": _apparmor,
    "bridge": _bridge,
    "builtin": _builtin,
    "busybox": _program("busybox", "busybox-static"),
    "cgroup1": _cgroup1,
    "cgroup2": _cgroup2,
    "critest": _program("critest", "not packaged"),
    "cni": _cni,
    "cni-1.1": _cni_1_1,
    "crictl": _program("crictl", "not packaged"),
    "ip": _program("ip", "iproute2"),
    "loop": _loop,
    "nft": _nft,
    "overlay": _overlay,
    "recordings": _recordings,
    "registry": _program("docker-registry", "docker-registry"),
    "root": _root,
    "runc": lambda: None if os.environ.get("CRIB_TEST_RUNTIME") else _program("runc", "runc")(),
    "sctp": _sctp,
    "seccomp": _seccomp,
    "selinux": _selinux,
    "tbf": _tbf,
    "skopeo": _program("skopeo", "skopeo"),
    "strace": _program("strace", "strace"),
    "systemd": _systemd,
    "systemd-program": lambda: None if Path("/lib/systemd/systemd").exists() else "no /lib/systemd/systemd (systemd)",
    "umoci": _program("umoci", "umoci"),
    "userns": _userns,
    "vm": _vm,
    "vm-newest": _newest,
    "xtables": _xtables,
}

"""What hosts look like, by their mountinfo."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.cgroup import detect
from runtime.cgroup.mounted import CgroupMount, cgroup_mounts, hierarchies
from runtime.cgroup.v1 import V1, Hierarchy
from runtime.errors import InvalidSpec, Unavailable

ROOT = "/sys/fs/cgroup"

HYBRID = """\
25 30 0:22 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
26 25 0:23 / /sys/fs/cgroup/unified rw,nosuid shared:2 - cgroup2 cgroup2 rw,nsdelegate
27 25 0:24 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd
28 25 0:25 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
29 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
31 25 0:27 / /sys/fs/cgroup/net_cls,net_prio rw - cgroup cgroup rw,net_cls,net_prio
32 25 0:26 / /mnt/memory rw - cgroup cgroup rw,memory
"""

# In a container without a cgroup namespace of its own: what is mounted is the container's part of the hierarchy.
NESTED = """\
50 40 0:40 / /sys/fs/cgroup rw - tmpfs tmpfs rw
51 50 0:24 /docker/abc /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
52 50 0:26 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
"""


def test_hybrid() -> None:
    assert hierarchies(cgroup_mounts(HYBRID), ROOT) == (
        Hierarchy(f"{ROOT}/systemd", (), "systemd"),
        Hierarchy(f"{ROOT}/cpu,cpuacct", ("cpu", "cpuacct")),
        Hierarchy(f"{ROOT}/memory", ("memory",)),
        Hierarchy(f"{ROOT}/net_cls,net_prio", ("net_cls", "net_prio")),
    )


def test_nested_in_a_container() -> None:
    cgroups = V1(ROOT, hierarchies(cgroup_mounts(NESTED), ROOT))
    # Paths are relative to what is mounted, not to what /proc/self/cgroup says.
    assert cgroups.memory_events("/pod/x") == f"{ROOT}/memory/pod/x/memory.oom_control"


def test_what_is_mounted_over_is_hidden() -> None:
    over = HYBRID + "60 25 0:50 / /sys/fs/cgroup/memory rw - tmpfs none rw\n"
    assert not any("memory" in hierarchy.controllers for hierarchy in hierarchies(cgroup_mounts(over), ROOT))


def test_v2() -> None:
    text = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
    (mount,) = cgroup_mounts(text)
    assert mount == CgroupMount(ROOT, "cgroup2", ("rw", "nsdelegate", "memory_recursiveprot"))


def test_mounts_in_a_container_on_v1() -> None:
    cgroups = V1(ROOT, hierarchies(cgroup_mounts(HYBRID), ROOT))
    mounts = {mount.target: mount for mount in cgroups.mounts_in_container("/pod/x")}
    assert mounts["cpu,cpuacct"].links == ("cpu", "cpuacct")
    assert mounts["cpu,cpuacct"].data == "cpu,cpuacct"
    assert mounts["memory"].links == ()
    assert mounts["systemd"].data == "none,name=systemd"
    assert mounts["memory"].directory == f"{ROOT}/memory/pod/x"


def test_nothing_mounted() -> None:
    with pytest.raises(Unavailable, match="no cgroup hierarchy"):
        detect("/proc")


def test_an_unknown_driver() -> None:
    with pytest.raises(InvalidSpec, match="docker"):
        detect(driver="docker")


def test_the_file_primitives_are_lean() -> None:
    """Monitors and containers' first processes import them."""
    code = "import runtime.cgroup.files, sys; print(*sorted(m for m in sys.modules if m.startswith('runtime')))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=".")
    assert done.stdout.split() == ["runtime", "runtime.cgroup", "runtime.cgroup.files"]

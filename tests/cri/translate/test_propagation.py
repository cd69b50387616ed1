"""Whether a source's mount can propagate."""

from __future__ import annotations

from pathlib import Path

import pytest

from cri.translate import propagation
from runtime.errors import InvalidSpec
from runtime.spec import Mount

MOUNTINFO = r"""21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 21 0:25 / /private rw - tmpfs tmpfs rw
31 21 0:26 / /slave rw,nosuid master:3 propagate_from:1 - tmpfs tmpfs rw
32 30 0:27 / /private/with\040blank\011é rw shared:9 master:4 - tmpfs tmpfs rw
33 21 0:28 / /twice rw shared:7 - tmpfs tmpfs rw
34 33 0:29 / /twice rw - tmpfs tmpfs rw
"""


def bind(source: str, mode: str) -> Mount:
    return Mount(destination="/d", type="bind", source=source, options=("rbind", mode, "rw"))


@pytest.mark.parametrize(
    ("source", "mode"),
    [
        ("/data", "rshared"),
        ("/", "rshared"),
        ("/private/x", "rprivate"),
        ("/private/with blank\té/x", "rshared"),
        ("/slave", "rslave"),
        ("/data", "rslave"),
        ("/privateer", "rshared"),
    ],
)
def test_allowed(source: str, mode: str) -> None:
    propagation.check([bind(source, mode)], MOUNTINFO, str)


@pytest.mark.parametrize(
    ("source", "mode", "said"),
    [
        ("/private/x", "rshared", "'/private' is not"),
        ("/slave/x", "rshared", "'/slave' is not"),
        ("/private", "rslave", "'/private' is neither"),
        ("/twice", "rshared", "'/twice' is not"),
    ],
)
def test_refused(source: str, mode: str, said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        propagation.check([bind(source, mode)], MOUNTINFO, str)
    assert said in str(error.value)
    assert f"host_path {source!r}" in str(error.value)


def test_a_symlink_counts_as_what_it_leads_to() -> None:
    with pytest.raises(InvalidSpec, match="'/private' is not"):
        propagation.check([bind("/link", "rshared")], MOUNTINFO, lambda path: path.replace("/link", "/private/x"))


def test_only_what_depends_on_it_needs_mountinfo() -> None:
    sysfs = Mount(destination="/sys", type="sysfs", source="sysfs", options=("ro",))
    assert propagation.wanted([bind("/x", "rprivate"), sysfs]) == ()
    assert propagation.wanted([bind("/x", "rslave")]) == (bind("/x", "rslave"),)


def test_this_machine_s_mountinfo_is_understood() -> None:
    text = Path("/proc/self/mountinfo").read_text()
    points = {propagation._parse(line).point for line in text.splitlines()}
    assert "/" in points
    assert "/proc" in points

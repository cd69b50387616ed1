"""SELinux as far as it can be tested without a policy: a kernel without SELinux keeps labels as plain attributes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import selinux
from runtime.errors import InvalidSpec
from tests.requires import requires

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def label_of(path: Path) -> str:
    return os.getxattr(path, "security.selinux", follow_symlinks=False).decode()


def test_whether_it_is_on(tmp_path: Path) -> None:
    current = tmp_path / "current"
    assert not selinux.enabled(tmp_path / "none", current)
    (tmp_path / "enforce").write_text("0")
    for text, on in ((b"kernel\0", False), (b"", False), (b"system_u:system_r:crib_t:s0\0", True)):
        current.write_bytes(text)
        assert selinux.enabled(tmp_path, current) is on


def test_the_policys_types(tmp_path: Path) -> None:
    assert selinux.types(tmp_path) == selinux.TYPES
    (tmp_path / "config").write_text("# a comment\nSELINUX=enforcing\nSELINUXTYPE=mls\n")
    contexts = tmp_path / "mls/contexts"
    contexts.mkdir(parents=True)
    text = 'process = "system_u:system_r:box_t:s0"\nfile = "system_u:object_r:box_file_t:s0"\nro_file="x"\n'
    (contexts / "lxc_contexts").write_text(text)
    assert selinux.types(tmp_path) == ("box_t", "box_file_t")
    (contexts / "lxc_contexts").write_text("process = nonsense")
    assert selinux.types(tmp_path) == selinux.TYPES


@requires("root")
def test_a_volume_is_labelled_with_all_that_is_in_it_and_nothing_else(tmp_path: Path) -> None:
    volume, outside = tmp_path / "volume", tmp_path / "outside"
    (volume / "deep/er").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").touch()
    (volume / "deep/er/file").touch()
    (volume / "link").symlink_to(outside)
    (volume / "deep/file-link").symlink_to(outside / "file")
    os.mkfifo(volume / "pipe")
    try:
        selinux.relabel(str(volume), LABEL)
    except OSError as error:
        pytest.skip(f"no security attributes here: {error}")
    inside = [volume, *volume.rglob("*")]
    assert {label_of(path) for path in inside} == {f"{LABEL}\0"}
    for path in (outside, outside / "file"):
        assert "security.selinux" not in os.listxattr(path)
    other = LABEL.replace("c1", "c3")
    selinux.relabel(str(volume / "deep/er/file"), other)
    assert label_of(volume / "deep/er/file") == f"{other}\0"
    assert label_of(volume / "deep/er") == f"{LABEL}\0"


@pytest.mark.parametrize("path", ["/", "/usr", "/etc", "/usr/../etc"])
def test_the_hosts_own_directories_are_never_relabelled(path: str) -> None:
    with pytest.raises(InvalidSpec, match="the host needs its label"):
        selinux.relabel(path, LABEL)


def test_a_label_that_no_policy_is_there_to_judge_passes(tmp_path: Path) -> None:
    selinux.check(LABEL, tmp_path)
    (tmp_path / "context").touch()
    selinux.check(LABEL, tmp_path)

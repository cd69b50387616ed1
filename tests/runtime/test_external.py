"""Runtimes' own words: what they say of their features, what they log."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from runtime.errors import Unavailable
from runtime.external import Bundle, Features, Runtime, features


def program(path: Path, script: str) -> Runtime:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return Runtime(name="rt", path=str(path))


def test_features_are_those_that_the_runtime_names(tmp_path: Path) -> None:
    all_of_it = (
        '{"mountOptions": ["rro"], "linux": {"namespaces": ["user"], "mountExtensions": {"idmap": {"enabled": true}}}}'
    )
    assert features(program(tmp_path / "a", f"echo '{all_of_it}'")) == Features(
        recursive_read_only_mounts=True, user_namespaces=True
    )
    without = '{"mountOptions": ["ro"], "linux": {"namespaces": ["user"]}}'
    assert features(program(tmp_path / "b", f"echo '{without}'")) == Features()
    assert features(program(tmp_path / "c", "echo 'no such command' >&2; exit 1")) == Features()


def test_a_runtime_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no such file or directory"):
        features(Runtime(name="rt", path=str(tmp_path / "gone")))


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ('{"level": "warning", "msg": "w"}\n{"level": "error", "msg": "why not"}\n', "why not"),
        ('{"level": "error", "msg": "a"}\n{"level": "error", "msg": "last"}\n{"level": "info", "msg": "i"}', "last"),
        ('{"level": "error", "msg": "", "x": 1}\nnot json\n[1]\n', "otherwise"),
        ('{\n  "msg": "as crun says it",\n  "level": "error"\n}\n', "as crun says it"),
        ("", "otherwise"),
        (None, "otherwise"),
        ('{"level": "error", "msg": "%s"}\n' % ("x" * 5000), "x" * 2048),
    ],
)
def test_what_a_runtime_complains_of_is_its_last_error(tmp_path: Path, log: str | None, said: str) -> None:
    bundle = Bundle(Runtime(name="rt", path="/rt"), str(tmp_path), "c")
    if log is not None:
        (tmp_path / "bundle-c").mkdir()
        (tmp_path / "bundle-c/create.log").write_text(log)
    assert bundle.complaint("create", "otherwise") == said

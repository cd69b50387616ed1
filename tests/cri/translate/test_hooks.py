"""Files of hooks.d: what is refused, and which containers get which hooks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cri.translate.hooks import apply, parse
from runtime.errors import InvalidSpec
from runtime.spec import Hook
from tests.cri.translate.given import container, spec


def text(**fields: Any) -> bytes:
    usual = {"version": "1.0.0", "hook": {"path": "/bin/h"}, "when": {"always": True}, "stages": ["poststop"]}
    return json.dumps(usual | fields).encode()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": "2.0.0"}, "version '2.0.0'"),
        ({"stages": ["never"]}, "stage 'never'"),
        ({"stages": []}, "no stages"),
        ({"hook": {"path": "h"}}, "hook.path"),
        ({"when": {"commands": ["("]}}, "unterminated"),
        ({"when": {"sometimes": True}}, "sometimes"),
    ],
)
def test_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec, match=r"hook file /d/x\.json") as error:
        parse("/d/x.json", text(**fields))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("when", "runs"),
    [
        ({"always": True}, True),
        ({"always": False}, False),
        ({}, False),
        ({"commands": ["^sh$"]}, True),
        ({"commands": ["^bash$"]}, False),
        ({"annotations": {"^a$": "^b"}}, True),
        ({"annotations": {"^a$": "^c"}}, False),
        ({"always": True, "hasBindMounts": True}, False),
        ({"hasBindMounts": False, "commands": ["sh"]}, True),
    ],
)
def test_conditions(when: dict[str, Any], runs: bool) -> None:
    found = parse("x", text(when=when, stages=["createRuntime", "poststop"]))
    made = apply(spec(container()), [found], {"a": "bc"}, bind_mounts=False)
    assert bool(made.hooks) == runs
    if made.hooks:
        assert made.hooks.create_runtime == made.hooks.poststop == (Hook(path="/bin/h"),)

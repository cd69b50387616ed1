"""The vocabulary of requirements is closed, and a promise is kept or fails."""

from __future__ import annotations

import pytest

from tests import requires


def test_an_unknown_requirement_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such requirement: rooot"):
        requires.requires("rooot")


def test_an_unknown_promise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(requires.PROMISED, "root,rooot")
    with pytest.raises(ValueError, match="no such requirement: rooot"):
        requires.promised()


def test_what_is_missing_is_skipped_and_what_was_promised_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(requires.PROMISED, "vm")
    with pytest.raises(pytest.fail.Exception, match="promises vm: nowhere"):
        requires.refuse("vm", "nowhere")
    with pytest.raises(pytest.skip.Exception, match="needs systemd: nowhere"):
        requires.refuse("systemd", "nowhere")


@pytest.mark.parametrize("name", sorted(requires.promised()))
def test_what_was_promised_is_there(name: str) -> None:
    assert requires.missing(name) is None

"""Names of merged layers, looked up without a mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import Exhausted
from runtime.images.merged import Merged


def test_enough_is_enough(tmp_path: Path) -> None:
    """Each directory counts in each layer that has it."""
    layers = tuple(tmp_path / str(number) for number in range(10))
    for layer in layers:
        (layer / "a/b/c").mkdir(parents=True)
    view = Merged(layers, iter(range(45)))
    found = view.lookup("a/b/c")
    assert found and len(found.directories) == 10
    assert view.lookup("a/b/c")
    with pytest.raises(Exhausted, match="too many names lead through too many layers"):
        view.lookup("a")


@pytest.mark.parametrize("path", ["n" * 300, "d/" * 3000, "f/x", "none"])
def test_what_can_not_be_there_is_not(tmp_path: Path, path: str) -> None:
    (tmp_path / "f").touch()
    assert Merged((tmp_path,)).lookup(path) is None

"""What the documents say that code can check."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from cri.config import Config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("e2e/*.md")])


def keys(struct: type[msgspec.Struct], prefix: str = "") -> set[str]:
    """The names of all keys, a section's with its name and a dot."""
    found: set[str] = set()
    for field in msgspec.structs.fields(struct):
        section = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        found |= keys(field.type, f"{prefix}{field.name}.") if section else {prefix + field.name}
    return found


def test_every_configuration_key_is_documented() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    assert {key for cell in cells for key in re.findall(r"`([a-z0-9_.]+)`", cell)} == keys(Config)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    paths = re.findall(r"(?:^|[\s`(])((?:hack|docs|cri|runtime|net|e2e|tests|proto)/[\w./-]*\w)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()]
    assert not missing

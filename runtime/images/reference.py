"""Names of images: `[registry/]repository[:tag][@digest]`, normalised as Docker does.

Grammar: the distribution project's reference package and OCI distribution-spec 1.1.
"""

import re
from dataclasses import dataclass

from runtime.errors import InvalidSpec

DEFAULT_REGISTRY = "docker.io"
_DEFAULT_TAG = "latest"
_NAME_LIMIT = 255
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::[0-9]{{1,5}})?")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_HEX_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised name; at least one of `tag` and `digest` is not empty, and where both are the digest decides."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        return f"{self.registry}/{self.repository}"

    @property
    def target(self) -> str:
        """What to ask the registry for."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def is_tag(text: str) -> bool:
    return _TAG.fullmatch(text) is not None


def parse(text: str) -> Reference:
    """The reference that `text` names; without tag and digest the tag is `latest`. Raises InvalidSpec."""
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise InvalidSpec(f"image reference {_quoted(text)}: malformed digest")
    registry, repository = _split_registry(rest)
    tag = ""
    slash = repository.rfind("/")
    colon = repository.find(":", slash + 1)
    if colon >= 0:
        repository, tag = repository[:colon], repository[colon + 1 :]
        if not is_tag(tag):
            raise InvalidSpec(f"image reference {_quoted(text)}: malformed tag")
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        if _HEX_ID.fullmatch(tag if repository == "sha256" else repository):
            raise InvalidSpec(f"image reference {_quoted(text)}: an id, not a name")
        repository = f"library/{repository}"
    if not _REGISTRY.fullmatch(registry):
        raise InvalidSpec(f"image reference {_quoted(text)}: malformed registry")
    if not _REPOSITORY.fullmatch(repository) or len(registry) + len(repository) >= _NAME_LIMIT:
        raise InvalidSpec(f"image reference {_quoted(text)}: malformed repository (lower case, at most 255 characters)")
    return Reference(registry, repository, tag or ("" if digest else _DEFAULT_TAG), digest)


def _split_registry(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        if first in ("index.docker.io", "registry-1.docker.io"):
            first = DEFAULT_REGISTRY
        return first, rest
    return DEFAULT_REGISTRY, text


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 300 else text[:300] + "…")

"""systemd's view of a cgroup: the names of slices, and where they are. Pure."""

import re
from collections.abc import Iterable
from typing import Final

from runtime.errors import InvalidSpec

_SUFFIX: Final = ".slice"
_PART: Final = re.compile(r"[A-Za-z0-9:_.\\]+")
_LONGEST_NAME: Final = 255


def slice_path(name: str) -> str:
    """Where systemd puts a slice: "a-b.slice" is /a.slice/a-b.slice. Raises InvalidSpec for what names no slice."""
    parts = name.removesuffix(_SUFFIX).split("-")
    if not name.endswith(_SUFFIX) or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidSpec(f"{name!r} is no name of a systemd slice")
    if len(name) > _LONGEST_NAME:
        raise InvalidSpec(f"slice name of {len(name)} characters is too long: {name}")
    return "".join("/" + "-".join(parts[:count]) + _SUFFIX for count in range(1, len(parts) + 1))


def below(parent: str, names: Iterable[str]) -> str:
    """The path of the cgroup `names` below a slice, given by its name or its path. Raises InvalidSpec."""
    name = parent.rstrip("/").rpartition("/")[2]
    try:
        path = slice_path(name)
    except InvalidSpec as error:
        raise InvalidSpec(
            f"cgroup parent {parent!r} is no systemd slice, as the cgroup driver systemd needs it"
        ) from error
    if parent.strip("/") not in (name, path.strip("/")):
        raise InvalidSpec(f"cgroup parent {parent!r}: systemd has slice {name} at {path}")
    return "/".join((path, *names))


def split(path: str) -> tuple[str, str]:
    """The slice that a cgroup path begins with, by its name, and that slice's path. Raises InvalidSpec without one."""
    slices = []
    for name in path.split("/")[1:]:
        if not name.endswith(_SUFFIX):
            break
        slices.append(name)
    if not slices:
        raise InvalidSpec(f"cgroup path {path!r} is below no systemd slice")
    found = slice_path(slices[-1])
    if found != "/" + "/".join(slices):
        raise InvalidSpec(f"cgroup path {path!r}: systemd has slice {slices[-1]} at {found}")
    return slices[-1], found


def keeper(name: str) -> str:
    """The name of crib's slice within a slice."""
    return f"{name.removesuffix(_SUFFIX)}-crib{_SUFFIX}"

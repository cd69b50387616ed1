"""The directories of cgroups: paths checked, made with what is missing above them, removed with what is below."""

import errno
import os
from collections.abc import Iterable, Sequence

from runtime.cgroup import files
from runtime.errors import CribError, Exhausted, InvalidSpec, NotFound, Unavailable

_MOST_RACES = 5
_GONE = (errno.ENOENT, errno.ENODEV)


def checked(path: str) -> str:
    """The path of a cgroup without a trailing slash. Raises InvalidSpec for one that could lead elsewhere."""
    names = path.split("/")
    if len(names) > 2 and not names[-1]:
        names.pop()
    if names[0] or len(names) < 2:
        raise InvalidSpec(f"cgroup path {path!r} is not absolute")
    for name in names[1:]:
        if name in ("", ".", ".."):
            raise InvalidSpec(f"cgroup path {path!r} has the component {name!r}")
        if len(os.fsencode(name)) > 255 or not name.isprintable():
            raise InvalidSpec(f"cgroup path {path!r} has a component that is too long or not printable")
    if len(path) > 3500:
        raise InvalidSpec(f"cgroup path of {len(path)} characters is too long")
    return "/".join(names)


def lineage(path: str) -> list[str]:
    """The paths from the outermost cgroup down to `path` itself."""
    names = path.split("/")[1:]
    return ["/" + "/".join(names[:count]) for count in range(1, len(names) + 1)]


def below(parent: str, *names: str) -> str:
    """The path of the cgroup `names` below the cgroupfs path `parent`. Raises InvalidSpec for the name of a slice."""
    path = checked("/".join(("/" + parent.strip("/") if parent.strip("/") else "", *names)))
    if parent.rstrip("/").endswith(".slice"):
        raise InvalidSpec(f"cgroup parent {parent} is a systemd slice, but cgroups are managed without systemd here")
    return path


def make(root: str, path: str) -> list[str]:
    """Make the cgroup's directory and its missing parents; returns those it made, outermost first, as paths.

    A parent that its owner removes meanwhile is made again, a few times. What was made before a failure is removed.
    Raises CribError.
    """
    made: list[str] = []
    for _ in range(_MOST_RACES):
        try:
            _make(root, path, made)
        except FileNotFoundError:
            remove_made(root, made)
            made.clear()
        except OSError as error:
            remove_made(root, made)
            raise explain(error, path) from error
        else:
            return made
    raise Unavailable(f"cgroup {path}: somebody keeps removing its parents")


def _make(root: str, path: str, made: list[str]) -> None:
    for missing_parent in (True, False):
        try:
            os.mkdir(root + path, 0o755)
        except FileExistsError:  # perhaps made just now by somebody else
            if not os.path.isdir(root + path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), root + path) from None
        except FileNotFoundError:
            parent = path.rpartition("/")[0]
            if not (parent and missing_parent):
                raise
            _make(root, parent, made)
            continue
        else:
            made.append(path)
        return


def remove_made(root: str, made: Sequence[str]) -> None:
    """Take back what `make` made; what has been filled by others meanwhile stays."""
    for path in reversed(made):
        try:
            os.rmdir(root + path)
        except OSError:
            return


def remove(directory: str) -> bool:
    """Remove the cgroup and all below it; True when it is gone, False while a process is in it. Raises CribError."""
    try:
        if _rmdir(directory):
            return True
        # Nested cgroups are the exception: looked for only when the kernel refuses.
        gone = [_rmdir(nested) for nested in reversed(list(files.tree(directory)))]
        return gone[-1] if gone else True
    except OSError as error:
        raise explain(error, directory) from error


def remove_nested(directory: str) -> None:
    """Remove the empty cgroups below, not the cgroup itself. Raises OSError."""
    for nested in reversed(list(files.tree(directory))[1:]):
        _rmdir(nested)


def _rmdir(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        if error.errno not in _GONE:
            raise
    return True


def explain(error: OSError, path: str) -> CribError:
    """The domain error for a failure to make, remove or look into the cgroup `path`."""
    cause = (error.strerror or str(error)).lower()
    match error.errno:
        case errno.ENOTDIR | errno.EINVAL | errno.ENAMETOOLONG | errno.ELOOP:
            return InvalidSpec(f"cgroup path {path}: {cause}")
        case errno.ENOENT | errno.ENODEV:
            return NotFound(f"cgroup {path} does not exist")
        case errno.EAGAIN | errno.ENOSPC | errno.ENOMEM:
            return Exhausted(f"cgroup {path}: the kernel allows no more cgroups here: {cause}")
        case errno.EROFS:
            return Unavailable(f"cgroup {path}: the hierarchy is mounted read-only")
        case _:
            return Unavailable(f"cgroup {path}: {cause}")


def made_in_all(made: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The paths that every hierarchy lacked before, outermost first: what others hold in one of them is theirs."""
    sets = [set(paths) for paths in made]
    return tuple(sorted(set.intersection(*sets), key=len)) if sets else ()

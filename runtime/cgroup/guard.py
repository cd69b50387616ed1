"""Keeps what is written in cgroup files from being overwritten by somebody else (systemd, after its reload).

What is kept is written on the cgroup itself, as an extended attribute: it goes with the cgroup, and a cribd that is
started later finds it.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from threading import Lock, Thread
from typing import Final

from runtime.cgroup import files
from runtime.linux.inotify import IN_IGNORED, IN_MODIFY, add_watch, inotify_init, read_events

_ATTRIBUTE: Final = "trusted.crib.kept"


class Guard:
    """Writes a file's value again when another has been written. Thread-safe; its thread starts with the first file."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inotify = -1
        self._kept: dict[int, tuple[str, str]] = {}  # watch to file and value, as the kernel shows it

    def keep(self, directory: str, names: Iterable[str]) -> None:
        """Keep what these files of a cgroup hold now, while it exists. One that isn't there is passed over."""
        held = _recorded(directory)
        for name in names:
            try:
                held[name] = files.read(f"{directory}/{name}").strip()
            except OSError:
                held.pop(name, None)
        if not held:
            return
        self._watch_all(directory, held)
        try:
            os.setxattr(directory, _ATTRIBUTE, "\n".join(f"{name} {value}" for name, value in held.items()).encode())
        except OSError:
            return  # gone, or not allowed here: kept until cribd ends

    def release(self, directory: str, names: Iterable[str]) -> None:
        """Let them be written, until they are kept anew."""
        released = {f"{directory}/{name}" for name in names}
        with self._lock:
            self._kept = {watch: kept for watch, kept in self._kept.items() if kept[0] not in released}

    def resume(self, root: str) -> None:
        """Keep what an earlier process kept, in the slices below `root`, and write what was overwritten since."""
        for directory in _slices(root):
            if held := _recorded(directory):
                self._watch_all(directory, held)
                for name, value in held.items():
                    _restore(f"{directory}/{name}", value)

    def _watch_all(self, directory: str, held: dict[str, str]) -> None:
        with self._lock:
            if self._inotify < 0:
                self._inotify = inotify_init()
                Thread(target=self._watch, name="cgroup-guard", daemon=True).start()
            for name, value in held.items():
                try:
                    watch = add_watch(self._inotify, f"{directory}/{name}", IN_MODIFY)
                except OSError:
                    continue  # gone, or too many watches: then it is as safe as with any other runtime
                self._kept[watch] = f"{directory}/{name}", value

    def _watch(self) -> None:
        while True:
            for watch, mask in read_events(self._inotify):
                with self._lock:
                    if mask & IN_IGNORED:  # the cgroup is gone
                        self._kept.pop(watch, None)
                    elif watch in self._kept:
                        _restore(*self._kept[watch])


def _restore(file: str, value: str) -> None:
    try:
        if files.read(file).strip() != value:
            files.write(file, value)
    except OSError:
        return


def _recorded(directory: str) -> dict[str, str]:
    try:
        text = os.getxattr(directory, _ATTRIBUTE).decode()
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
            raise
        return {}
    pairs = (line.partition(" ") for line in text.splitlines())
    return {name: value for name, _, value in pairs if "/" not in name}


def _slices(root: str) -> Iterator[str]:
    pending = [root]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                below = [entry.path for entry in entries if entry.name.endswith(".slice")]
        except OSError:
            continue
        yield from below
        pending += below

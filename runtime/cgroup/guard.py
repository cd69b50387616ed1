"""Keeps what is written in cgroup files from being overwritten by somebody else (systemd, after its reload)."""

from threading import Lock, Thread

from runtime.cgroup import files
from runtime.linux.inotify import IN_IGNORED, IN_MODIFY, add_watch, inotify_init, read_events


class Guard:
    """Writes a file's value again when another has been written. Thread-safe; its thread starts with the first file."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inotify = -1
        self._kept: dict[int, tuple[str, str]] = {}  # watch to file and value, as the kernel shows it

    def keep(self, file: str) -> None:
        """Keep what the file holds now, while it exists. A file that isn't there is passed over."""
        with self._lock:
            if self._inotify < 0:
                self._inotify = inotify_init()
                Thread(target=self._watch, name="cgroup-guard", daemon=True).start()
            try:
                watch = add_watch(self._inotify, file, IN_MODIFY)
                self._kept[watch] = file, files.read(file).strip()
            except OSError:
                return  # gone, or too many watches: then it is as safe as with any other runtime

    def release(self, file: str) -> None:
        """Let it be written. The watch stays, and serves again when the file is kept anew."""
        with self._lock:
            self._kept = {watch: kept for watch, kept in self._kept.items() if kept[0] != file}

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

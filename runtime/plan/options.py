"""OCI mount option strings to kernel flags."""

import functools
from dataclasses import dataclass
from typing import Final

from runtime.linux.mount import MS, MountAttr

# Option → (mount(2) flag, mount attribute, set or clear).
_FLAGS: Final[dict[str, tuple[int, int, bool]]] = {
    "ro": (MS.RDONLY, MountAttr.RDONLY, True),
    "rw": (MS.RDONLY, MountAttr.RDONLY, False),
    "nosuid": (MS.NOSUID, MountAttr.NOSUID, True),
    "suid": (MS.NOSUID, MountAttr.NOSUID, False),
    "nodev": (MS.NODEV, MountAttr.NODEV, True),
    "dev": (MS.NODEV, MountAttr.NODEV, False),
    "noexec": (MS.NOEXEC, MountAttr.NOEXEC, True),
    "exec": (MS.NOEXEC, MountAttr.NOEXEC, False),
    "nodiratime": (MS.NODIRATIME, MountAttr.NODIRATIME, True),
    "diratime": (MS.NODIRATIME, MountAttr.NODIRATIME, False),
    "nosymfollow": (MS.NOSYMFOLLOW, MountAttr.NOSYMFOLLOW, True),
    "symfollow": (MS.NOSYMFOLLOW, MountAttr.NOSYMFOLLOW, False),
}
# The three access time modes are one field of the attributes: setting one clears the mask first.
_ATIME: Final[dict[str, tuple[int, int]]] = {
    "noatime": (MS.NOATIME, MountAttr.NOATIME),
    "relatime": (MS.RELATIME, 0),
    "atime": (MS.RELATIME, 0),
    "norelatime": (MS.STRICTATIME, MountAttr.STRICTATIME),
    "strictatime": (MS.STRICTATIME, MountAttr.STRICTATIME),
}
_SUPERBLOCK: Final[dict[str, tuple[int, bool]]] = {
    "sync": (MS.SYNCHRONOUS, True),
    "async": (MS.SYNCHRONOUS, False),
    "dirsync": (MS.DIRSYNC, True),
    "lazytime": (MS.LAZYTIME, True),
    "nolazytime": (MS.LAZYTIME, False),
    "silent": (MS.SILENT, True),
    "loud": (MS.SILENT, False),
}
_PROPAGATION: Final[dict[str, int]] = {
    "private": MS.PRIVATE,
    "rprivate": MS.PRIVATE,
    "slave": MS.SLAVE,
    "rslave": MS.SLAVE,
    "shared": MS.SHARED,
    "rshared": MS.SHARED,
}
MAKE_SOURCE: Final = "x-crib.mkdir"
_OTHERS: Final = frozenset(("bind", "rbind", "idmap", "ridmap", "defaults", MAKE_SOURCE))


@dataclass(frozen=True, slots=True)
class Options:
    """What a mount's options mean: for mount(2) `flags` and `data`, for binds the attributes.

    `recursive_set` and `recursive_clear` apply to all that is mounted below as well.
    """

    bind: bool = False
    recursive: bool = False
    make_source: bool = False
    idmap: bool = False
    idmap_recursive: bool = False
    flags: int = 0
    data: str = ""
    set_: int = 0
    clear: int = 0
    recursive_set: int = 0
    recursive_clear: int = 0
    propagation: int = 0


@functools.lru_cache(256)  # a pod's volumes all have the same few
def parse(options: tuple[str, ...]) -> Options:
    """Sort OCI option strings (runtime-spec, config.md, "Linux mount options"); what is no flag is data."""
    flags = set_ = clear = recursive_set = recursive_clear = propagation = 0
    data: list[str] = []
    for option in options:
        deep = option[:1] == "r" and option not in _FLAGS and option not in _ATIME and option not in _PROPAGATION
        name = option[1:] if deep and (option[1:] in _FLAGS or option[1:] in _ATIME) else option
        if name in _FLAGS:
            flag, attribute, on = _FLAGS[name]
            flags = flags | flag if on else flags & ~flag
            if name != option:
                recursive_set, recursive_clear = _switch(recursive_set, recursive_clear, attribute, on)
            else:
                set_, clear = _switch(set_, clear, attribute, on)
        elif name in _ATIME:
            flag, attribute = _ATIME[name]
            flags = flags & ~(MS.NOATIME | MS.RELATIME | MS.STRICTATIME) | flag
            if name != option:
                recursive_set, recursive_clear = recursive_set | attribute, recursive_clear | MountAttr.ATIME_MASK
            else:
                set_, clear = set_ & ~MountAttr.ATIME_MASK | attribute, clear | MountAttr.ATIME_MASK
        elif option in _SUPERBLOCK:
            flag, on = _SUPERBLOCK[option]
            flags = flags | flag if on else flags & ~flag
        elif option in _PROPAGATION:
            propagation = _PROPAGATION[option]
        elif option not in _OTHERS and not option.startswith("x-crib."):
            data.append(option)
    return Options(
        bind="bind" in options or "rbind" in options,
        recursive="rbind" in options,
        make_source=MAKE_SOURCE in options,
        idmap="idmap" in options or "ridmap" in options,
        idmap_recursive="ridmap" in options,
        flags=int(flags),
        data=",".join(data),
        set_=int(set_),
        clear=int(clear),
        recursive_set=int(recursive_set),
        recursive_clear=int(recursive_clear),
        propagation=int(propagation),
    )


def _switch(set_: int, clear: int, attribute: int, on: bool) -> tuple[int, int]:
    return (set_ | attribute, clear & ~attribute) if on else (set_ & ~attribute, clear | attribute)

"""Control groups behind one interface: cgroup v1 and v2 written directly, v2 through systemd.

`runtime.cgroup.files` is also imported by the zygote's side, which must stay lean: so nothing is imported here before
it is asked for.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from typing import Any

    from runtime.cgroup.interface import Cgroups, Mount
    from runtime.cgroup.mounted import detect
    from runtime.cgroup.stats import Stats

__all__ = ["Cgroups", "Mount", "Stats", "detect"]

_HOMES = {"Cgroups": "interface", "Mount": "interface", "Stats": "stats", "detect": "mounted"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

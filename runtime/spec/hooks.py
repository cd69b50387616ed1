"""config.json "hooks": programs run at points of a container's life."""

from __future__ import annotations

from runtime.spec.base import Part


class Hook(Part, frozen=True):
    """`path` is absolute; `args` include argv[0]; `timeout` in seconds."""

    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class Hooks(Part, frozen=True):
    """`prestart` is deprecated in OCI, and older CDI specs use it: it runs where create_runtime does, before it."""

    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()

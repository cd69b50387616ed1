"""The hooks of the OCI runtime spec that run in the host's namespaces: createRuntime, poststart, poststop."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from runtime.spec import OCI_VERSION, Hook

TIMEOUT_S: Final = 30
"""For a hook that sets no deadline of its own."""

Run = Callable[[str, tuple[Hook, ...], Mapping[str, object]], Awaitable[None]]
"""Runs a stage's hooks one after the other (see `Engine.run_hooks`)."""


def state(container_id: str, status: str, bundle: str, annotations: Mapping[str, str]) -> dict[str, object]:
    """What a hook reads on its stdin (runtime.md, "State"), without the pid."""
    return {
        "ociVersion": OCI_VERSION,
        "id": container_id,
        "status": status,
        "bundle": bundle,
        "annotations": dict(annotations),
    }


def plain(hooks: tuple[Hook, ...]) -> list[tuple[str, tuple[str, ...], tuple[str, ...], int]]:
    """The hooks for a message: path, arguments, environment, deadline in seconds."""
    return [(hook.path, hook.args, hook.env, hook.timeout or TIMEOUT_S) for hook in hooks]


def deadline_s(hooks: tuple[Hook, ...]) -> float:
    """How long they may take together, and be cleaned up after."""
    return float(sum(hook.timeout or TIMEOUT_S for hook in hooks) + TIMEOUT_S)

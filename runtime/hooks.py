"""The hooks of the OCI runtime spec that run in the host's namespaces: createRuntime, poststart, poststop."""

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from typing import Final

from runtime.errors import CribError
from runtime.spec import OCI_VERSION, Hook

TIMEOUT_S: Final = 30
"""For a hook that sets no deadline of its own."""
_STDERR_BYTES: Final = 4096


def state(container_id: str, status: str, bundle: str, annotations: Mapping[str, str]) -> dict[str, object]:
    """What a hook reads on its stdin (runtime.md, "State"), without the pid."""
    return {
        "ociVersion": OCI_VERSION,
        "id": container_id,
        "status": status,
        "bundle": bundle,
        "annotations": dict(annotations),
    }


async def run(stage: str, hooks: tuple[Hook, ...], given: Mapping[str, object]) -> None:
    """Run hooks one after the other. Raises CribError for the first that fails, with what it wrote to stderr."""
    for hook in hooks:
        await _run(f"{stage} hook {hook.path}", hook, json.dumps(given).encode())


async def _run(title: str, hook: Hook, stdin: bytes) -> None:
    env = dict(item.partition("=")[::2] for item in hook.env)
    try:
        process = await asyncio.create_subprocess_exec(
            *(hook.args or (hook.path,)),
            executable=hook.path,
            env=env,
            cwd="/",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise CribError(f"{title}: {(error.strerror or str(error)).lower()}") from error
    timeout_s = hook.timeout or TIMEOUT_S
    try:
        async with asyncio.timeout(timeout_s):
            _, errors = await process.communicate(stdin)
    except TimeoutError:
        raise CribError(f"{title}: took longer than {timeout_s} s") from None
    finally:
        _kill(process.pid)
    if process.returncode:
        text = errors[-_STDERR_BYTES:].decode("utf-8", "replace").strip()
        raise CribError(f"{title}: exit code {process.returncode}: {text}")


def _kill(session: int) -> None:
    """End whatever of the hook is left."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        pass

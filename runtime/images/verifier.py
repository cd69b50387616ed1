"""Programs that decide whether an image may be pulled: containerd's image-verifier contract.

Each executable of a directory is run with `-name REFERENCE -digest DIGEST -stdin-media-type TYPE` and the descriptor as
JSON on standard input. Exit status 0 accepts; any other refuses, with the reason on standard output. All must accept;
one that doesn't decide in time refuses. Source: containerd docs/image-verification.md.
"""

import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from runtime.images.errors import SignatureValidationFailed
from runtime.images.manifest import OCI_INDEX, OCI_MANIFEST

log = logging.getLogger(__name__)

_STDIN_TYPE = "application/vnd.oci.descriptor.v1+json"
_REASON_LIMIT = 1 << 10
_POLL_S = 0.02


def verify(
    directory: Path | None,
    timeout_s: float,
    name: str,
    descriptor: tuple[str, str, int],
    check: Callable[[], None],
) -> None:
    """Ask every program of `directory` about the document `descriptor` (media type, digest, size) named `name`.

    A directory that is missing or empty accepts. `check` raises when waiting is to end. Raises
    SignatureValidationFailed.
    """
    if directory is None:
        return
    try:
        programs = sorted(path for path in directory.iterdir() if path.is_file())
    except FileNotFoundError:
        return
    except OSError as error:
        raise SignatureValidationFailed(f"{name}: verifiers in {directory}: {error.strerror}") from error
    kind, digest, size = descriptor
    stdin = json.dumps({"mediaType": kind, "digest": digest, "size": size}).encode()
    for program in programs:
        reason = _refusal(program, timeout_s, name, digest, stdin, check)
        if reason is not None:
            raise SignatureValidationFailed(f"{name}: {program.name} refuses {digest}: {reason}")
        log.info("verifier %s accepts %s as %s", program.name, name, digest)


def media_type(content_type: str, index: bool) -> str:
    """What the descriptor says: the registry's word, or what the document is."""
    return content_type if content_type.startswith("application/vnd.") else OCI_INDEX if index else OCI_MANIFEST


def _refusal(
    program: Path, timeout_s: float, name: str, digest: str, stdin: bytes, check: Callable[[], None]
) -> str | None:
    """None if `program` accepts."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(stdin)
        given.seek(0)
        try:
            process = subprocess.Popen(
                [str(program), "-name", name, "-digest", digest, "-stdin-media-type", _STDIN_TYPE],
                stdin=given,
                stdout=said,
                stderr=subprocess.DEVNULL,
                cwd="/",
                process_group=0,
            )
        except OSError as error:
            return f"it can't be run: {(error.strerror or str(error)).lower()}"
        try:
            status = _wait(process, timeout_s, check)
        finally:
            try:  # also what it left running
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        if status is None:
            return f"no verdict in {timeout_s:g} s"
        reason = os.pread(said.fileno(), _REASON_LIMIT, 0).decode(errors="replace")
        return None if status == 0 else " ".join(reason.split()) or f"exit status {status}"


def _wait(process: subprocess.Popen[bytes], timeout_s: float, check: Callable[[], None]) -> int | None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            check()
    return None

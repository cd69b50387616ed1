"""How a command ended, as the document on the error stream: metav1.Status from version 4 on, else plain text."""

from __future__ import annotations

import json


def success() -> bytes:
    """The command has ended with 0."""
    return _document({"status": "Success"})


def exited(code: int, command: str) -> bytes:
    """The command has ended with another code."""
    return _document(
        {
            "status": "Failure",
            "message": f"command terminated with non-zero exit code: {_error(code, command)}",
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
        }
    )


def failed(why: str) -> bytes:
    """It didn't come to an end that has a code."""
    return _document(
        {
            "status": "Failure",
            "message": f"Internal error occurred: {why}",
            "reason": "InternalError",
            "details": {"causes": [{"message": why}]},
            "code": 500,
        }
    )


def plain(code: int, command: str) -> bytes:
    """As `exited`, for clients before version 4, which take any text as a failure."""
    return _error(code, command).encode()


def _error(code: int, command: str) -> str:
    return f"error executing command in container: {command}: exit code {code}" if command else f"exit code {code}"


def _document(status: dict[str, object]) -> bytes:
    return json.dumps({"metadata": {}, **status}).encode()

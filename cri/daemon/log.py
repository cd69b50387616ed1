"""What cribd writes to standard error: one line per event, key=value or JSON, with the call it belongs to.

The context (rpc, sandbox, container) travels in context variables, so that every line written while a call is served
carries it, those of lower rooms included. Credentials, environment values and stdin are never passed to a logger.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import time
from contextvars import ContextVar
from typing import Final

rpc: ContextVar[str] = ContextVar("rpc", default="")
sandbox: ContextVar[str] = ContextVar("sandbox", default="")
container: ContextVar[str] = ContextVar("container", default="")

_CONTEXT: Final = (("rpc", rpc), ("sandbox", sandbox), ("container", container))
_PATIENCE_MS: Final = 100
_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")
LEVELS: Final = ("debug", "info", "warning", "error")


def bind(*, sandbox_id: str = "", container_id: str = "") -> None:
    """The rest of this task concerns these: their ids go into each of its lines."""
    if sandbox_id:
        sandbox.set(sandbox_id)
    if container_id:
        container.set(container_id)


def setup(level: str, form: str) -> None:
    """Log to standard error from `level` on, in `form` "text" (key=value) or "json"."""
    handler = _StandardError()
    handler.setFormatter(_Json() if form == "json" else _KeyValue())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # What no line says needn't be found out: a third of a line's cost.
    logging._srcfile = None  # the caller, as "Optimization" in the logging HOWTO has it
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(True)
    for noisy in ("asyncio", "urllib3", "grpc"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def fields(record: logging.LogRecord) -> dict[str, object]:
    """`record` as what its line says; `extra={"fields": {…}}` of the logging call adds to it."""
    found: dict[str, object] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "msg": record.getMessage(),
    }
    for key, variable in _CONTEXT:
        if value := variable.get():
            found[key] = value
    found.update(getattr(record, "fields", {}))
    if record.exc_info:
        found["traceback"] = logging.Formatter().formatException(record.exc_info)
    return found


class _StandardError(logging.Handler):
    """Doesn't wait for who reads standard error (a journald that hangs, a full pipe): what finds no room is counted.

    The first such line waits a moment. One of more than 4 KiB may wait for a pipe.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        self._room = select.poll()
        self._room.register(2, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        if not self._room.poll(0 if self._lost else _PATIENCE_MS):
            self._lost += 1
            return
        text = f"{self.format(record)}\n"
        if self._lost:
            words = {"levelname": "WARNING", "msg": f"{self._lost} lines are missing: standard error was not read"}
            text = f"{self.format(logging.makeLogRecord(words))}\n{text}"
            self._lost = 0
        with contextlib.suppress(OSError):  # nobody is there to be told
            os.write(2, text.encode(errors="backslashreplace"))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(fields(record), default=str, ensure_ascii=True)


class _KeyValue(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={_quoted(str(value))}" for key, value in fields(record).items())


def _quoted(value: str) -> str:
    """`value` as it is where it is one plain word, else as a JSON string: a line stays one line whatever is in it."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value)

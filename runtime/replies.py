"""What a monitor's answers mean."""

from collections.abc import Mapping
from typing import Any, Final

from runtime.channel import Reply
from runtime.errors import InvalidSpec, StepFailed, Unavailable, WrongState
from runtime.external import Bundle
from runtime.plan.plan import Plan
from runtime.request import ContainerExit, ContainerFact, LogLoss
from runtime.zygote.messages import Kind

_ESRCH: Final = 3


def container_exit(fields: Mapping[str, Any]) -> ContainerExit:
    """A monitor's record of an end, from a message or from disk. Raises KeyError."""
    names = ("id", "pid", "code", "started_ns", "exited_ns", "oom_killed")
    return ContainerExit(*(fields[name] for name in names))


def checked(reply: Reply) -> dict[str, Any]:
    """The fields of an answer. Raises WrongState, InvalidSpec or Unavailable for FAILED."""
    if reply.kind == Kind.FAILED:
        detail = reply.fields.get("detail", "")
        if reply.fields.get("invalid"):
            raise InvalidSpec(detail)
        raise (WrongState if reply.fields.get("errno") == _ESRCH else Unavailable)(detail)
    return reply.fields


def container_fact(fields: Mapping[str, Any]) -> ContainerFact:
    """What a monitor says of a container. Raises KeyError."""
    exited = container_exit(fields) if fields["exited_ns"] else None
    loss = LogLoss(*fields.get("log_lost", ()))
    return ContainerFact(fields["id"], fields["pid"], fields["started_ns"], exited, loss, fields.get("log_full", False))


def failure(plan: Plan, fields: Mapping[str, Any], external: Bundle | None, command: str) -> Exception:
    """What a FAILED answer to a plan means; `failed` is there when a step failed, -1 for a runtime's command."""
    index, detail, errno = fields.get("failed"), fields.get("detail", ""), fields.get("errno", 0)
    if fields.get("lost"):
        return Unavailable(detail)
    if errno == _ESRCH and index is None:
        return WrongState(detail)
    if external and index == -1:
        said = detail if fields.get("oom") else external.complaint(command, detail)
        return StepFailed(external.title, len(plan), len(plan), errno, said)
    if index is None or not 0 <= index < len(plan):
        return StepFailed("make the process", 0, len(plan), errno, detail)
    failed = StepFailed(plan[index].describe(), index + 1, len(plan), errno, detail)
    return WrongState(f"what it was to join has ended: {failed}") if errno == _ESRCH else failed

"""The signal that stops a container: CRI's enum, an image's text, the kernel's number."""

from __future__ import annotations

import re
import signal

from cri.api import cri_pb2 as pb
from cri.translate.field import show
from runtime.errors import InvalidSpec

# The numbers are the same on x86_64 and aarch64. The C library keeps 32 and 33 for itself: real-time signals
# that a program may use start at 34.
_RTMIN, _RTMAX = 34, 64
_PREFIX = "SIGNAL_"


def _numbers() -> dict[str, int]:
    numbers = {member.name: int(member) for member in signal.Signals if not member.name.startswith("SIGRT")}
    numbers |= {"SIGCLD": signal.SIGCHLD, "SIGIOT": signal.SIGABRT, "SIGPOLL": signal.SIGIO, "SIGSTKFLT": 16}
    numbers |= {"SIGRTMIN": _RTMIN, "SIGRTMAX": _RTMAX}
    numbers |= {f"SIGRTMIN+{n}": _RTMIN + n for n in range(1, 16)}
    numbers |= {f"SIGRTMAX-{n}": _RTMAX - n for n in range(1, 15)}
    return {name: int(number) for name, number in numbers.items()}


_NUMBER = _numbers()


def from_request(value: int) -> int | None:
    """The number of CRI's enum; None for SIGNAL_RUNTIME_DEFAULT."""
    if value == pb.Signal.SIGNAL_RUNTIME_DEFAULT:
        return None
    try:
        name = pb.Signal.Name(value)
    except ValueError:
        raise InvalidSpec(f"stop_signal {value}: not a signal") from None
    text = name.removeprefix(_PREFIX).replace("MINPLUS", "MIN+").replace("MAXMINUS", "MAX-")
    return _NUMBER[text]


def from_image(text: str) -> int | None:
    """The number of an image's StopSignal: "SIGTERM", "term", "15", "SIGRTMIN+3"; None where it is empty."""
    word = text.strip().upper()
    if not word:
        return None
    if re.fullmatch(r"[0-9]{1,2}", word):
        number = int(word)
    else:
        number = _NUMBER.get(word if word.startswith("SIG") else f"SIG{word}", 0)
    if not 1 <= number <= _RTMAX:
        raise InvalidSpec(f"the image's stop signal {show(text)}: not a signal")
    return number


def stop_signal(config: pb.ContainerConfig, image_stop_signal: str) -> int:
    """What StopContainer sends first: the request's signal, else the image's, else SIGTERM."""
    return from_request(config.stop_signal) or from_image(image_stop_signal) or int(signal.SIGTERM)


def to_cri(number: int) -> int:
    """The enum's value for a number, its first name where there are two (SIGCHLD rather than SIGCLD)."""
    for value in pb.Signal.values():
        if value and from_request(value) == number:
            return value
    return pb.Signal.SIGNAL_RUNTIME_DEFAULT

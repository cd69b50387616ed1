"""One list of device rules, made into a policy that the v1 controller and the v2 program both express."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from runtime.errors import InvalidSpec
from runtime.spec import DeviceCgroup

_LETTERS: Final = "rwm"
_MOST_NUMBER: Final = 2**32 - 1

# (type, major, minor, access): major and minor None for every number; access is an ordered part of "rwm".
Exception_ = tuple[str, int | None, int | None, str]


@dataclass(frozen=True, slots=True)
class Policy:
    """All devices are allowed (or denied), but for the exceptions."""

    default_allow: bool = True
    exceptions: tuple[Exception_, ...] = ()

    @property
    def open(self) -> bool:
        """Whether everything is allowed: nothing has to be written."""
        return self.default_allow and not self.exceptions

    def v1_writes(self) -> tuple[tuple[str, str], ...]:
        """(file, line) for a cgroup whose policy may be anything, in this order; one write(2) each."""
        first, then = ("devices.allow", "devices.deny") if self.default_allow else ("devices.deny", "devices.allow")
        return (first, "a"), *((then, v1_line(exception)) for exception in self.exceptions)


@lru_cache(maxsize=32)  # nearly every container has the default rules
def policy(rules: tuple[DeviceCgroup, ...]) -> Policy:
    """What the rules come to, applied in their order to a cgroup that allows everything.

    Raises InvalidSpec for a malformed rule, and for one that cuts a hole into an earlier exception, which neither
    controller can express (allow c 1:*, then deny c 1:3).
    """
    state = _State()
    for rule in rules:
        state.apply(rule)
    return Policy(state.default_allow, tuple((*device, ordered(access)) for device, access in state.exceptions.items()))


def v1_line(exception: Exception_) -> str:
    """An exception as devices.allow, devices.deny and devices.list write it."""
    device_type, major, minor, access = exception
    return f"{device_type} {'*' if major is None else major}:{'*' if minor is None else minor} {access}"


def parse_v1_list(text: str) -> Policy:
    """The policy that devices.list shows. Where everything is allowed but for exceptions, it shows no exceptions."""
    exceptions: list[Exception_] = []
    for line in text.splitlines():
        device_type, numbers, access = line.split()
        if device_type == "a":
            return Policy()
        major, minor = (None if number == "*" else int(number) for number in numbers.split(":"))
        exceptions.append((device_type, major, minor, ordered(access)))
    return Policy(False, tuple(exceptions))


@dataclass(slots=True)
class _State:
    default_allow: bool = True
    exceptions: dict[tuple[str, int | None, int | None], set[str]] = field(default_factory=dict)

    def apply(self, rule: DeviceCgroup) -> None:
        device_type, major, minor, access = _checked(rule)
        if device_type == "a":
            self.default_allow, self.exceptions = rule.allow, {}
            return
        device = device_type, major, minor
        if rule.allow != self.default_allow:
            self._add(device, access)
            return
        # The rule takes back exceptions, or parts of them.
        for other, letters in list(self.exceptions.items()):
            if not letters & access:
                continue
            if _covers(device, other):
                letters -= access
                if not letters:
                    del self.exceptions[other]
            elif _covers(other, device) or _overlap(other, device):
                raise InvalidSpec(
                    f"device rule {'allow' if rule.allow else 'deny'} {v1_line((*device, ordered(access)))} cuts into "
                    f"{v1_line((*other, ordered(letters)))} before it, which no kernel can express"
                )

    def _add(self, device: tuple[str, int | None, int | None], access: set[str]) -> None:
        if any(_covers(other, device) and letters >= access for other, letters in self.exceptions.items()):
            return
        for other, letters in list(self.exceptions.items()):
            if other != device and _covers(device, other) and access >= letters:
                del self.exceptions[other]
        self.exceptions.setdefault(device, set()).update(access)


def _checked(rule: DeviceCgroup) -> tuple[str, int | None, int | None, set[str]]:
    """The rule's parts with wildcards as None; OCI writes them as absent or as -1."""
    if rule.type not in ("a", "b", "c"):
        raise InvalidSpec(f"device rule of type {rule.type!r}: not one of a, b, c")
    access = set(rule.access or _LETTERS)
    if not access <= set(_LETTERS):
        raise InvalidSpec(f"device rule with access {rule.access!r}: not made of r, w, m")
    major, minor = (None if number in (None, -1) else number for number in (rule.major, rule.minor))
    for number in (major, minor):
        if number is not None and not 0 <= number <= _MOST_NUMBER:
            raise InvalidSpec(f"device rule {rule.type} {rule.major}:{rule.minor}: device number out of range")
    if rule.type == "a" and (major, minor, access) != (None, None, set(_LETTERS)):
        raise InvalidSpec(
            f"device rule a {rule.major}:{rule.minor} {rule.access!r}: type a stands for every device and access"
        )
    return rule.type, major, minor, access


def _covers(wide: tuple[str, int | None, int | None], narrow: tuple[str, int | None, int | None]) -> bool:
    return wide[0] == narrow[0] and wide[1] in (None, narrow[1]) and wide[2] in (None, narrow[2])


def _overlap(one: tuple[str, int | None, int | None], other: tuple[str, int | None, int | None]) -> bool:
    return one[0] == other[0] and all(
        None in pair or pair[0] == pair[1] for pair in zip(one[1:], other[1:], strict=True)
    )


def ordered(access: Iterable[str]) -> str:
    """Access letters in the order that the kernel writes them."""
    letters = set(access)
    return "".join(letter for letter in _LETTERS if letter in letters)

"""AppArmor and SELinux: names and labels only; loading and applying them is the engine's."""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass

from cri.api import cri_pb2 as pb
from cri.translate.field import bounded, show
from runtime.errors import InvalidSpec, Unsupported

RuntimeDefault = pb.SecurityProfile.ProfileType.RuntimeDefault
Unconfined = pb.SecurityProfile.ProfileType.Unconfined
Localhost = pb.SecurityProfile.ProfileType.Localhost

_LABEL_PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_LEVEL = re.compile(r"s\d{1,2}(-s\d{1,2})?(:c\d{1,4}([.,]c\d{1,4})*(-s\d{1,2}:c\d{1,4}([.,]c\d{1,4})*)?)?")
_LOCALHOST = "localhost/"
_CATEGORIES = 1024  # c0 to c1023, in every policy with categories: half a million pods


def profile(
    kind: str, current: pb.SecurityProfile | None, deprecated: str, *, unset: pb.SecurityProfile | None = None
) -> pb.SecurityProfile | None:
    """One way to say it out of two: the message wins over the deprecated string; `unset` where neither is there."""
    if current is not None:
        if current.profile_type not in (RuntimeDefault, Unconfined, Localhost):
            raise InvalidSpec(f"{kind}.profile_type {current.profile_type}: not a profile type")
        if current.profile_type == Localhost and not current.localhost_ref:
            raise InvalidSpec(f"{kind}.localhost_ref is missing: profile type Localhost needs it")
        if current.profile_type != Localhost and current.localhost_ref:
            raise InvalidSpec(f"{kind}.localhost_ref {show(current.localhost_ref)}: profile type is not Localhost")
        return current
    if not deprecated:
        return unset
    if deprecated in ("runtime/default", "docker/default"):
        return pb.SecurityProfile(profile_type=RuntimeDefault)
    if deprecated == "unconfined":
        return pb.SecurityProfile(profile_type=Unconfined)
    if deprecated.startswith(_LOCALHOST) and len(deprecated) > len(_LOCALHOST):
        return pb.SecurityProfile(profile_type=Localhost, localhost_ref=deprecated.removeprefix(_LOCALHOST))
    raise InvalidSpec(f"{kind} profile {show(deprecated)}: not runtime/default, unconfined or localhost/NAME")


def apparmor(
    security: pb.LinuxContainerSecurityContext, *, enabled: bool, default: str, loaded: Set[str] | None
) -> str:
    """The profile to change to at execve; "" leaves the process unconfined.

    `default` is what RuntimeDefault means, and what a container gets that asks for nothing, "" for none. `loaded` are
    the kernel's profiles where they are known.
    """
    wanted = profile(
        "apparmor", security.apparmor if security.HasField("apparmor") else None, security.apparmor_profile
    )
    if security.privileged:
        wanted = None if wanted is None or wanted.profile_type == RuntimeDefault else wanted
        default = ""
    name = ""
    if wanted is None or wanted.profile_type == RuntimeDefault:
        return default if enabled else ""
    if wanted.profile_type == Localhost:
        name = bounded("apparmor.localhost_ref", wanted.localhost_ref.removeprefix(_LOCALHOST), 4096)
        if not enabled:
            raise Unsupported(f"apparmor profile {show(name)}: this host has no AppArmor")
        if loaded is not None and name not in loaded:
            raise InvalidSpec(f"apparmor profile {show(name)}: not loaded on this host")
    return name


@dataclass(frozen=True, slots=True)
class Labels:
    """SELinux labels "user:role:type:level" of a container's processes and of its files; "" where it has none."""

    process: str = ""
    file: str = ""


def selinux(
    options: pb.SELinuxOption | None,
    pod: pb.SELinuxOption | None = None,
    *,
    level: str,
    enabled: bool,
    privileged: bool,
    types: tuple[str, str],
) -> Labels:
    """A container's labels: by its own options, else its pod's. `level` is what the pod was given.

    A container that names only a type keeps the pod's level, so that the pod's containers share its volumes. A
    privileged one without options has no label. Raises InvalidSpec for a word that no label can have.
    """
    chosen = options if options is not None else pod or pb.SELinuxOption()
    for each in (chosen, pod or pb.SELinuxOption()):
        _check_label(each)
    if not enabled or (privileged and chosen == pb.SELinuxOption()):
        return Labels()
    whose = chosen.user or "system_u"
    level = chosen.level or (pod.level if pod is not None else "") or level or "s0"
    process = ":".join((whose, chosen.role or "system_r", chosen.type or types[0], level))
    return Labels(process, ":".join((whose, "object_r", types[1], level)))


def _check_label(options: pb.SELinuxOption) -> None:
    for field, value in (("user", options.user), ("role", options.role), ("type", options.type)):
        if value and not _LABEL_PART.fullmatch(value):
            raise InvalidSpec(f"selinux_options.{field} {show(value)}: not a word of a label")
    if options.level and (len(options.level) > 4096 or not _LEVEL.fullmatch(options.level)):
        raise InvalidSpec(f"selinux_options.level {show(options.level)}: not a level like s0:c1,c2")


def new_level(taken: Set[str], pick: Callable[[int], int]) -> str:
    """A level of two categories that no pod has yet; `pick` gives a random number below its argument."""
    while True:
        first, second = sorted((pick(_CATEGORIES), pick(_CATEGORIES)))
        level = f"s0:c{first},c{second}"
        if first != second and level not in taken:
            return level

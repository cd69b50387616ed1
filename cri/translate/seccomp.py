"""Which seccomp profile a container gets, and profiles in Docker's superset of OCI's language.

A rule of a profile file may hold for some capabilities, architectures or kernels only (`includes`, `excludes`), and
`archMap` may name the architectures. Such a profile is resolved to plain OCI for one container here.
"""

from __future__ import annotations

import os.path
from functools import lru_cache
from importlib import resources
from typing import Final

import msgspec

from cri.api import cri_pb2 as pb
from cri.translate.document import decode
from cri.translate.field import PATH_LIMIT_BYTES, bounded, no_backsteps, show
from cri.translate.security import Localhost, RuntimeDefault, Unconfined, profile
from runtime.errors import InvalidSpec
from runtime.spec import Seccomp, SeccompArg, SeccompRule

FILE_LIMIT_BYTES: Final = 1 << 20
_GO_ARCH: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_SCMP_ARCH: Final = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    pass


class Filter(_Part, frozen=True):
    """When a rule holds: `includes` if the container has all of `caps`, `excludes` unless it has; `arches` likewise,
    in Go's words (amd64). `min_kernel` is "5.16"."""

    caps: tuple[str, ...] = ()
    arches: tuple[str, ...] = ()
    min_kernel: str = ""


class Rule(_Part, frozen=True):
    """`name` is an old spelling of a `names` of one."""

    action: str
    names: tuple[str, ...] = ()
    name: str = ""
    errno_ret: int | None = None
    args: tuple[SeccompArg, ...] = ()
    includes: Filter = Filter()
    excludes: Filter = Filter()


class ArchMap(_Part, frozen=True):
    architecture: str
    sub_architectures: tuple[str, ...] = ()


class Profile(_Part, frozen=True):
    default_action: str
    default_errno_ret: int | None = None
    architectures: tuple[str, ...] = ()
    arch_map: tuple[ArchMap, ...] = ()
    flags: tuple[str, ...] = ()
    listener_path: str = ""
    listener_metadata: str = ""
    syscalls: tuple[Rule, ...] = ()


def wanted(security: pb.LinuxContainerSecurityContext, *, default_when_unset: bool) -> pb.SecurityProfile | None:
    """The profile that the request asks for by message or by deprecated string; None is unconfined."""
    unset = pb.SecurityProfile(profile_type=RuntimeDefault) if default_when_unset else None
    current = security.seccomp if security.HasField("seccomp") else None
    found = profile("seccomp", current, security.seccomp_profile_path, unset=unset)
    if security.privileged or found is None or found.profile_type == Unconfined:
        return None
    return found


def localhost_file(security: pb.LinuxContainerSecurityContext) -> str | None:
    """The host's file, of at most FILE_LIMIT_BYTES, that `seccomp` needs the bytes of; None where it needs none."""
    found = wanted(security, default_when_unset=False)
    if found is None or found.profile_type != Localhost:
        return None
    path = no_backsteps(
        "seccomp.localhost_ref", bounded("seccomp.localhost_ref", found.localhost_ref, PATH_LIMIT_BYTES)
    )
    if not os.path.isabs(path):
        raise InvalidSpec(f"seccomp.localhost_ref {show(path)}: not an absolute path")
    return path


def seccomp(
    security: pb.LinuxContainerSecurityContext,
    *,
    file: bytes | None,
    capabilities: tuple[str, ...],
    machine: str,
    kernel: tuple[int, int],
    default_when_unset: bool = False,
) -> Seccomp | None:
    """The OCI profile of a container; None for no filter, which a privileged container always gets.

    A request without a profile is unconfined, as the interface has it, unless configuration says otherwise. `file`
    holds the bytes of `localhost_file`. `capabilities` are the bounding set.

    Raises:
        InvalidSpec: the profile is missing, is not JSON or has fields of a wrong type.
    """
    found = wanted(security, default_when_unset=default_when_unset)
    if found is None:
        return None
    if found.profile_type == RuntimeDefault:
        return default_profile(capabilities, machine, kernel)
    return _localhost(found.localhost_ref, file, capabilities, machine, kernel)


def _localhost(
    path: str, file: bytes | None, capabilities: tuple[str, ...], machine: str, kernel: tuple[int, int]
) -> Seccomp:
    if file is None:
        raise InvalidSpec(f"seccomp profile {show(path)}: no such file")
    if len(file) > FILE_LIMIT_BYTES:
        raise InvalidSpec(f"seccomp profile {show(path)}: longer than {FILE_LIMIT_BYTES} bytes")
    try:
        return resolve(decode(file, Profile), capabilities, machine, kernel)
    except InvalidSpec as error:
        raise InvalidSpec(f"seccomp profile {show(path)}: {error}") from error


@lru_cache(maxsize=1)
def _default() -> Profile:
    return decode(resources.files("cri.translate").joinpath("seccomp_default.json").read_bytes(), Profile)


@lru_cache(maxsize=64)
def default_profile(capabilities: tuple[str, ...], machine: str, kernel: tuple[int, int]) -> Seccomp:
    """RuntimeDefault for a container with this bounding set."""
    return resolve(_default(), capabilities, machine, kernel)


def resolve(given: Profile, capabilities: tuple[str, ...], machine: str, kernel: tuple[int, int]) -> Seccomp:
    """The profile with only those rules that hold for this container."""
    arch = _GO_ARCH.get(machine, machine)
    if given.architectures and given.arch_map:
        raise InvalidSpec("architectures and archMap exclude each other")
    architectures = given.architectures
    for entry in given.arch_map:
        if entry.architecture == _SCMP_ARCH.get(machine):
            architectures = (entry.architecture, *entry.sub_architectures)
    held = frozenset(capabilities)
    rules = []
    for rule in given.syscalls:
        if rule.name and rule.names:
            raise InvalidSpec(f"name {show(rule.name)} and names exclude each other")
        if _holds(rule, held, arch, kernel):
            names = rule.names or ((rule.name,) if rule.name else ())
            rules.append(SeccompRule(names=names, action=rule.action, errno_ret=rule.errno_ret, args=rule.args))
    return Seccomp(
        default_action=given.default_action,
        default_errno_ret=given.default_errno_ret,
        architectures=architectures,
        flags=given.flags,
        listener_path=given.listener_path,
        listener_metadata=given.listener_metadata,
        syscalls=tuple(rules),
    )


def _holds(rule: Rule, capabilities: frozenset[str], arch: str, kernel: tuple[int, int]) -> bool:
    """Docker's reading: `includes.caps` needs all of them, `excludes` refuses on any."""
    includes, excludes = rule.includes, rule.excludes
    if (includes.arches and arch not in includes.arches) or arch in excludes.arches:
        return False
    if not capabilities.issuperset(includes.caps) or not capabilities.isdisjoint(excludes.caps):
        return False
    if includes.min_kernel and kernel < _version(includes.min_kernel):
        return False
    return not (excludes.min_kernel and kernel >= _version(excludes.min_kernel))


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit() and len(text) < 16):
        raise InvalidSpec(f"minKernel {show(text)}: not a version like 5.16")
    return int(major), int(minor)

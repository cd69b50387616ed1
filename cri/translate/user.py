"""Who a container runs as: the request and the image's USER against the image's passwd and group files.

The files come from the image and are hostile: at most FILE_LIMIT_BYTES of them are looked at, bad lines are
skipped, no id beyond 2**31-1 is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cri.api import cri_pb2 as pb
from cri.translate.field import ID_MAX, identity, show
from runtime.errors import InvalidSpec

FILE_LIMIT_BYTES: Final = 4 << 20
"""The longest passwd or group file that is read (CVE-2026-47262: an image's /etc/group of 1 GiB)."""
LINE_LIMIT_BYTES: Final = 64 << 10
GROUPS_LIMIT: Final = 65536  # NGROUPS_MAX
_NAME_LIMIT = 256


@dataclass(frozen=True, slots=True)
class ResolvedUser:
    """`additional_gids` are sorted, without repeats, and hold the primary gid (else a process could shed it:
    CVE-2022-36109). `username` is empty for a uid without an entry."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...] = ()
    username: str = ""
    home: str = "/"


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def needs_files(security: pb.LinuxContainerSecurityContext) -> bool:
    """Whether resolve_user looks at the image's files at all; without it they need not be read."""
    return not (
        security.HasField("run_as_user")
        and security.HasField("run_as_group")
        and security.supplemental_groups_policy == pb.SupplementalGroupsPolicy.Strict
    )


def resolve_user(
    security: pb.LinuxContainerSecurityContext, image_user: str, passwd: bytes | None, group: bytes | None
) -> ResolvedUser:
    """Who `security` asks for, else the image's USER ("user[:group]", names or numbers), else root.

    A run_as_user or run_as_username takes the place of the whole USER, its group included. Without a group the
    primary one comes from passwd, else it is 0. `passwd` and `group` are the files' bytes, None where there is none.

    Raises:
        InvalidSpec: an unknown name, an id out of range, a group without a user, or a file beyond FILE_LIMIT_BYTES.
    """
    if security.HasField("run_as_group") and not (security.HasField("run_as_user") or security.run_as_username):
        raise InvalidSpec(f"run_as_group {security.run_as_group.value}: set without run_as_user or run_as_username")
    if security.HasField("run_as_user") and security.run_as_username:
        name = show(security.run_as_username)
        raise InvalidSpec(f"run_as_username {name}: run_as_user {security.run_as_user.value} is set as well")

    wanted_group = ""
    if security.HasField("run_as_user"):
        account = _by_uid(identity("run_as_user", security.run_as_user.value), passwd)
    elif security.run_as_username:
        account = _by_text("run_as_username", security.run_as_username, passwd)
    else:
        wanted_user, _, wanted_group = image_user.strip().partition(":")
        account = _by_text("the image's user", wanted_user or "0", passwd)

    gid = account.gid
    if security.HasField("run_as_group"):
        gid = identity("run_as_group", security.run_as_group.value)
    elif wanted_group:
        gid = _gid_by_text(wanted_group, group)

    gids = {gid}
    policy = security.supplemental_groups_policy
    if policy == pb.SupplementalGroupsPolicy.Merge:
        # as initgroups does: membership goes by name, so a uid without an account has none
        gids.update(found.gid for found in _groups(group) if account.name and account.name in found.members)
    elif policy != pb.SupplementalGroupsPolicy.Strict:
        raise InvalidSpec(f"supplemental_groups_policy {policy}: neither Merge nor Strict")
    gids.update(identity("supplemental_groups", value) for value in security.supplemental_groups)
    if len(gids) > GROUPS_LIMIT:
        raise InvalidSpec(f"supplemental_groups: {len(gids)} groups, the kernel's limit is {GROUPS_LIMIT}")
    return ResolvedUser(account.uid, gid, tuple(sorted(gids)), account.name, account.home)


def image_identity(image_user: str) -> tuple[int | None, str]:
    """USER of an image config as CRI reports it: a uid, or else a user name that isn't one.

    An image without USER runs as root: uid 0. A number that is no valid uid is returned as a name, so that the
    kubelet's runAsNonRoot refuses it instead of wrapping it round.
    """
    user = image_user.strip().partition(":")[0]
    if not user:
        return 0, ""
    if _is_number(user) and int(user[:20]) <= ID_MAX:
        return int(user), ""
    return None, user


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(field: str, text: str) -> int:
    return identity(field, int(text[:20]))


def _by_uid(uid: int, passwd: bytes | None) -> _Account:
    for account in _accounts(passwd):
        if account.uid == uid:
            return account
    return _Account("", uid, 0, "/")


def _by_text(field: str, text: str, passwd: bytes | None) -> _Account:
    if _is_number(text):
        return _by_uid(_number(field, text), passwd)
    if len(text) > _NAME_LIMIT:
        raise InvalidSpec(f"{field} {show(text)}: longer than {_NAME_LIMIT} characters")
    for account in _accounts(passwd):
        if account.name == text:
            return account
    raise InvalidSpec(f"{field} {show(text)}: no such user in the image's /etc/passwd")


def _gid_by_text(text: str, group: bytes | None) -> int:
    if _is_number(text):
        return _number("the image's group", text)
    for found in _groups(group):
        if found.name == text:
            return found.gid
    raise InvalidSpec(f"the image's group {show(text)}: no such group in the image's /etc/group")


def _accounts(passwd: bytes | None) -> Iterator[_Account]:
    """name:password:uid:gid:gecos:home:shell, see passwd(5)."""
    for fields in _lines("/etc/passwd", passwd):
        if len(fields) < 6:
            continue
        name, uid, gid, home = fields[0], _id(fields[2]), _id(fields[3]), fields[5]
        if name and uid is not None and gid is not None:
            yield _Account(name, uid, gid, home if home.startswith("/") else "/")


def _groups(group: bytes | None) -> Iterator[_Group]:
    """name:password:gid:member,member, see group(5)."""
    for fields in _lines("/etc/group", group):
        if len(fields) < 4:
            continue
        gid = _id(fields[2])
        if fields[0] and gid is not None:
            yield _Group(fields[0], gid, tuple(member.strip() for member in fields[3].split(",")))


def _id(text: str) -> int | None:
    return int(text) if _is_number(text) and len(text) <= 10 and int(text) <= ID_MAX else None


def _lines(path: str, content: bytes | None) -> Iterator[list[str]]:
    if content is None:
        return
    if len(content) > FILE_LIMIT_BYTES:
        raise InvalidSpec(f"{path} of the image: longer than {FILE_LIMIT_BYTES} bytes")
    start = 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        line = content[start : min(end, start + LINE_LIMIT_BYTES + 1)].strip()
        start = end + 1
        if not line or line.startswith(b"#") or len(line) > LINE_LIMIT_BYTES or b"\0" in line:
            continue
        yield line.decode("utf-8", "replace").split(":")

"""Who a container runs as."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.api import cri_pb2 as pb
from cri.translate import ResolvedUser, resolve_user
from cri.translate.user import FILE_LIMIT_BYTES, image_identity, needs_files
from runtime.errors import InvalidSpec

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# a comment
broken line
app:x:1000:1001:App:/srv/app:/bin/sh
huge:x:4294967296:1:Overflow:/:/bin/sh
relative:x:5:5:::
short:x:6
"""
GROUP = b"""root:x:0:
app:x:1001:
wheel:x:10:root,app
audio:x:63: app ,other
huge:x:4294967295:app
bad:x:y:app
"""
STRICT = pb.SupplementalGroupsPolicy.Strict


def context(**fields: Any) -> pb.LinuxContainerSecurityContext:
    numbers: dict[str, Any] = {
        key: pb.Int64Value(value=value) if key in ("run_as_user", "run_as_group") else value
        for key, value in fields.items()
    }
    return pb.LinuxContainerSecurityContext(**numbers)


@pytest.mark.parametrize(
    ("asked", "image_user", "expected"),
    [
        (context(), "", ResolvedUser(0, 0, (0, 10), "root", "/root")),
        (context(), "app", ResolvedUser(1000, 1001, (10, 63, 1001), "app", "/srv/app")),
        (context(), "1000", ResolvedUser(1000, 1001, (10, 63, 1001), "app", "/srv/app")),
        (context(), "app:wheel", ResolvedUser(1000, 10, (10, 63), "app", "/srv/app")),
        (context(), "app:44", ResolvedUser(1000, 44, (10, 44, 63), "app", "/srv/app")),
        (context(), ":44", ResolvedUser(0, 44, (10, 44), "root", "/root")),
        (context(), "77", ResolvedUser(77, 0, (0,), "", "/")),
        (context(), "relative", ResolvedUser(5, 5, (5,), "relative", "/")),
        (context(run_as_user=1000), "app:wheel", ResolvedUser(1000, 1001, (10, 63, 1001), "app", "/srv/app")),
        (context(run_as_user=77), "app", ResolvedUser(77, 0, (0,), "", "/")),
        (context(run_as_username="app"), "", ResolvedUser(1000, 1001, (10, 63, 1001), "app", "/srv/app")),
        (context(run_as_user=77, run_as_group=78), "", ResolvedUser(77, 78, (78,), "", "/")),
        (context(run_as_username="app", run_as_group=0), "", ResolvedUser(1000, 0, (0, 10, 63), "app", "/srv/app")),
        (
            context(run_as_user=1000, supplemental_groups=[5, 5, 3]),
            "",
            ResolvedUser(1000, 1001, (3, 5, 10, 63, 1001), "app", "/srv/app"),
        ),
        (
            context(run_as_user=1000, supplemental_groups=[5], supplemental_groups_policy=STRICT),
            "",
            ResolvedUser(1000, 1001, (5, 1001), "app", "/srv/app"),
        ),
    ],
)
def test_resolved(asked: pb.LinuxContainerSecurityContext, image_user: str, expected: ResolvedUser) -> None:
    assert resolve_user(asked, image_user, PASSWD, GROUP) == expected


@pytest.mark.parametrize(
    ("asked", "image_user", "said"),
    [
        (context(run_as_group=5), "app", "run_as_group 5: set without run_as_user"),
        (context(run_as_user=-1), "", "run_as_user -1"),
        (context(run_as_user=1 << 31), "", "run_as_user 2147483648"),
        (context(run_as_user=0, run_as_group=1 << 31), "", "run_as_group 2147483648"),
        (context(supplemental_groups=[-3]), "", "supplemental_groups -3"),
        (context(supplemental_groups_policy=7), "", "supplemental_groups_policy 7"),
        (context(run_as_username="nobody"), "", "run_as_username 'nobody': no such user"),
        (context(), "nobody", "the image's user 'nobody': no such user"),
        (context(), "huge", "the image's user 'huge': no such user"),
        (context(), "2147483648", "the image's user 2147483648"),
        (context(), "9" * 400, "the image's user 9999"),
        (context(), "app:nogroup", "the image's group 'nogroup': no such group"),
        (context(), "app:huge", "the image's group 'huge': no such group"),
        (context(), "app:4294967296", "the image's group 4294967296"),
        (context(), "x" * 300, "longer than 256"),
    ],
)
def test_refused(asked: pb.LinuxContainerSecurityContext, image_user: str, said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        resolve_user(asked, image_user, PASSWD, GROUP)
    assert said in str(error.value)
    assert len(str(error.value)) < 300


def test_without_files() -> None:
    assert resolve_user(context(), "", None, None) == ResolvedUser(0, 0, (0,), "", "/")
    with pytest.raises(InvalidSpec, match="no such user"):
        resolve_user(context(), "app", None, None)


def test_a_file_beyond_the_limit_is_not_parsed() -> None:
    with pytest.raises(InvalidSpec, match="/etc/passwd of the image: longer than"):
        resolve_user(context(), "app", b"x" * (FILE_LIMIT_BYTES + 1), None)
    with pytest.raises(InvalidSpec, match="/etc/group of the image: longer than"):
        resolve_user(context(), "app", PASSWD, b"x" * (FILE_LIMIT_BYTES + 1))


def test_a_line_beyond_the_limit_is_skipped() -> None:
    long = b"long:x:1:1:" + b"g" * (64 << 10) + b":/:/bin/sh\n"
    assert resolve_user(context(), "app", long + PASSWD, None).uid == 1000
    with pytest.raises(InvalidSpec, match="no such user"):
        resolve_user(context(), "long", long + PASSWD, None)


def test_the_files_are_needed_unless_all_is_given() -> None:
    assert needs_files(context())
    assert needs_files(context(run_as_user=1, run_as_group=1))
    assert not needs_files(context(run_as_user=1, run_as_group=1, supplemental_groups_policy=STRICT))


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (0, "")),
        ("0", (0, "")),
        ("1002:5", (1002, "")),
        ("www-data:x", (None, "www-data")),
        ("2147483647", (2147483647, "")),
        ("2147483648", (None, "2147483648")),
        ("4294967296", (None, "4294967296")),
        ("٣", (None, "٣")),
    ],
)
def test_as_an_image_reports_it(user: str, expected: tuple[int | None, str]) -> None:
    assert image_identity(user) == expected


names = st.text(st.characters(codec="utf-8"), max_size=12)
files = st.one_of(
    st.none(),
    st.binary(max_size=400),
    st.lists(st.lists(names | st.integers(-1, 1 << 33).map(str), max_size=8).map(":".join), max_size=8).map(
        lambda lines: "\n".join(lines).encode()
    ),
)


@given(names | st.integers(-1, 1 << 33).map(str), files, files, st.integers(-1, 1 << 32) | st.none())
def test_whatever_the_files_hold_an_id_is_valid_or_refused(
    user: str, passwd: bytes | None, group: bytes | None, uid: int | None
) -> None:
    asked = context() if uid is None else context(run_as_user=uid)
    try:
        found = resolve_user(asked, user, passwd, group)
    except InvalidSpec:
        return
    assert all(0 <= number < 1 << 31 for number in (found.uid, found.gid, *found.additional_gids))
    assert found.gid in found.additional_gids
    assert list(found.additional_gids) == sorted(set(found.additional_gids))
    assert found.home.startswith("/")

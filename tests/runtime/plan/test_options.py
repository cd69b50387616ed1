"""OCI mount options to flags, attributes and data."""

from __future__ import annotations

import pytest

from runtime.linux.mount import MS, MountAttr
from runtime.plan.options import Options, parse


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), Options()),
        (("nosuid", "mode=755", "size=64k"), Options(flags=MS.NOSUID, set_=MountAttr.NOSUID, data="mode=755,size=64k")),
        (("ro", "rw"), Options(clear=MountAttr.RDONLY)),
        (("rbind", "ro"), Options(bind=True, recursive=True, flags=MS.RDONLY, set_=MountAttr.RDONLY)),
        (("bind", "rro"), Options(bind=True, flags=MS.RDONLY, recursive_set=MountAttr.RDONLY)),
        (("rbind", "rslave"), Options(bind=True, recursive=True, propagation=MS.SLAVE)),
        (("relatime",), Options(flags=MS.RELATIME, clear=MountAttr.ATIME_MASK)),
        (
            ("noatime", "strictatime"),
            Options(flags=MS.STRICTATIME, set_=MountAttr.STRICTATIME, clear=MountAttr.ATIME_MASK),
        ),
        (("rnoexec",), Options(flags=MS.NOEXEC, recursive_set=MountAttr.NOEXEC)),
        (("x-crib.mkdir", "bind"), Options(bind=True, make_source=True)),
    ],
)
def test_options(options: tuple[str, ...], expected: Options) -> None:
    assert parse(options) == expected

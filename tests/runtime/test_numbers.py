"""Tables by machine against a second source: libseccomp's, for both machines wherever the tests run."""

from __future__ import annotations

import pytest

from runtime.linux import caps, lib, libseccomp
from runtime.seccomp import NEWER_CALLS, newer
from tests.requires import requires

pytestmark = requires("seccomp")
TOKENS = {"x86_64": libseccomp.X86_64, "aarch64": libseccomp.AARCH64}


@pytest.mark.parametrize("machine", TOKENS)
def test_the_numbers_of_system_calls(machine: str) -> None:
    table = lib.numbers(machine)
    assert {name: libseccomp.number_on(TOKENS[machine], name) for name in table} == table
    assert table.keys() == lib.numbers(next(other for other in TOKENS if other != machine)).keys()


@pytest.mark.parametrize("machine", TOKENS)
def test_the_numbers_of_newer_calls_agree_where_libseccomp_knows_them(machine: str) -> None:
    token = TOKENS[machine]
    for name in NEWER_CALLS:
        known = libseccomp.number_on(token, name)
        assert known in (None, newer(token, name)), name


def test_an_unknown_machine_has_no_table() -> None:
    with pytest.raises(KeyError):
        lib.numbers("vax")


def test_the_capabilities_names_are_in_the_kernels_order() -> None:
    assert len(caps.NAMES) == len(set(caps.NAMES)) == 41
    assert caps.NUMBERS["CAP_CHOWN"] == 0
    assert caps.NUMBERS["CAP_SYS_ADMIN"] == 21
    assert caps.NUMBERS["CAP_CHECKPOINT_RESTORE"] == 40

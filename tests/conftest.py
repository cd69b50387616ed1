"""What every test runs under: the enclosure, the requirements, and the search for what a root test leaves."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import enclosure, leaks, requires

# An example's time on a machine that does other things says nothing: a limit on it fails tests of what is right.
settings.register_profile("crib", deadline=None)
settings.load_profile("crib")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(*names): set by tests.requires.requires")
    requires.promised()
    # What nohup or a shell's & ignores, the programs under test would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    if os.geteuid() == 0 and not config.option.collectonly:
        enclosure.enter()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "root" in _requirements(item):
            item.add_marker(pytest.mark.root)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    requires.need(*_requirements(item))


def _requirements(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("requires") for name in mark.args]


@pytest.fixture(scope="session", autouse=True)
def _machine_is_left_as_it_was() -> Iterator[None]:
    """Set up before and torn down after every other fixture."""
    if enclosure.refusal():
        yield
        return
    before = leaks.Machine.now()
    yield
    if left := leaks.left_since(before):
        pytest.fail("left behind by the session:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def _test_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fixtures of a wider scope were set up before, and don't count."""
    if request.node.get_closest_marker("root") is None or enclosure.refusal():
        yield
        return
    before = leaks.Machine.now()
    yield
    if left := leaks.left_since(before):
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


_numbers = itertools.count(1)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A directory with a path short enough for sockets below it, removed afterwards."""
    path = Path(f"/run/crib-test-{os.getpid()}-{next(_numbers)}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)

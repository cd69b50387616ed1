"""hack/vm run: a command's output and status, the shared directory, and that nothing outlives it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from tests.requires import requires

pytestmark = [requires("root", "vm"), pytest.mark.timeout(300)]


def run(vm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([vm, "run", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("init", ["--systemd", "--no-systemd"])
def test_output_and_status(vm: str, init: str) -> None:
    done = run(vm, init, "echo out; echo err >&2; id -u; cat /proc/1/comm; exit 7")
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["out", "err", "0", "systemd" if init == "--systemd" else "sh"]


def test_words_are_passed_as_they_are(vm: str) -> None:
    done = run(vm, "--no-systemd", "printf", "%s|", "a b", "$HOME", "'")
    assert done.stdout == "a b|$HOME|'|"


def test_shared_directory(vm: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("in")
    other = tmp_path / "other"
    other.mkdir()
    done = run(vm, "--no-systemd", "--dir", str(tmp_path), "--dir", str(other), f"pwd; cat in >out; touch {other}/file")
    assert done.stdout.strip() == str(tmp_path)
    assert (tmp_path / "out").read_text() == "in"
    assert (other / "file").exists()


def test_tests_write_to_a_disk_of_the_guest(vm: str) -> None:
    """With the extended attributes of overlays, which a shared directory hasn't."""
    code = "import os, tempfile; os.setxattr(tempfile.mkdtemp(), 'trusted.a', b'')"
    done = run(vm, "--no-systemd", f'python -c "{code}" && stat -fc %T $TMPDIR')
    assert done.stdout == "ext2/ext3\n", done.stdout


def test_project_is_installed(vm: str) -> None:
    code = "import cri, runtime, net, importlib.metadata as m; print(m.version('crib'))"
    done = run(vm, "--no-systemd", f'cd / && python -P -c "{code}" && command -v cribd crib')
    assert done.returncode == 0, done.stdout
    assert done.stdout.split()[1:] == ["/opt/crib/bin/cribd", "/opt/crib/bin/crib"]


def test_time_limit(vm: str) -> None:
    done = run(vm, "--no-systemd", "--timeout", "3", "sleep 300")
    assert done.returncode == 124
    assert "did not finish in 3 s" in done.stderr


@pytest.mark.parametrize("init", ["--systemd", "--no-systemd"])
def test_command_that_ends_its_machine(vm: str, init: str) -> None:
    done = run(vm, init, "kill -KILL $PPID; sleep 300")
    assert done.returncode == 125
    assert "the machine ended before the command did" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_it(vm: str, number: signal.Signals) -> None:
    """The root fixture finds a process that is left; here: what it has of the host's memory and disk."""
    with subprocess.Popen([vm, "run", "--no-systemd", "echo up; sleep 300"], stdout=subprocess.PIPE) as running:
        assert running.stdout
        try:
            assert running.stdout.readline() == b"up\n"
            assert len(scratch_of(running.pid)) == 2
        finally:
            running.send_signal(number)
        # What cleans up has its standard output too: the end of the pipe is the end of that.
        assert select.select([running.stdout], [], [], 30)[0]
        assert running.stdout.read() == b""
    assert not scratch_of(running.pid)


def scratch_of(pid: int) -> list[Path]:
    cache = Path(os.environ.get("CRIB_VM_DIR", "/var/tmp/crib-vm"))
    return [path for top in (Path("/dev/shm"), cache / "run") for path in top.glob(f"vm.{pid}.*")]


def test_it_does_not_recurse(vm: str) -> None:
    done = run(vm, "--no-systemd", "hack/vm run true")
    assert done.returncode == 125
    assert "this is the test machine already" in done.stdout

"""The `crib` command against cribd, and against the fake of it that the other tests use."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cri.cli.conftest import LIMIT_S, Crib
from tests.cri.cli.fake import IMAGE, Fake
from tests.cri.real.daemon import REPOSITORY, Daemon
from tests.requires import need, requires

Start = Callable[..., str]


REAL = pytest.param("cribd", marks=requires("root", "bridge", "busybox", "overlay", "seccomp"))


@pytest.fixture(scope="module", params=["fake", REAL])
def endpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cribd that has the image, or the fake of one."""
    if request.param == "fake":
        server = Fake(tmp_path_factory.mktemp("fake") / "s")
        yield server.endpoint
        server.close()
        return
    need("root", "busybox")
    directory = Path(f"/run/crib-test-{os.getpid()}-cli")
    directory.mkdir(mode=0o700)
    daemon = Daemon(directory)
    daemon.start()
    archive = tmp_path_factory.mktemp("image") / "busybox.tar"
    subprocess.run([sys.executable, REPOSITORY / "hack/busybox-image", archive, "--name", IMAGE], check=True)
    Crib(daemon.listen, directory)("load", str(archive))
    yield daemon.listen
    assert daemon.stop() == 0, daemon.log()
    shutil.rmtree(directory)


@pytest.fixture
def crib(endpoint: str, tmp_path: Path) -> Iterator[Crib]:
    crib = Crib(endpoint, tmp_path / "logs")
    yield crib
    if crib.json("pods"):
        crib("rm", "-f", "--all")


def test_run_prints_both_streams_and_ends_with_the_containers_code(crib: Crib) -> None:
    done = crib.full("run", "--name", "t", IMAGE, "sh", "-c", "echo out; echo err >&2; printf end; exit 7", code=7)
    assert (done.stdout, done.stderr) == (b"out\nend", b"err\n")


def test_run_keeps_the_stopped_pod_for_a_look_but_not_its_address(crib: Crib) -> None:
    crib("run", "--name", "t", IMAGE, "true")
    [pod] = crib.json("pods")
    assert (pod["name"], pod["state"], pod["addresses"]) == ("t", "not-ready", [])
    [container] = crib.json("ps", "-a")
    assert (container["name"], container["state"], container["exit_code"]) == ("t", "exited", 0)
    assert crib.json("ps") == []


def test_run_rm_leaves_nothing(crib: Crib) -> None:
    crib("run", "--rm", IMAGE, "sh", "-c", "exit 3", code=3)
    assert crib.json("pods") == []
    assert os.listdir(crib.log_dir) == []


def test_run_detached_prints_the_id_alone(crib: Crib, running: Start) -> None:
    identifier = running("web")
    assert [row["id"] for row in crib.json("ps")] == [identifier]


def test_run_passes_options_after_the_image_on(crib: Crib) -> None:
    assert crib("run", IMAGE, "echo", "-o", "json", "--rm") == "-o json --rm\n"


def test_run_that_fails_leaves_nothing(crib: Crib) -> None:
    error = crib.error("run", IMAGE, "/no/such/program", code=1)
    assert error.startswith("crib: step ") and "/no/such/program" in error and "no such file" in error
    assert crib.json("pods") == []


def test_run_refuses_a_name_that_is_taken(crib: Crib, running: Start) -> None:
    identifier = running("web")
    error = crib.error("run", "--name", "web", IMAGE, "true", code=1)
    assert "there is a pod web already" in error and "crib rm -f web" in error
    assert [row["id"] for row in crib.json("ps")] == [identifier]


def test_run_json_collects_the_output(crib: Crib) -> None:
    script = "echo out; echo err >&2; exit 2"
    told = json.loads(crib("run", "--name", "t", "-o", "json", IMAGE, "sh", "-c", script, code=2))
    assert told.keys() == {"id", "name", "pod_id", "exit_code", "reason", "stdout", "stderr"}
    assert (told["exit_code"], told["reason"], told["stdout"], told["stderr"]) == (2, "Error", "out\n", "err\n")


def test_run_interrupted_stops_the_container_and_tells_its_last_words(crib: Crib) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done"
    with crib.popen("run", "--rm", IMAGE, "sh", "-c", script) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"bye\n"
        assert process.wait(LIMIT_S) == 5
    assert crib.json("pods") == []


def test_run_interrupted_twice_kills_the_container(crib: Crib) -> None:
    script = "trap 'echo no' TERM; echo up; while :; do sleep 0.05; done"
    with crib.popen("run", "--rm", IMAGE, "sh", "-c", script) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"no\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 137
    assert crib.json("pods") == []


def test_tables_without_a_terminal_are_plain_columns(crib: Crib, running: Start) -> None:
    identifier = running("web")
    titles, line = crib("ps").splitlines()
    assert titles.split() == ["CONTAINER", "NAME", "POD", "IMAGE", "STATE", "CREATED"]
    assert line.split()[:5] == [identifier[:12], "web", "web", IMAGE, "running"]
    titles, line = crib("pods").splitlines()
    assert line.split()[1:4] == ["web", "default", "ready"]
    assert ipaddress.ip_address(line.split()[4]).is_private
    assert crib("ps", "-q") == f"{identifier}\n"


def test_json_of_lists_keeps_its_shape(crib: Crib, running: Start) -> None:
    running("web")
    [container], [pod], [image] = crib.json("ps"), crib.json("pods"), crib.json("images")
    assert container.keys() == {
        "id", "name", "attempt", "pod_id", "pod", "namespace", "image", "image_id", "state", "exit_code", "reason",
        "created_ns", "labels",
    }  # fmt: skip
    assert pod.keys() == {
        "id", "name", "namespace", "uid", "attempt", "state", "network", "addresses", "containers", "created_ns",
        "labels",
    }  # fmt: skip
    assert image.keys() == {"id", "tags", "digests", "size_bytes", "pinned"}


def test_a_name_an_id_and_a_prefix_mean_the_same(crib: Crib, running: Start) -> None:
    identifier = running("web")
    pod_id = crib.json("pods")[0]["id"]
    for given in ("web", "web/web", "default/web/web", identifier, identifier[:8]):
        assert crib.json("inspect", given)[0]["status"]["id"] == identifier
    for given in ("default/web", pod_id, pod_id[:8]):
        assert crib.json("inspect", given)[0]["status"]["id"] == pod_id
    assert crib("exec", "--timeout", "60", pod_id, "echo", "in") == "in\n"


def test_logs_are_the_containers_own_bytes(crib: Crib, running: Start) -> None:
    identifier = running("t", r"echo a; echo b; echo err >&2; printf '\377partial'")
    assert crib.full("logs", "-f", identifier).stdout == b"a\nb\n\xffpartial"
    assert crib.full("logs", "-f", identifier).stderr == b"err\n"
    running("u", "echo a; echo b")
    crib("logs", "-f", "u")
    time, _, text = crib("logs", "-t", "--tail", "1", "u").partition(" ")
    assert (text, len(time)) == ("b\n", len("2026-11-22T10:00:00.000000000Z"))
    [first, second] = [json.loads(line) for line in crib("logs", "-o", "json", "u").splitlines()]
    assert first | {"time": ""} == {"time": "", "stream": "stdout", "partial": False, "log": "a\n"}
    assert first["time"] <= second["time"]


def test_logs_follow_until_the_end(crib: Crib, running: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = f"echo first; read line <{gate}; echo $line; exit 1"
    running("t", script, "-v", f"{tmp_path}:{tmp_path}")
    with crib.popen("logs", "-f", "t") as process:
        assert process.stdout is not None and process.stdout.readline() == b"first\n"
        gate.write_text("second\n")
        assert process.stdout.read() == b"second\n"
        assert process.wait(LIMIT_S) == 0


def test_exec_passes_everything_through(crib: Crib, running: Start) -> None:
    running("web")
    done = crib.full("exec", "--timeout", "60", "web", "sh", "-c", "echo out; echo err >&2; exit 42", code=42)
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")
    assert crib("exec", "-o", "json", "web", "echo", "x").split() == [
        "{", '"exit_code":', "0,", '"stdout":', '"x\\n",', '"stderr":', '""', "}",
    ]  # fmt: skip
    assert "timed out after 1 s" in crib.error("exec", "--timeout", "1", "web", "sleep", "100", code=1)


def test_exec_in_a_container_that_has_ended(crib: Crib) -> None:
    crib("run", "--name", "t", IMAGE, "true")
    assert "is not running" in crib.error("exec", "--timeout", "60", "t", "true", code=1)


def test_stop_and_rm_of_what_run_made(crib: Crib, running: Start) -> None:
    running("web", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    with crib.popen("logs", "-f", "web") as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.terminate()
    assert "is running: crib stop it, or crib rm -f" in crib.error("rm", "web", code=1)
    assert crib("stop", "web") == "web\n"
    assert crib.json("pods")[0]["state"] == "not-ready"
    [container] = crib.json("ps", "-a")
    assert (container["state"], container["exit_code"], container["reason"]) == ("exited", 5, "Error")
    assert crib("stop", "web") == "web\n"
    assert crib("rm", "web") == "web\n"
    assert crib.json("pods") == [] and os.listdir(crib.log_dir) == []


def test_rm_of_many_goes_on_after_a_failure(crib: Crib, running: Start) -> None:
    running("a")
    running("b")
    done = crib.full("rm", "-f", "a", "nosuch", "b", code=3)
    assert done.stdout == b"a\nb\n" and b"no container or pod 'nosuch'" in done.stderr
    assert crib.json("pods") == []


def test_rm_all(crib: Crib, running: Start) -> None:
    running("a")
    running("b")
    assert sorted(crib("rm", "-f", "--all").split()) == ["a", "b"]
    assert crib.json("pods") == []
    crib("rm", code=2)


def test_unknown_things_are_exit_code_3(crib: Crib) -> None:
    for command in (["logs"], ["inspect"], ["stop"], ["rm"], ["plan"], ["rmi"]):
        assert "nosuch" in crib.error(*command, "nosuch", code=3)
    assert "nosuch" in crib.error("exec", "nosuch", "true", code=3)


def test_inspect(crib: Crib, running: Start) -> None:
    identifier = running("web", "exec sleep 1000", "-e", "TOKEN=hunter2")
    assert "hunter2" not in crib("inspect", "web", "default/web")
    container, pod, image = crib.json("inspect", "web", "default/web", IMAGE)
    assert [thing["kind"] for thing in (container, pod, image)] == ["container", "pod", "image"]
    assert container["status"]["id"] == identifier and container["info"]["pid"] > 0
    environment = dict(entry.split("=") for entry in container["info"]["runtimeSpec"]["process"]["env"])
    assert environment["TOKEN"] == "<redacted>"
    assert [status["status"]["id"] for status in (pod, image)] == [
        crib.json("pods")[0]["id"],
        crib.json("images")[0]["id"],
    ]


def test_plan_tells_what_the_start_cost(crib: Crib, running: Start) -> None:
    running("web")
    for plan in crib.json("plan", "web", "default/web"):
        assert plan["name"] == "web" and plan["steps"] and plan["total_ns"] > 0
        assert [step["index"] for step in plan["steps"]] == list(range(1, len(plan["steps"]) + 1))
        assert not any(step["error"] for step in plan["steps"])


def test_doctor_says_that_all_is_well(crib: Crib) -> None:
    told = crib.json("doctor")
    assert told["ok"] and {condition["name"] for condition in told["conditions"]} == {"RuntimeReady", "NetworkReady"}
    assert told["probes"]


def test_images(crib: Crib) -> None:
    [image] = crib.json("images")
    assert image["tags"] == [IMAGE] and image["size_bytes"] > 0
    assert crib("images", "-q").strip() == image["id"]

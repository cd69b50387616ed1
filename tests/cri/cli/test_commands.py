"""The `crib` command against the fake: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from cri.api import cri_pb2 as pb
from tests.cri.cli.conftest import LIMIT_S, Crib
from tests.cri.cli.fake import IMAGE, LAYERS, REMOTE, Fake

Start = Callable[..., str]


def requests_of(fake: Fake, method: str) -> list[object]:
    return [request for name, request in fake.requests if name == method]


# ---- run ---------------------------------------------------------------------------------------------------------


def test_run_asks_for_what_a_kubelet_asks_for(fake: Fake, crib: Crib, tmp_path: Path) -> None:
    crib(
        "run", "--name", "t", "--net", "host", "-e", "A=b=c", "-e", "HOME", "-v", f"{tmp_path}:/data:ro,rslave",
        "-m", "64Mi", "--cpus", "0.5", "-u", "1000:100", "-w", "/tmp", "--read-only", "-l", "x=y",
        "-p", "8080:80", "-p", "[::1]:5353:53/udp", IMAGE, "true",
    )  # fmt: skip
    [request] = requests_of(fake, "CreateContainer")
    assert isinstance(request, pb.CreateContainerRequest)
    config, pod = request.config, request.sandbox_config
    assert {one.key: one.value for one in config.envs} == {"A": b"b=c", "HOME": os.environ["HOME"].encode()}
    mount = pb.Mount(
        host_path=str(tmp_path), container_path="/data", readonly=True, propagation=pb.PROPAGATION_HOST_TO_CONTAINER
    )
    assert list(config.mounts) == [mount]
    assert config.linux.resources.memory_limit_in_bytes == 64 << 20
    assert (config.linux.resources.cpu_quota, config.linux.resources.cpu_period) == (50_000, 100_000)
    context = config.linux.security_context
    assert (context.run_as_user.value, context.run_as_group.value) == (1000, 100)
    assert context.readonly_rootfs and context.HasField("seccomp") and "/proc/kcore" in context.masked_paths
    assert (config.working_dir, list(config.args), list(config.command)) == ("/tmp", ["true"], [])
    assert config.image.image.startswith("sha256:") and config.image.user_specified_image == IMAGE
    assert pod.linux.security_context.namespace_options.network == pb.NODE and not pod.hostname
    assert pod.labels["x"] == "y"
    assert list(pod.port_mappings) == [
        pb.PortMapping(host_port=8080, container_port=80),
        pb.PortMapping(protocol=pb.UDP, host_ip="::1", host_port=5353, container_port=53),
    ]


def test_run_fetches_a_missing_image(fake: Fake, crib: Crib) -> None:
    done = crib.full("run", REMOTE, "echo", "hello")
    assert done.stdout == b"hello\n"
    assert len(requests_of(fake, "Pull")) == 1
    crib("run", REMOTE, "true")
    assert len(requests_of(fake, "Pull")) == 1
    assert "no image 'nosuch'" in crib.error("run", "--pull", "never", "nosuch", "true", code=3)


# ---- lists and names ---------------------------------------------------------------------------------------------


def test_table_on_a_terminal(crib: Crib, running: Start) -> None:
    running("web")
    shown = crib.on_terminal("ps")
    assert "\x1b[" in shown and "web" in shown and "running" in shown
    assert IMAGE in crib.on_terminal("ps", columns=40), "what commands are given is whole on any terminal"


def test_what_fits_several_is_refused(crib: Crib, fake: Fake, running: Start) -> None:
    running("web")
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="other", uid="u", namespace="n"))
    pod_id = fake.on_RunPodSandbox(pb.RunPodSandboxRequest(config=config)).pod_sandbox_id
    for name in ("web", "side"):
        request = pb.CreateContainerRequest(
            pod_sandbox_id=pod_id,
            config=pb.ContainerConfig(metadata=pb.ContainerMetadata(name=name), image=pb.ImageSpec(image=IMAGE)),
        )
        fake.on_CreateContainer(request)
    error = crib.error("inspect", "web", code=1)
    assert "'web' fits 2" in error and "container other/web" in error and "container web/web" in error
    assert crib.json("inspect", "other/web")[0]["status"]["state"] == "CONTAINER_CREATED"
    assert "pod other has 2 containers: say which (side, web)" in crib.error("logs", "other", code=1)


# ---- logs, exec, inspect -----------------------------------------------------------------------------------------


# ---- stop and rm -------------------------------------------------------------------------------------------------


def test_rm_never_touches_logs_that_run_did_not_choose(crib: Crib, fake: Fake, tmp_path: Path) -> None:
    uid = "0" * 32
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="p", uid=uid, namespace="n"),
        log_directory=str(tmp_path),
        labels={"crib/run": "p"},
    )
    pod_id = fake.on_RunPodSandbox(pb.RunPodSandboxRequest(config=config)).pod_sandbox_id
    container = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="c"), image=pb.ImageSpec(image=IMAGE), args=["true"], log_path="c.log"
    )
    answer = fake.on_CreateContainer(pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=container))
    fake.on_StartContainer(pb.StartContainerRequest(container_id=answer.container_id))
    crib("logs", "-f", "c")
    crib("rm", "-f", "p")
    assert stat.S_ISREG((tmp_path / "c.log").stat().st_mode)


# ---- images ------------------------------------------------------------------------------------------------------


def test_pull_prints_lines_to_stderr_and_the_id_to_stdout(crib: Crib) -> None:
    done = crib.full("pull", REMOTE)
    identifier = done.stdout.decode().strip()
    assert identifier.startswith("sha256:")
    assert done.stderr.decode().splitlines()[-1] == f"{LAYERS[1][7:19]}: done 1.9 MiB"
    assert crib.full("pull", "-q", REMOTE).stderr == b""
    assert crib.json("pull", "-q", REMOTE) == {"image": REMOTE, "id": identifier}


def test_pull_shows_bars_on_a_terminal(crib: Crib) -> None:
    shown = crib.on_terminal("pull", REMOTE)
    assert "111111111111" in shown and "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in shown and "done" in shown


def test_pull_from_a_registry_that_is_away_is_not_a_cribd_that_is_away(crib: Crib) -> None:
    assert crib.error("pull", "nowhere/x", code=1) == "crib: RegistryUnavailable: pull nowhere/x: connection refused"


def test_pull_sends_a_password_from_stdin(crib: Crib, fake: Fake) -> None:
    crib("pull", "-q", "--username", "me", "--password-stdin", REMOTE, stdin=b"hunter2\n")
    [request] = requests_of(fake, "Pull")
    assert "hunter2" in str(getattr(request, "password", ""))


def test_load(crib: Crib, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(b"archive of local/app:3\0" + bytes(3 << 20))
    assert crib("load", str(archive)) == "local/app:3\n"
    assert crib.json("load", str(archive))[0]["tags"] == ["local/app:3"]
    assert crib("load", "-", stdin=archive.read_bytes()) == "local/app:3\n"
    assert crib.error("load", str(tmp_path / "no"), code=3).endswith("/no: no such file or directory")
    archive.write_bytes(b"junk")
    assert crib.error("load", str(archive), code=1) == "crib: the archive is no tar file"


def test_images_and_rmi(crib: Crib, running: Start) -> None:
    assert crib("images").splitlines()[1].split()[0] == IMAGE
    running("web")
    assert "is what container web" in crib.error("rmi", IMAGE, code=1)
    crib("rmi", "-f", IMAGE)
    assert crib.json("images") == []
    assert f"no image '{IMAGE}' here" in crib.error("rmi", IMAGE, code=3)


# ---- the node ----------------------------------------------------------------------------------------------------


def test_plan(crib: Crib, running: Start) -> None:
    identifier = running("web")
    lines = crib("plan", "web").splitlines()
    assert lines[0] == f"container web ({identifier[:12]}): 3.00 ms, 2 steps"
    assert [line.split() for line in lines[1:]] == [
        ["#", "PHASE", "AT", "TOOK", "STEP"],
        ["1", "rootfs", "0.00", "ms", "0.25", "ms", "overlay", "on", "/"],
        ["2", "exec", "1.00", "ms", "1.50", "ms", "execve", "sh"],
        ["total", "3.00", "ms", "from", "call", "to", "answer"],
    ]
    [plan] = crib.json("plan", "default/web")
    assert plan.keys() == {"id", "kind", "name", "total_ns", "steps"} and plan["kind"] == "pod"
    assert plan["steps"][1] == {
        "index": 2, "phase": "exec", "text": "execve sh", "at_ns": 1_000_000, "duration_ns": 1_500_000, "error": "",
    }  # fmt: skip


# ---- errors ------------------------------------------------------------------------------------------------------


def test_no_daemon(tmp_path: Path) -> None:
    crib = Crib(f"unix://{tmp_path}/none.sock", tmp_path)
    assert crib.error("ps", code=4) == (
        f"crib: cannot reach cribd at unix://{tmp_path}/none.sock: no such file or directory: is it running?"
    )


def test_usage(crib: Crib) -> None:
    assert "invalid choice: 'nosuch'" in crib.error("nosuch", code=2)
    assert "see crib exec --help" in crib.error("exec", code=2)
    assert "--rm and --detach exclude each other" in crib.error("run", "-d", "--rm", IMAGE, code=2)
    assert "not [ADDRESS:]PORT:PORT" in crib.error("run", "-p", "80", IMAGE, code=2)
    assert "can't be told in utf-8" in crib.error("run", "-v", "/\udcff:/v", IMAGE, code=2)
    assert "not SOURCE:/TARGET" in crib.error("run", "-v", "x", IMAGE, code=2)
    assert crib.full(code=2).stderr.startswith(b"usage: crib")
    assert "is not unix:///PATH" in Crib("tcp://x", crib.log_dir).error("ps", code=2)


def test_a_reader_that_has_seen_enough_is_no_error(crib: Crib, running: Start) -> None:
    running("t", "seq 1 100000; exec sleep 1000")
    with crib.popen("logs", "-f", "t") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"1\n"
        process.stdout.close()
        assert process.wait(LIMIT_S) == 141
        assert process.stderr.read() == b""


def test_inspect_tells_no_environment_values(crib: Crib, running: Start) -> None:
    running("web", "exec sleep 1000", "-e", "TOKEN=hunter2")
    text = crib("inspect", "web", IMAGE)
    assert "hunter2" not in text and "secret" not in text
    container, image = crib.json("inspect", "web", IMAGE)
    assert container["info"]["runtimeSpec"]["process"]["env"] == ["TOKEN=<redacted>", "PATH=<redacted>"]
    assert container["info"]["config"]["envs"] == [{"key": "TOKEN", "value": "<redacted>"}]
    assert container["info"]["pid"] == 7 and container["kind"] == "container"
    assert image["kind"] == "image" and image["info"]["imageSpec"]["config"]["Env"] == ["KEY=<redacted>"]


def test_doctor(crib: Crib, fake: Fake) -> None:
    told = crib.json("doctor")
    assert told["ok"] and [probe["ok"] for probe in told["probes"]] == [True, False]
    assert crib("doctor").splitlines()[-1].split() == ["idmap", "no", "EINVAL", "chown"]
    fake.network_ready = False
    assert not crib.json("doctor", code=1)["ok"]


def test_version(crib: Crib, fake: Fake) -> None:
    told = crib.json("version")
    assert told["server"] == told["client"] == "0.1.0" and told["api"] == "v1"
    assert crib("--version") == "crib 0.1.0\n"
    fake.close()
    away = crib.full("version", code=4)
    assert away.stdout == b"crib 0.1.0\n"


def test_options_of_every_command_stand_before_it_or_behind(crib: Crib, fake: Fake) -> None:
    elsewhere = Crib("unix:///nowhere", crib.log_dir)
    for arguments in (
        ["--endpoint", fake.endpoint, "-o", "json", "pods"],
        ["pods", "-o", "json", "--endpoint", fake.endpoint],
    ):
        assert json.loads(elsewhere(*arguments)) == []
    assert "unix:///last" in elsewhere.error("--endpoint", fake.endpoint, "pods", "--endpoint", "unix:///last", code=4)

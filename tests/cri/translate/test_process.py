"""Arguments, environment, working directory, capabilities and the rest of the process."""

from __future__ import annotations

from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from cri.translate import Defaults, Handler, ResolvedUser
from cri.translate.capabilities import ALL, DEFAULT
from cri.translate.defaults import RLIMITS
from cri.translate.process import DEFAULT_PATH
from cri.translate.security import new_level
from runtime.errors import InvalidSpec, Unsupported
from runtime.plan.identity import RLIMIT_NAMES
from runtime.spec import Capabilities, Rlimit, User
from tests.cri.translate.given import DEFAULTS, HOST, container, image, linux, sandbox, sandbox_with, secured, spec

PRIVILEGED = sandbox_with(pb.LinuxSandboxSecurityContext(privileged=True))


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "command", "args", "expected"),
    [
        (("e",), ("c",), [], [], ("e", "c")),
        (("e",), ("c",), ["x"], [], ("x",)),
        (("e",), ("c",), [], ["a"], ("e", "a")),
        (("e",), ("c",), ["x"], ["a"], ("x", "a")),
        ((), ("c",), [], [], ("c",)),
        ((), (), [], ["a"], ("a",)),
        (("e", "f"), (), [], ["", "b"], ("e", "f", "", "b")),
    ],
)
def test_arguments(
    entrypoint: tuple[str, ...], cmd: tuple[str, ...], command: list[str], args: list[str], expected: tuple[str, ...]
) -> None:
    made = spec(container(command=command, args=args), img=image(entrypoint=entrypoint, cmd=cmd))
    assert made.process.args == expected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (container(), "command is missing"),
        (container(command=["", "x"]), "command[0] is empty"),
        (container(command=["a\0b"]), "command[0] 'a\\x00b'"),
        (container(command=["a", "b" * (128 << 10)]), "command[1] "),
    ],
)
def test_arguments_refused(config: pb.ContainerConfig, said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        spec(config, img=image(cmd=()))
    assert said in str(error.value)


def env(*pairs: tuple[str, bytes]) -> list[pb.KeyValue]:
    return [pb.KeyValue(key=key, value=value) for key, value in pairs]


def test_environment_later_wins_and_defaults_fill_in() -> None:
    config = container(envs=env(("A", b"request"), ("C", b"1"), ("C", b"2"), ("E", b"")), tty=True)
    made = spec(config, img=image(env=("A=image", "B=x=y", "noequals", "=x")))
    assert made.process.env == (
        f"PATH={DEFAULT_PATH}",
        "HOSTNAME=pod",
        "TERM=xterm",
        "A=request",
        "B=x=y",
        "C=2",
        "E=",
        "HOME=/root",
    )
    assert made.process.terminal


def test_environment_of_image_and_request_beat_the_defaults() -> None:
    made = spec(
        container(envs=env(("HOME", b"/h"), ("TERM", b"dumb")), tty=True), img=image(env=("PATH=/p", "HOSTNAME=h"))
    )
    assert made.process.env == ("PATH=/p", "HOSTNAME=h", "TERM=dumb", "HOME=/h")


def test_hostname_on_the_host_s_network_is_the_node_s() -> None:
    options = pb.NamespaceOption(network=pb.NamespaceMode.NODE)
    made = spec(pod=sandbox_with(pb.LinuxSandboxSecurityContext(namespace_options=options), hostname=""))
    assert "HOSTNAME=node-1" in made.process.env


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("", b"secret"), "envs ''"),
        (("A=B", b"secret"), "envs 'A=B'"),
        (("A", b"secret\0"), "envs 'A'"),
        (("A", b"secret\xff"), "envs 'A'"),
        (("A", b"secret" * (128 << 10)), "envs 'A'"),
        (("HOME", b"/secret\nroot::0:0::/:/bin/sh"), "envs 'HOME'"),
    ],
)
def test_environment_refused_without_its_value(pair: tuple[str, bytes], said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        spec(container(envs=env(pair)))
    assert said in str(error.value)
    assert "secret" not in str(error.value)


def test_environment_beyond_what_execve_takes() -> None:
    many = env(*((f"V{number}", b"x" * 120_000) for number in range(60)))
    with pytest.raises(InvalidSpec, match=r"envs: \d+ variables"):
        spec(container(envs=many))


@pytest.mark.parametrize(
    ("requested", "of_image", "expected"),
    [("", "", "/"), ("", "srv", "/srv"), ("", "/a/../b/", "/b"), ("/x//y/.", "/srv", "/x/y"), ("//x", "", "/x")],
)
def test_working_directory(requested: str, of_image: str, expected: str) -> None:
    assert spec(container(working_dir=requested), img=image(working_dir=of_image)).process.cwd == expected


@pytest.mark.parametrize("wrong", ["relative", "/a\0b", "/" + "x" * 5000])
def test_working_directory_refused(wrong: str) -> None:
    with pytest.raises(InvalidSpec, match="working_dir"):
        spec(container(working_dir=wrong))


def test_user_umask_and_limits() -> None:
    made = spec(user=ResolvedUser(7, 8, (8, 9), "u", "/u"))
    assert made.process.user == User(uid=7, gid=8, umask=0o022, additional_gids=(8, 9))
    assert Rlimit(type="RLIMIT_NOFILE", soft=1024, hard=524288) in made.process.rlimits
    assert len(made.process.rlimits) == 16, "all of them, so that none is the daemon's"
    assert made.process.oom_score_adj == 0


def caps(*names: str) -> tuple[str, ...]:
    return tuple(sorted((f"CAP_{name}" for name in names), key=ALL.index))


def capability_sets(uid: int = 0, privileged: bool = False, **lists: Any) -> Capabilities:
    config = secured(capabilities=pb.Capability(**lists), privileged=privileged)
    made = spec(config, pod=PRIVILEGED if privileged else None, user=ResolvedUser(uid, 0, (0,)))
    assert made.process.capabilities is not None
    return made.process.capabilities


DEFAULT_CAPS = tuple(sorted(DEFAULT, key=ALL.index))


@pytest.mark.parametrize(
    ("lists", "bounding"),
    [
        ({}, DEFAULT_CAPS),
        ({"add_capabilities": ["net_admin", "CAP_SYS_TIME"]}, (*DEFAULT, "CAP_NET_ADMIN", "CAP_SYS_TIME")),
        ({"drop_capabilities": ["CHOWN"]}, DEFAULT_CAPS[1:]),
        ({"add_capabilities": ["ALL"]}, ALL),
        ({"add_capabilities": ["all"], "drop_capabilities": ["CHOWN"]}, ALL[1:]),
        ({"drop_capabilities": ["ALL"]}, ()),
        ({"drop_capabilities": ["ALL"], "add_capabilities": ["KILL"]}, caps("KILL")),
        ({"add_capabilities": ["ALL", "KILL"], "drop_capabilities": ["ALL"]}, caps("KILL")),
        ({"add_capabilities": ["KILL"], "drop_capabilities": ["KILL"]}, tuple(set(DEFAULT) - {"CAP_KILL"})),
    ],
)
def test_capabilities(lists: dict[str, Any], bounding: tuple[str, ...]) -> None:
    expected = tuple(sorted(bounding, key=ALL.index))
    assert capability_sets(**lists) == Capabilities(bounding=expected, effective=expected, permitted=expected)


def test_capabilities_of_a_user_are_only_a_bound() -> None:
    assert capability_sets(uid=1) == Capabilities(bounding=DEFAULT_CAPS)


def test_ambient_capabilities_are_added_and_survive_execve_of_a_user() -> None:
    one = caps("NET_BIND_SERVICE")
    assert capability_sets(uid=1, drop_capabilities=["ALL"], add_ambient_capabilities=["NET_BIND_SERVICE"]) == (
        Capabilities(bounding=one, effective=one, permitted=one, inheritable=one, ambient=one)
    )
    made = capability_sets(add_ambient_capabilities=["SYS_TIME"])
    assert made.ambient == made.inheritable == caps("SYS_TIME")
    assert set(made.effective) == {*DEFAULT, "CAP_SYS_TIME"}


def test_privileged_has_all_capabilities() -> None:
    assert capability_sets(privileged=True, drop_capabilities=["ALL"]).effective == ALL


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"add_capabilities": ["NOPE"]}, "add_capabilities 'NOPE'"),
        ({"drop_capabilities": [""]}, "drop_capabilities ''"),
        ({"add_ambient_capabilities": ["x\n"]}, "add_ambient_capabilities 'x\\n'"),
        (
            {"add_ambient_capabilities": ["KILL"], "drop_capabilities": ["KILL"]},
            "add_ambient_capabilities CAP_KILL",
        ),
    ],
)
def test_capabilities_refused(lists: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        capability_sets(**lists)
    assert said in str(error.value)


def test_a_host_gives_no_more_than_it_has() -> None:
    small = type(HOST)(capabilities=("CAP_CHOWN", "CAP_SYS_ADMIN"))

    def bounding(**lists: Any) -> tuple[str, ...]:
        made = spec(secured(capabilities=pb.Capability(**lists)), host=small)
        assert made.process.capabilities is not None
        return made.process.capabilities.bounding

    assert bounding() == ("CAP_CHOWN",)
    assert bounding(add_capabilities=["ALL"]) == ("CAP_CHOWN", "CAP_SYS_ADMIN")
    with pytest.raises(Unsupported, match="add_capabilities CAP_SYS_TIME: this host"):
        bounding(add_capabilities=["SYS_TIME"])
    with pytest.raises(Unsupported, match="add_ambient_capabilities CAP_KILL"):
        bounding(add_ambient_capabilities=["KILL"])


def test_the_capability_table_is_the_kernel_s() -> None:
    assert len(ALL) == 41
    assert ALL.index("CAP_SYS_ADMIN") == 21
    assert ALL.index("CAP_CHECKPOINT_RESTORE") == 40
    assert len(DEFAULT) == 14


def test_privileged_needs_a_privileged_sandbox() -> None:
    with pytest.raises(InvalidSpec, match="privileged true: the sandbox is not privileged"):
        spec(secured(privileged=True))


def test_privileged_is_unconfined() -> None:
    config = secured(
        privileged=True,
        masked_paths=["/proc/kcore"],
        readonly_paths=["/proc/sys"],
        seccomp=pb.SecurityProfile(),
        apparmor=pb.SecurityProfile(),
    )
    made = spec(config, pod=PRIVILEGED)
    assert linux(made).masked_paths == linux(made).readonly_paths == ()
    assert linux(made).seccomp is None
    assert made.process.apparmor_profile == ""
    assert "cgroup" not in {namespace.type for namespace in linux(made).namespaces}


def test_no_new_privileges_and_oom_score() -> None:
    made = spec(secured(pb.LinuxContainerResources(oom_score_adj=-998), no_new_privs=True))
    assert made.process.no_new_privileges
    assert made.process.oom_score_adj == -998
    with pytest.raises(InvalidSpec, match="oom_score_adj 1001"):
        spec(secured(pb.LinuxContainerResources(oom_score_adj=1001)))


def test_paths_are_exactly_the_request_s() -> None:
    made = spec(secured(masked_paths=["/proc/kcore/"], readonly_paths=["/proc/sys"]))
    assert (linux(made).masked_paths, linux(made).readonly_paths) == (("/proc/kcore",), ("/proc/sys",))
    assert linux(spec(secured())).masked_paths == (), "procMount Unmasked"
    assert "/proc/kcore" in linux(spec()).masked_paths, "no security context: the safe defaults"
    with pytest.raises(InvalidSpec, match="masked_paths 'proc'"):
        spec(secured(masked_paths=["proc"]))
    for path in ("/", "//", "/x/.."):
        with pytest.raises(InvalidSpec, match="masked_paths '/'"):
            spec(secured(masked_paths=["/proc/kcore", path]))
        with pytest.raises(InvalidSpec, match="readonly_paths '/'"):
            spec(secured(readonly_paths=[path]))
    with pytest.raises(InvalidSpec, match="readonly_paths: 20000 entries"):
        spec(secured(readonly_paths=["/x"] * 20000))


LOCALHOST = pb.SecurityProfile.ProfileType.Localhost
UNCONFINED = pb.SecurityProfile.ProfileType.Unconfined


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "crib-default"),
        ({"apparmor": pb.SecurityProfile()}, "crib-default"),
        ({"apparmor": pb.SecurityProfile(profile_type=UNCONFINED)}, ""),
        ({"apparmor": pb.SecurityProfile(profile_type=LOCALHOST, localhost_ref="mine")}, "mine"),
        ({"apparmor": pb.SecurityProfile(profile_type=UNCONFINED), "apparmor_profile": "localhost/mine"}, ""),
        ({"apparmor_profile": "localhost/mine"}, "mine"),
        ({"apparmor_profile": "runtime/default"}, "crib-default"),
        ({"apparmor_profile": "unconfined"}, ""),
    ],
)
def test_apparmor(fields: dict[str, Any], expected: str) -> None:
    host = type(HOST)(apparmor=True, apparmor_profiles=frozenset({"mine", "crib-default"}))
    made = spec(secured(**fields), host=host, defaults=Defaults(node_name="n", apparmor_default="crib-default"))
    assert made.process.apparmor_profile == expected


def test_apparmor_refused() -> None:
    mine = secured(apparmor=pb.SecurityProfile(profile_type=LOCALHOST, localhost_ref="mine"))
    with pytest.raises(InvalidSpec, match="apparmor profile 'mine': not loaded"):
        spec(mine, host=type(HOST)(apparmor=True, apparmor_profiles=frozenset()))
    with pytest.raises(Unsupported, match="apparmor profile 'mine': this host has no AppArmor"):
        spec(mine)
    for wrong, said in (
        ({"apparmor": pb.SecurityProfile(profile_type=LOCALHOST)}, "apparmor.localhost_ref is missing"),
        ({"apparmor": pb.SecurityProfile(localhost_ref="x")}, "apparmor.localhost_ref 'x'"),
        ({"apparmor_profile": "strange"}, "apparmor profile 'strange'"),
    ):
        with pytest.raises(InvalidSpec, match=said):
            spec(secured(**wrong))


def test_each_pod_gets_a_level_of_its_own() -> None:
    numbers = iter((5, 5, 9, 2, 3, 1))
    assert new_level({"s0:c2,c9"}, lambda _: next(numbers)) == "s0:c1,c3"


def test_selinux() -> None:
    selinux = type(HOST)(selinux=True)
    level = pb.SELinuxOption(level="s0:c1,c2")
    assert spec(secured(selinux_options=level), host=selinux).process.selinux_label == (
        "system_u:system_r:container_t:s0:c1,c2"
    )
    assert spec(secured(selinux_options=level)).process.selinux_label == "", "SELinux is off"
    pod = sandbox_with(pb.LinuxSandboxSecurityContext(selinux_options=pb.SELinuxOption(type="spc_t")))
    assert ":spc_t:" in spec(secured(), pod=pod, host=selinux).process.selinux_label, "the sandbox's, if it has none"
    made = spec(secured(), host=selinux, selinux_level="s0:c4,c5")
    assert made.process.selinux_label == "system_u:system_r:container_t:s0:c4,c5"
    assert made.linux is not None
    assert made.linux.mount_label == "system_u:object_r:container_file_t:s0:c4,c5"
    kept = spec(secured(selinux_options=pb.SELinuxOption(type="x_t")), host=selinux, selinux_level="s0:c4,c5")
    assert kept.process.selinux_label.endswith(":x_t:s0:c4,c5"), "the pod's level, so that its volumes can be shared"
    own = sandbox_with(pb.LinuxSandboxSecurityContext(selinux_options=level))
    kept = spec(secured(selinux_options=pb.SELinuxOption(type="x_t")), pod=own, host=selinux, selinux_level="s0:c4,c5")
    assert kept.process.selinux_label.endswith(":x_t:s0:c1,c2")
    free = secured(privileged=True)
    anything = sandbox_with(pb.LinuxSandboxSecurityContext(privileged=True))
    assert spec(free, pod=anything, host=selinux).process.selinux_label == ""
    for field, value in (("level", "high"), ("type", "a b"), ("user", "u:v"), ("role", "x\n")):
        with pytest.raises(InvalidSpec, match=f"selinux_options.{field}"):
            spec(secured(selinux_options=pb.SELinuxOption(**{field: value})))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (pb.ContainerConfig(), "metadata is missing"),
        (container(metadata=pb.ContainerMetadata()), "metadata.name is missing"),
        (container(metadata=pb.ContainerMetadata(name="a/b")), "metadata.name 'a/b'"),
        (container(metadata=pb.ContainerMetadata(name="a" * 300)), "metadata.name 'aaa"),
        (container(image=pb.ImageSpec()), "image.image is missing"),
        (container(labels={"a": "b" * (2 << 20)}), "labels: "),
        (container(annotations={"a": "b" * (9 << 20)}), "container config: "),
    ],
)
def test_config_refused(config: pb.ContainerConfig, said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        spec(config)
    assert said in str(error.value)
    assert len(str(error.value)) < 300


def test_annotations_are_who_it_is_and_what_the_handler_lets_through() -> None:
    pod = sandbox(annotations={"dev.x/a": "pod", "dev.x/b": "pod", "y": "no"})
    config = container(annotations={"dev.x/a": "own", "io.kubernetes.cri.sandbox-id": "forged"})
    plain = {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": "main",
        "io.kubernetes.cri.image-name": "sha256:1",
        "io.kubernetes.cri.sandbox-id": "5" * 64,
        "io.kubernetes.cri.sandbox-name": "pod",
        "io.kubernetes.cri.sandbox-namespace": "default",
        "io.kubernetes.cri.sandbox-uid": "u-1",
    }
    assert spec(config, pod=pod).annotations == plain
    open_handler = Handler(annotations=("dev.x/*", "io.kubernetes.cri.*"))
    assert spec(config, pod=pod, handler=open_handler).annotations == {**plain, "dev.x/a": "own", "dev.x/b": "pod"}


def test_spec_is_complete() -> None:
    made = spec(secured(readonly_rootfs=True), pod=sandbox(), defaults=DEFAULTS)
    assert made.root.readonly
    assert made.root.path == "rootfs"
    assert linux(made).cgroups_path == "/kubepods/x"


def test_every_limit_is_set_so_that_none_is_the_daemons() -> None:
    assert {limit.type for limit in RLIMITS} == {f"RLIMIT_{name}" for name in RLIMIT_NAMES}
    assert {limit.type for limit in spec(container()).process.rlimits} == {limit.type for limit in RLIMITS}

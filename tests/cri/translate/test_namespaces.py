"""Which namespaces a pod has and a container joins."""

from __future__ import annotations

from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from cri.translate import ResolvedUser, sandbox_to_pod
from runtime.errors import InvalidSpec, Unsupported
from runtime.spec import IDMapping, Namespace
from tests.cri.translate.given import DEFAULTS, HOST, Namespaces, linux, mount_at, sandbox_with, secured, spec

POD, CONTAINER, NODE, TARGET = (
    pb.NamespaceMode.POD,
    pb.NamespaceMode.CONTAINER,
    pb.NamespaceMode.NODE,
    pb.NamespaceMode.TARGET,
)
RANGE = [pb.IDMapping(container_id=0, host_id=65536, length=65536)]
OWN_USER = pb.UserNamespace(mode=POD, uids=RANGE, gids=RANGE)


def pod(**modes: Any) -> pb.PodSandboxConfig:
    return sandbox_with(pb.LinuxSandboxSecurityContext(namespace_options=pb.NamespaceOption(**modes)))


def joined(sandbox: pb.PodSandboxConfig, namespaces: Namespaces | None = None, **modes: Any) -> dict[str, str]:
    config = secured(namespace_options=pb.NamespaceOption(**modes)) if modes else secured()
    made = spec(config, pod=sandbox, namespaces=namespaces, target_pid="/proc/9/ns/pid")
    assert made.hostname == "", "the pod's uts namespace has its name already"
    return {namespace.type: namespace.path for namespace in linux(made).namespaces}


ALL = {
    "mount": "",
    "network": "/proc/7/ns/net",
    "ipc": "/proc/7/ns/ipc",
    "uts": "/proc/7/ns/uts",
    "pid": "/proc/8/ns/pid",
    "cgroup": "",
}


@pytest.mark.parametrize(
    ("of_pod", "of_container", "difference"),
    [
        ({}, {}, {}),
        ({"pid": CONTAINER}, {}, {"pid": ""}),
        ({"pid": CONTAINER}, {"pid": CONTAINER}, {"pid": ""}),
        ({"pid": NODE}, {"pid": NODE}, {"pid": None}),
        ({"pid": NODE}, {}, {"pid": None}),
        ({"pid": POD}, {"pid": CONTAINER}, {"pid": ""}),
        ({"pid": CONTAINER}, {"pid": TARGET, "target_id": "t"}, {"pid": "/proc/9/ns/pid"}),
        ({"ipc": NODE}, {"ipc": NODE}, {"ipc": None}),
        ({"network": NODE}, {}, {"network": None, "uts": None}),
        ({"network": NODE, "ipc": NODE, "pid": NODE}, {}, {"network": None, "uts": None, "ipc": None, "pid": None}),
    ],
)
def test_joined(of_pod: dict[str, Any], of_container: dict[str, Any], difference: dict[str, str | None]) -> None:
    expected = {key: value for key, value in {**ALL, **difference}.items() if value is not None}
    assert joined(pod(**of_pod), **of_container) == expected


@pytest.mark.parametrize(
    ("of_pod", "of_container", "said"),
    [
        ({}, {"network": NODE}, "namespace_options.network NODE: the sandbox's mode is POD"),
        ({"network": NODE}, {"pid": CONTAINER}, "namespace_options.network POD: the sandbox's mode is NODE"),
        ({}, {"ipc": NODE}, "namespace_options.ipc NODE"),
        ({}, {"network": CONTAINER}, "namespace_options.network CONTAINER"),
        ({}, {"pid": NODE}, "namespace_options.pid NODE: the sandbox's mode is POD"),
        ({"pid": CONTAINER}, {"pid": POD, "target_id": "t"}, "target_id 't': pid mode is POD"),
        ({}, {"pid": TARGET}, "namespace_options.target_id is missing"),
        ({}, {"pid": 8}, "namespace_options.pid 8"),
        ({}, {"userns_options": OWN_USER}, "userns_options: differ from the sandbox's"),
        ({"userns_options": OWN_USER}, {"userns_options": pb.UserNamespace(mode=NODE)}, "userns_options: differ"),
    ],
)
def test_a_container_can_t_contradict_its_sandbox(
    of_pod: dict[str, Any], of_container: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidSpec) as error:
        joined(pod(**of_pod), **of_container)
    assert said in str(error.value)


def test_what_is_not_running_can_t_be_joined() -> None:
    with pytest.raises(InvalidSpec, match="the sandbox has no shared pid namespace"):
        joined(pod(), Namespaces(pid=None))
    config = secured(namespace_options=pb.NamespaceOption(pid=TARGET, target_id="t"))
    with pytest.raises(InvalidSpec, match="target_id: the target container is not running"):
        spec(config)


def test_own_user_namespace() -> None:
    made = linux(spec(pod=pod(userns_options=OWN_USER)))
    assert "user" in {namespace.type for namespace in made.namespaces}
    assert made.uid_mappings == made.gid_mappings == (IDMapping(container_id=0, host_id=65536, size=65536),)
    plan = sandbox_to_pod(pod(userns_options=OWN_USER), defaults=DEFAULTS, host=HOST)
    assert plan.user is not None
    assert plan.sysctls == {}, "no ping_group_range: its ids would have to be mapped"


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (ResolvedUser(uid=65536, gid=0), "run_as_user 65536: the pod's user namespace has ids below 65536"),
        (ResolvedUser(uid=0, gid=70000, additional_gids=(70000,)), "run_as_group 70000"),
        (ResolvedUser(uid=0, gid=0, additional_gids=(0, 65536)), "supplemental_groups 65536"),
    ],
)
def test_ids_that_the_own_user_namespace_lacks(user: ResolvedUser, said: str) -> None:
    spec(pod=pod(userns_options=OWN_USER), user=ResolvedUser(uid=65535, gid=65535, additional_gids=(65535,)))
    with pytest.raises(InvalidSpec, match=said):
        spec(pod=pod(userns_options=OWN_USER), user=user)
    spec(user=user)


def test_own_user_namespace_on_the_host_s_network_binds_sys() -> None:
    made = spec(pod=pod(userns_options=OWN_USER, network=NODE))
    assert mount_at(made, "/sys").type == "bind"
    assert "rro" in mount_at(made, "/sys").options
    assert Namespace(type="user") in linux(made).namespaces


TWICE = [*RANGE, *RANGE]


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        ({"network": CONTAINER}, "namespace_options.network CONTAINER: a sandbox takes POD or NODE"),
        ({"network": TARGET}, "namespace_options.network TARGET"),
        ({"ipc": CONTAINER}, "namespace_options.ipc CONTAINER"),
        ({"pid": TARGET, "target_id": "x"}, "namespace_options.pid TARGET"),
        ({"pid": 17}, "namespace_options.pid 17"),
        ({"target_id": "x"}, "namespace_options.target_id 'x'"),
        ({"userns_options": pb.UserNamespace(mode=CONTAINER)}, "userns_options.mode CONTAINER"),
        ({"userns_options": pb.UserNamespace(mode=TARGET)}, "userns_options.mode TARGET"),
        ({"userns_options": pb.UserNamespace(mode=NODE, uids=RANGE)}, "mode NODE takes no mappings"),
        ({"userns_options": pb.UserNamespace(uids=TWICE, gids=RANGE)}, "userns_options.uids: 2 mappings"),
        ({"userns_options": pb.UserNamespace(uids=RANGE)}, "userns_options.gids: 0 mappings"),
        (
            {"userns_options": pb.UserNamespace(uids=[pb.IDMapping(container_id=1, length=9)], gids=RANGE)},
            "userns_options.uids (container 1, host 0, length 9): the mapping has to hold id 0",
        ),
        (
            {"userns_options": pb.UserNamespace(uids=[pb.IDMapping(host_id=4_294_967_000, length=999)], gids=RANGE)},
            "beyond the greatest id",
        ),
        ({"userns_options": OWN_USER, "pid": NODE}, "namespace_options.pid NODE: a pod with its own user namespace"),
        ({"userns_options": OWN_USER, "ipc": NODE}, "namespace_options.ipc NODE: a pod with its own user namespace"),
    ],
)
def test_sandbox_refused(modes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        sandbox_to_pod(pod(**modes), defaults=DEFAULTS, host=HOST)
    assert said in str(error.value)


def test_user_namespaces_need_a_host_that_has_them() -> None:
    with pytest.raises(Unsupported, match=r"userns_options\.mode POD"):
        sandbox_to_pod(pod(userns_options=OWN_USER), defaults=DEFAULTS, host=type(HOST)(user_namespaces=False))

"""What an external runtime is handed: the spec that the built-in engine would run, less what crib does itself."""

from __future__ import annotations

import msgspec
import pytest

from runtime.errors import Unsupported
from runtime.images import RootFs
from runtime.plan.bundle import Bundle, compile_bundle, handed_process
from runtime.plan.plan import decode, encode
from runtime.plan.tree import Environment, Namespaces
from runtime.spec import (
    DeviceCgroup,
    IDMapping,
    Linux,
    Memory,
    Mount,
    Namespace,
    Process,
    Resources,
    Rlimit,
    Root,
    Spec,
    User,
)

ROOTFS = RootFs(base="/l", lowers=("1", "2"), upper="/u", work="/w")
POD = Namespaces(network="/proc/7/ns/net", ipc="/proc/7/ns/ipc", uts="/proc/7/ns/uts")
USER_POD = Namespaces(network="/proc/7/ns/net", user="/proc/7/fd/9")
COMMAND = ("/bin/rt", "create", "c")
RULE = DeviceCgroup(allow=False, access="rwm")


def environment(pod: Namespaces = POD, **fields: object) -> Environment:
    usual: dict[str, object] = {"staging": "/s/rootfs", "shm_path": "/s/pods/p/shm", "shm_attached": False}
    return Environment(namespaces=pod, last_cap=40, directory="/s/pods/p", **(usual | fields))  # type: ignore[arg-type]


def spec(*mounts: Mount, process: dict[str, object] | None = None, mapped: bool = False) -> Spec:
    maps = (IDMapping(container_id=0, host_id=1000, size=10),) if mapped else ()
    linux = Linux(
        namespaces=(Namespace(type="pid"), *((Namespace(type="user", path=USER_POD.user),) if mapped else ())),
        uid_mappings=maps,
        gid_mappings=maps,
        cgroups_path="/p/c",
        resources=Resources(devices=(RULE,), memory=Memory(limit=1 << 20)),
    )
    own = Process(cwd="/", user=User(uid=0, gid=0), args=("true",), **(process or {}))  # type: ignore[arg-type]
    return Spec(process=own, root=Root(path="rootfs", readonly=True), mounts=mounts, linux=linux)


def bundle(given: Spec, of: Environment | None = None) -> Bundle:
    found = compile_bundle(given, ROOTFS, of or environment(), "/s/pods/p/b", COMMAND, "/proc/5/ns")
    assert [type(step) for step in decode(encode(found.plan))] == [type(step) for step in found.plan]
    return found


def texts(found: Bundle) -> list[str]:
    return [step.describe() for step in found.plan]


def test_the_spec_is_the_engines_with_the_root_where_it_is_mounted() -> None:
    found = bundle(spec(Mount(destination="/proc", type="proc")))
    assert found.spec.root == Root(path="/s/rootfs", readonly=True)
    assert found.spec.linux
    assert found.spec.linux.cgroups_path == "/p/c"
    document = msgspec.json.decode(msgspec.json.encode(found.spec))
    assert document["mounts"] == [{"destination": "/proc", "type": "proc"}]
    assert document["linux"]["resources"] == {"devices": [{"allow": False, "access": "rwm"}]}, "limits are crib's"
    assert texts(found)[1:] == [
        "join net namespace /proc/5/ns/net",
        "join ipc namespace /proc/5/ns/ipc",
        "join uts namespace /proc/5/ns/uts",
        "new namespaces: mount",
        "make / recursively slave",
        "mount overlay of 2 layers from /l, writable part /u",
        "execute /bin/rt create c",
    ]


def test_what_only_crib_can_open_is_bound_from_the_bundle() -> None:
    shm = Mount(destination="/dev/shm", type="bind", source="/s/pods/p/shm", options=("bind", "rw"))
    found = bundle(spec(shm))
    assert found.spec.mounts[0].source == "/s/pods/p/b/0"
    assert {"clone the pod's shm", "attach at /s/pods/p/b/0"} <= set(texts(found))
    attached = bundle(spec(shm), environment(shm_attached=True))
    assert attached.spec.mounts == (shm,)


def test_a_missing_source_is_made_and_options_of_cribs_own_are_taken_out() -> None:
    volume = Mount(destination="/v", type="bind", source="/host/v", options=("rbind", "rw", "x-crib.mkdir"))
    found = bundle(spec(volume))
    assert found.spec.mounts[0].options == ("rbind", "rw")
    assert "make /host/v if it is missing" in texts(found)


def test_a_mount_that_propagates_keeps_its_peers() -> None:
    shared = Mount(destination="/v", type="bind", source="/host/v", options=("rbind", "rshared"))
    steps = texts(bundle(spec(shared)))
    assert "make / recursively slave" not in steps
    assert "make the mount that /s/rootfs is on a slave" in steps


def test_a_mapped_root_is_where_root_inside_can_look_it_up() -> None:
    one = Mount(destination="/sys", type="bind", source="/sys", options=("bind", "ro"))
    found = bundle(spec(one, mapped=True), environment(USER_POD))
    assert found.user == USER_POD.user
    assert found.spec.root.path == "/sys/fs/bpf"
    assert found.spec.mounts[0].source == "/s/pods/p/b/0"
    assert found.spec.linux
    assert found.spec.linux.namespaces[1] == Namespace(type="user", path="/s/pods/p/b/user")
    slave = Mount(destination="/v", type="bind", source="/v", options=("rbind", "rslave"))
    with pytest.raises(Unsupported):
        bundle(spec(slave, mapped=True), environment(USER_POD, overlay_of_descriptors=False))


def test_what_the_host_may_not_raise_is_kept() -> None:
    limits = (Rlimit(type="RLIMIT_NOFILE", soft=1024, hard=5000), Rlimit(type="RLIMIT_CORE", soft=0, hard=2**64 - 1))
    process = Process(cwd="/", user=User(uid=0, gid=0), rlimits=limits, oom_score_adj=-900)
    assert handed_process(process, environment()).rlimits == limits
    low = handed_process(process, environment(hard_limits=(2000,) * 16))
    assert [(limit.soft, limit.hard) for limit in low.rlimits] == [(1024, 2000), (0, 2000)]
    assert low.oom_score_adj is None
    assert "oom_score_adj -900" in texts(bundle(spec(process={"oom_score_adj": -900})))

"""Plans as data: what is encoded comes back, a failure names its step, and compile decides all there is to decide."""

from __future__ import annotations

import errno
import marshal
from dataclasses import replace

import msgspec
import pytest

from runtime.errors import InvalidSpec, StepFailed
from runtime.images import RootFs
from runtime.plan import identity, mounts, user
from runtime.plan.compile import Cgroup, Environment, Namespaces, compile_exec, compile_start
from runtime.plan.plan import KINDS, Context, Plan, decode, encode, run
from runtime.spec import Capabilities, IDMapping, Linux, Mount, Namespace, Process, Rlimit, Root, Spec, User

ROOTFS = RootFs(base="/l", lowers=("2", "1"), upper="/u", work="/w")
CGROUP = Cgroup("/p/c", ("/sys/fs/cgroup/p/c/cgroup.procs",), "", ("/sys/fs/cgroup/p/c",), "", ())
POD = Namespaces("/proc/7/ns/net", "/proc/7/ns/ipc", "/proc/7/ns/uts", "")
ENVIRONMENT = Environment("/run/crib/rootfs", POD, "/run/crib/pods/p/shm", False, 40)
ALL_NEW = (
    Namespace(type="pid"),
    Namespace(type="mount"),
    Namespace(type="cgroup"),
    Namespace(type="network", path=POD.network),
    Namespace(type="ipc", path=POD.ipc),
    Namespace(type="uts", path=POD.uts),
)


def spec(
    *, mounts: tuple[Mount, ...] = (), namespaces: tuple[Namespace, ...] = ALL_NEW, process: Process | None = None
) -> Spec:
    return Spec(
        process=process or Process(cwd="/", user=User(uid=0, gid=0), args=("true",)),
        root=Root(path="rootfs"),
        mounts=mounts,
        linux=Linux(namespaces=namespaces),
    )


def plan_of(wanted: Spec) -> Plan:
    return compile_start(wanted, ROOTFS, CGROUP, ENVIRONMENT).plan


def test_every_plan_survives_the_wire() -> None:
    plan = plan_of(
        spec(
            mounts=(
                Mount(destination="/proc", type="proc"),
                Mount(destination="/dev", type="tmpfs", options=("nosuid",)),
                Mount(destination="/data", type="bind", source="/srv", options=("rbind", "ro")),
            )
        )
    )
    again = decode(encode(plan))
    assert [type(step) for step in again] == [type(step) for step in plan]
    assert [step.describe() for step in again] == [step.describe() for step in plan]
    assert [step.values() for step in again] == [step.values() for step in plan]


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown step"):
        decode(marshal.dumps([["Nonsense", 1]]))


def test_every_kind_of_step_describes_itself() -> None:
    assert all("describe" in vars(kind) and "run" in vars(kind) for kind in KINDS.values())


def test_a_failure_names_step_and_cause() -> None:
    plan = (identity.FindExecutable("sh", "/bin"), mounts.OpenSource("a", "/does/not/exist", True, False))
    outcome = run(plan, Context({}))
    assert (outcome.failed, outcome.errno) == (1, errno.ENOENT)
    assert outcome.detail == "open_tree /does/not/exist: no such file or directory"
    assert len(outcome.durations_ns) == 1
    error = StepFailed(plan[1].describe(), 2, 2, outcome.errno, outcome.detail)
    assert str(error).startswith("step 2/2: open source /does/not/exist")


def test_sources_are_opened_before_the_mount_namespace_is_made() -> None:
    plan = plan_of(spec(mounts=(Mount(destination="/a", type="bind", source="/srv", options=("rbind",)),)))
    kinds = [type(step) for step in plan]
    assert kinds.index(mounts.OpenSource) < kinds.index(identity.Unshare) < kinds.index(mounts.Attach)


def test_the_end_of_a_start_is_fixed() -> None:
    kinds = [type(step) for step in plan_of(spec())]
    tail = [mounts.PivotRoot, identity.WorkingDirectory, identity.FindExecutable, identity.Execute]
    assert kinds[-4:] == tail
    assert kinds[0] is identity.Detach


def test_the_cgroup_is_joined_before_its_namespace_is_made_and_mounted() -> None:
    plan = plan_of(
        spec(mounts=(Mount(destination="/proc", type="proc"), Mount(destination="/sys/fs/cgroup", type="cgroup")))
    )
    described = [step.describe() for step in plan]
    join = next(i for i, text in enumerate(described) if text.startswith("join cgroup"))
    assert described[join + 1] == "new namespaces: cgroup"
    assert described.index("mount proc on /proc") < join


def test_pid_namespaces() -> None:
    def pid(*namespaces: Namespace, pod_pid: str = "") -> tuple[str, str]:
        environment = Environment("/s", Namespaces(pid=pod_pid), "", False, 40)
        start = compile_start(spec(namespaces=namespaces), ROOTFS, CGROUP, environment)
        return start.pid, start.pid_ns

    assert pid() == ("host", "")
    assert pid(Namespace(type="pid")) == ("new", "")
    assert pid(Namespace(type="pid", path="/proc/5/ns/pid"), pod_pid="/proc/5/ns/pid") == ("pod", "")
    assert pid(Namespace(type="pid", path="/proc/9/ns/pid"), pod_pid="/proc/5/ns/pid") == ("join", "/proc/9/ns/pid")


def test_a_host_namespace_in_a_pod_with_its_own_is_joined() -> None:
    plan = plan_of(spec(namespaces=(Namespace(type="network"), Namespace(type="ipc", path=POD.ipc))))
    described = [step.describe() for step in plan]
    assert "join uts namespace /proc/1/ns/uts" in described
    assert any("new namespaces" in text and "net" in text for text in described)
    assert not any("ipc namespace" in text for text in described)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (spec(process=Process(cwd="/", user=User(uid=0, gid=0))), "no command"),
        (spec(namespaces=(Namespace(type="time-travel"),)), "time-travel"),
        (
            spec(
                process=Process(
                    cwd="/", user=User(uid=0, gid=0), args=("x",), capabilities=Capabilities(effective=("CAP_FLY",))
                )
            ),
            "CAP_FLY",
        ),
    ],
)
def test_what_cannot_be_is_refused(wanted: Spec, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        plan_of(wanted)


def test_an_exec_joins_by_pidfd_and_never_mounts() -> None:
    process = Process(cwd="/", user=User(uid=1000, gid=1000), args=("id",))
    plan = compile_exec(process, Linux(), ("/sys/fs/cgroup/x/cgroup.procs",), "", 40)
    kinds = [type(step) for step in plan]
    assert identity.JoinProcess in kinds
    assert kinds.index(identity.JoinCgroup) < kinds.index(identity.JoinProcess)
    into = compile_exec(process, Linux(), (), "/sys/fs/cgroup/x", 40)
    assert identity.JoinCgroup not in [type(step) for step in into]


def test_limits_are_told_by_name() -> None:
    limits = (Rlimit(type="RLIMIT_NOFILE", soft=1024, hard=524288), Rlimit(type="RLIMIT_CORE", soft=0, hard=2**64 - 1))
    process = Process(cwd="/", user=User(uid=0, gid=0), args=("true",), rlimits=limits)
    described = [step.describe() for step in plan_of(spec(process=process))]
    assert "resource limits nofile=1024:524288 core=0:unlimited" in described


@pytest.mark.parametrize(("soft", "hard", "steps"), [(1024, 4096, 2), (4000, 4096, 1), (1024, 1100, 2), (64, 64, 1)])
def test_a_start_has_descriptors_for_more_mounts_than_the_process_may_have(soft: int, hard: int, steps: int) -> None:
    limits = (Rlimit(type="RLIMIT_NOFILE", soft=soft, hard=hard), Rlimit(type="RLIMIT_CORE", soft=0, hard=0))
    process = Process(cwd="/", user=User(uid=0, gid=0), args=("true",), rlimits=limits)
    many = [Mount(destination=f"/m/{n}", type="bind", source="/srv", options=("rbind",)) for n in range(1200)]
    for plan in (plan_of(spec(process=process, mounts=tuple(many))), mapped_plan(*many, process=process)):
        found = [step.limits for step in plan if isinstance(step, identity.Rlimits)]
        assert len(found) == steps
        assert found[0][0][1] >= min(hard, 1200)
        assert found[0][1:] == ((4, 0, 0),)
        assert found[-1][0] == (7, soft, hard)
    assert identity.Rlimits not in [type(step) for step in plan_of(spec(mounts=tuple(many)))]


def test_every_step_is_of_a_phase() -> None:
    phases = {"namespaces", "rootfs", "mounts", "cgroup", "identity", "hooks", "exec"}
    assert {kind.phase for kind in KINDS.values()} == phases


MAPPING = (IDMapping(container_id=0, host_id=1000000, size=65536),)


def mapped_plan(*mounts: Mount, process: Process | None = None) -> Plan:
    pod = Namespaces(POD.network, POD.ipc, POD.uts, "", "/proc/7/fd/9")
    own = (*ALL_NEW, Namespace(type="user", path=pod.user))
    wanted = spec(mounts=mounts, namespaces=own, process=process)
    assert wanted.linux is not None
    linux = msgspec.structs.replace(wanted.linux, uid_mappings=MAPPING, gid_mappings=MAPPING)
    environment = Environment("/run/crib/rootfs", pod, "/shm", False, 40)
    return compile_start(msgspec.structs.replace(wanted, linux=linux), ROOTFS, CGROUP, environment).plan


def test_a_user_namespace_is_entered_after_all_that_takes_the_hosts_privileges() -> None:
    plan = mapped_plan(
        Mount(destination="/dev", type="tmpfs", options=("nosuid", "mode=755")),
        Mount(destination="/v", type="bind", source="/srv", options=("rbind", "ro", "ridmap"), uid_mappings=MAPPING),
    )
    kinds = [type(step) for step in plan]
    entered = kinds.index(user.CloneAgain)
    assert kinds.index(user.JoinUser) == entered - 1
    before = {mounts.OpenSource, user.Adjust, user.MountMappedOverlay, user.MakeDev, identity.JoinCgroup}
    assert before <= set(kinds[:entered])
    assert not before & set(kinds[entered:])
    after = {identity.Unshare, user.AttachRoot, mounts.Attach, mounts.PivotRoot, identity.Execute}
    assert after <= set(kinds[entered:])
    assert kinds[entered + 1] is identity.Detach
    adjusted = next(step for step in plan if isinstance(step, user.Adjust))
    assert (adjusted.mapping, adjusted.mapping_recursive, adjusted.set_) == ("user", True, 1)


def test_another_mapping_gets_a_namespace_of_its_own_once() -> None:
    other = (IDMapping(container_id=0, host_id=5, size=1),)
    volumes = [
        Mount(
            destination=f"/{n}", type="bind", source="/srv", options=("bind",), uid_mappings=other, gid_mappings=other
        )
        for n in range(2)
    ]
    plan = mapped_plan(*volumes)
    assert [type(step) for step in plan].count(user.MakeMapping) == 1
    assert [step.mapping for step in plan if isinstance(step, user.Adjust)] == ["mapping0"] * 2
    assert decode(encode(plan))[-1].describe() == plan[-1].describe()


def test_a_pods_user_namespace_is_all_of_its_containers() -> None:
    pod = Namespaces(user="/proc/7/fd/9")
    with pytest.raises(InvalidSpec, match="user namespace"):
        compile_start(spec(namespaces=()), ROOTFS, CGROUP, Environment("/s", pod, "", False, 40))
    with pytest.raises(InvalidSpec, match="idmapped without a mapping"):
        plan_of(spec(mounts=(Mount(destination="/v", type="bind", source="/srv", options=("idmap",)),)))


@pytest.mark.parametrize("mapped", [False, True])
def test_a_label_is_on_all_file_systems_of_the_containers_own(mapped: bool) -> None:
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    wanted = spec(
        mounts=(
            Mount(destination="/proc", type="proc"),
            Mount(destination="/dev", type="tmpfs", options=("nosuid", "mode=755")),
            Mount(destination="/dev/pts", type="devpts", options=("newinstance",)),
            Mount(destination="/sys", type="sysfs"),
            Mount(destination="/tmp", type="tmpfs"),
            Mount(destination="/dev/mqueue", type="mqueue"),
        )
    )
    assert wanted.linux is not None
    mapping = (IDMapping(container_id=0, host_id=1 << 20, size=1 << 16),) * mapped
    namespaces = (*ALL_NEW, Namespace(type="user", path="/proc/7/fd/5")) if mapped else ALL_NEW
    linux = msgspec.structs.replace(
        wanted.linux, namespaces=namespaces, uid_mappings=mapping, gid_mappings=mapping, mount_label=label
    )
    environment = replace(ENVIRONMENT, namespaces=replace(POD, user="/proc/7/fd/5" if mapped else ""))
    plan = compile_start(msgspec.structs.replace(wanted, linux=linux), ROOTFS, CGROUP, environment).plan
    data = {step.target: step.data for step in plan if isinstance(step, mounts.Mount)}
    quoted = f'context="{label}"'
    assert data["/dev/pts"] == f"newinstance,{quoted}"
    assert data["/tmp"] == quoted
    assert (data["/proc"], data["/sys"], data["/dev/mqueue"]) == ("", "", "")
    given = [(step.target, step.label) for step in plan if isinstance(step, mounts.Label)]
    assert given == [("/dev/mqueue", label)]  # one file system for all of an ipc namespace: no mount option
    roots = [step.label for step in plan if isinstance(step, (mounts.MountOverlay, user.MountMappedOverlay))]
    assert roots == [label]
    devs = [step.label for step in plan if isinstance(step, user.MakeDev)]
    assert (devs == [label]) if mapped else (data["/dev"] == f"mode=755,{quoted}")


@pytest.mark.parametrize("mapped", [False, True])
def test_a_processs_label_is_on_its_keyring_and_on_what_it_becomes(mapped: bool) -> None:
    label = "system_u:system_r:container_t:s0:c1,c2"
    process = Process(cwd="/", user=User(uid=0, gid=0), args=("true",), selinux_label=label)
    started = mapped_plan(process=process) if mapped else plan_of(spec(process=process))
    execed = compile_exec(process, Linux(), (), "", 40)
    for plan in (started, execed):
        assert {step.key_label for step in plan if isinstance(step, identity.Detach)} == {label}
        assert [step.path for step in plan if isinstance(step, identity.OpenLabel)] == ["/proc/self/attr/exec"]
        assert isinstance(plan[-1], identity.Execute)
        assert plan[-1].label == label


def test_the_hosts_message_queues_keep_their_label() -> None:
    wanted = spec(mounts=(Mount(destination="/dev/mqueue", type="mqueue"),))
    assert wanted.linux is not None
    linux = msgspec.structs.replace(wanted.linux, namespaces=(Namespace(type="mount"),), mount_label="u:r:t:s0")
    environment = replace(ENVIRONMENT, namespaces=Namespaces())
    plan = compile_start(msgspec.structs.replace(wanted, linux=linux), ROOTFS, CGROUP, environment).plan
    assert not [step for step in plan if isinstance(step, mounts.Label)]

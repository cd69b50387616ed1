"""config.json by the structs: the names are OCI's, exactly."""

from __future__ import annotations

import msgspec
import pytest

from runtime import spec
from runtime.spec import (
    CPU,
    BlockIO,
    Capabilities,
    Device,
    Hook,
    Hooks,
    HugepageLimit,
    IDMapping,
    Linux,
    Memory,
    Mount,
    Namespace,
    NetworkClass,
    Pids,
    Process,
    Rdma,
    Resources,
    Rlimit,
    Root,
    Seccomp,
    SeccompArg,
    SeccompRule,
    Spec,
    ThrottleDevice,
    User,
)

FULL = Spec(
    process=Process(
        args=("sh", "-c", "true"),
        env=("A=b",),
        cwd="/",
        user=User(uid=0, gid=0, umask=0o22, additional_gids=(0, 5)),
        terminal=True,
        capabilities=Capabilities(bounding=("CAP_CHOWN",)),
        rlimits=(Rlimit(type="RLIMIT_NOFILE", soft=1, hard=2),),
        no_new_privileges=True,
        oom_score_adj=0,
        apparmor_profile="a",
        selinux_label="b",
        exec_cpu_affinity=spec.CPUAffinity(initial="0"),
        io_priority=spec.IOPriority(class_="IOPRIO_CLASS_IDLE", priority=7),
    ),
    root=Root(path="rootfs", readonly=True),
    mounts=(
        Mount(
            destination="/d",
            type="bind",
            source="/s",
            options=("rbind",),
            uid_mappings=(IDMapping(container_id=0, host_id=1, size=2),),
        ),
    ),
    hooks=Hooks(create_runtime=(Hook(path="/h", timeout=1),)),
    linux=Linux(
        namespaces=(Namespace(type="pid"), Namespace(type="network", path="/n")),
        devices=(Device(path="/dev/x", type="c", major=1, minor=2, file_mode=0o666, uid=0, gid=0),),
        cgroups_path="/c",
        rootfs_propagation="rslave",
        sysctl={"net.a": "1"},
        masked_paths=("/m",),
        readonly_paths=("/r",),
        resources=Resources(
            memory=Memory(limit=1, kernel_tcp=2, disable_oom_killer=True),
            cpu=CPU(shares=2, realtime_period=3, cpus="0"),
            pids=Pids(limit=0),
            block_io=BlockIO(
                throttle_read_bps_device=(ThrottleDevice(major=8, minor=0, rate=1),),
                throttle_write_iops_device=(ThrottleDevice(major=8, minor=0, rate=1),),
            ),
            hugepage_limits=(HugepageLimit(page_size="2MB", limit=0),),
            network=NetworkClass(class_id=1),
            rdma={"mlx5": Rdma(hca_handles=1)},
            unified={"memory.high": "1"},
        ),
        seccomp=Seccomp(
            default_action="SCMP_ACT_ALLOW",
            default_errno_ret=1,
            syscalls=(
                SeccompRule(
                    names=("x",),
                    action="SCMP_ACT_ERRNO",
                    errno_ret=38,
                    args=(SeccompArg(index=0, value=1, value_two=2, op="SCMP_CMP_MASKED_EQ"),),
                ),
            ),
        ),
    ),
)


def paths(value: object, at: str = "") -> set[str]:
    if isinstance(value, dict):
        return {path for key, below in value.items() for path in paths(below, f"{at}.{key}" if at else key)}
    if isinstance(value, list):
        return {path for below in value for path in paths(below, f"{at}[]")}
    return {at}


def test_every_name_is_oci() -> None:
    document = msgspec.json.decode(msgspec.json.encode(FULL))
    assert paths(document) >= set(
        """
        ociVersion process.args[] process.env[] process.cwd process.user.uid process.user.gid process.user.umask
        process.user.additionalGids[] process.terminal process.capabilities.bounding[] process.rlimits[].type
        process.rlimits[].soft process.rlimits[].hard process.noNewPrivileges process.oomScoreAdj
        process.apparmorProfile process.selinuxLabel process.execCPUAffinity.initial process.ioPriority.class
        root.path root.readonly mounts[].destination mounts[].uidMappings[].containerID
        mounts[].uidMappings[].hostID mounts[].uidMappings[].size hooks.createRuntime[].path
        linux.namespaces[].type linux.namespaces[].path linux.devices[].fileMode linux.cgroupsPath
        linux.rootfsPropagation linux.maskedPaths[] linux.readonlyPaths[] linux.resources.memory.kernelTCP
        linux.resources.memory.disableOOMKiller linux.resources.cpu.realtimePeriod linux.resources.pids.limit
        linux.resources.blockIO.throttleReadBpsDevice[].rate linux.resources.blockIO.throttleWriteIOPSDevice[].rate
        linux.resources.hugepageLimits[].pageSize linux.resources.hugepageLimits[].limit
        linux.resources.network.classID linux.resources.rdma.mlx5.hcaHandles linux.seccomp.defaultAction
        linux.seccomp.defaultErrnoRet linux.seccomp.syscalls[].errnoRet linux.seccomp.syscalls[].args[].valueTwo
        """.split()
    )


def test_a_spec_survives_the_wire() -> None:
    assert msgspec.json.decode(msgspec.json.encode(FULL), type=Spec) == FULL


def test_defaults_are_left_out_but_the_version() -> None:
    smallest = Spec(process=Process(cwd="/", user=User(uid=0, gid=0)), root=Root(path="rootfs"))
    assert msgspec.json.decode(msgspec.json.encode(smallest)) == {
        "ociVersion": spec.OCI_VERSION,
        "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
    }


def test_members_of_a_later_version_are_ignored() -> None:
    text = b'{"ociVersion":"1.3.0","process":{"cwd":"/","user":{"uid":1,"gid":2},"new":1},"root":{"path":"r"},"vm":{}}'
    assert msgspec.json.decode(text, type=Spec).process.user == User(uid=1, gid=2)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(AttributeError):
        FULL.root.path = "x"  # type: ignore[misc]

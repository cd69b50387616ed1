"""Mounts and devices of a container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from cri.container import host
from cri.translate import Handler, HostDevice
from cri.translate.devices import paths as device_paths
from cri.translate.mounts import ImageVolume, image_volumes, own_volumes
from cri.translate.resources import ALL_DEVICE_RULES, DEFAULT_DEVICE_RULES
from runtime.errors import InvalidSpec, Unsupported
from runtime.spec import Device, DeviceCgroup, IDMapping, Mount
from tests.cri.translate.given import HOST, container, linux, mount_at, sandbox_with, secured, spec

RSLAVE = pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER
RSHARED = pb.MountPropagation.PROPAGATION_BIDIRECTIONAL
NODE = pb.NamespaceMode.NODE
PRIVILEGED = sandbox_with(pb.LinuxSandboxSecurityContext(privileged=True))


def mounted(**fields: Any) -> Mount:
    """The one mount of a request, to /d from /s unless `fields` say otherwise."""
    fields = {"container_path": "/d", "host_path": "/s", **fields}
    return mount_at(spec(container(mounts=[pb.Mount(**fields)])), fields["container_path"])


def test_defaults_in_order() -> None:
    assert [(mount.destination, mount.type) for mount in spec().mounts] == [
        ("/proc", "proc"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/mqueue", "mqueue"),
        ("/sys", "sysfs"),
        ("/sys/fs/cgroup", "cgroup"),
        ("/etc/hostname", "bind"),
        ("/etc/hosts", "bind"),
        ("/etc/resolv.conf", "bind"),
        ("/dev/shm", "bind"),
    ]


@pytest.mark.parametrize(
    ("destination", "options"),
    [
        ("/proc", ("nosuid", "noexec", "nodev")),
        ("/dev", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        ("/dev/pts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
        ("/sys", ("nosuid", "noexec", "nodev", "ro")),
        ("/sys/fs/cgroup", ("nosuid", "noexec", "nodev", "relatime", "ro")),
        ("/dev/shm", ("bind", "rprivate", "rw", "nosuid", "noexec", "nodev")),
        ("/etc/hosts", ("bind", "rprivate", "rw")),
    ],
)
def test_default_options(destination: str, options: tuple[str, ...]) -> None:
    assert mount_at(spec(), destination).options == options


def test_privileged_and_handler_make_sys_and_cgroup_writable() -> None:
    privileged = spec(secured(privileged=True), pod=PRIVILEGED)
    assert "rw" in mount_at(privileged, "/sys").options
    assert "rw" in mount_at(privileged, "/sys/fs/cgroup").options
    writable = spec(handler=Handler(writable_cgroup=True))
    assert "rw" in mount_at(writable, "/sys/fs/cgroup").options
    assert "ro" in mount_at(writable, "/sys").options


def test_pod_files_are_read_only_with_the_root() -> None:
    made = spec(secured(readonly_rootfs=True))
    assert all("ro" in mount_at(made, f"/etc/{name}").options for name in ("hosts", "hostname", "resolv.conf"))
    assert "rw" in mount_at(made, "/dev/shm").options


def test_shm_is_the_pod_s_or_the_host_s() -> None:
    assert mount_at(spec(), "/dev/shm").source == "/pod/shm"
    host_ipc = sandbox_with(pb.LinuxSandboxSecurityContext(namespace_options=pb.NamespaceOption(ipc=NODE)))
    assert mount_at(spec(pod=host_ipc), "/dev/shm").source == "/dev/shm"


def test_requested_mounts_replace_defaults_and_are_sorted_by_depth() -> None:
    wanted = [
        pb.Mount(container_path="/a/b/c", host_path="/1"),
        pb.Mount(container_path="/etc/hosts/", host_path="/2"),
        pb.Mount(container_path="/a", host_path="/3"),
        pb.Mount(container_path="/dev/shm", host_path="/4"),
        pb.Mount(container_path="//a//b", host_path="/5"),
    ]
    made = spec(container(mounts=wanted))
    assert [(mount.destination, mount.source) for mount in made.mounts[6:]] == [
        ("/a", "/3"),
        ("/etc/hostname", "/pod/hostname"),
        ("/etc/resolv.conf", "/pod/resolv.conf"),
        ("/etc/hosts", "/2"),
        ("/dev/shm", "/4"),
        ("/a/b", "/5"),
        ("/a/b/c", "/1"),
    ]


def test_a_requested_dev_drops_all_defaults_below_it() -> None:
    made = spec(container(mounts=[pb.Mount(container_path="/dev", host_path="/dev")]))
    assert [mount.destination for mount in made.mounts if mount.destination.startswith("/dev")] == ["/dev"]


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, ("rbind", "rprivate", "rw")),
        ({"readonly": True}, ("rbind", "rprivate", "ro")),
        ({"propagation": RSLAVE}, ("rbind", "rslave", "rw")),
        ({"propagation": RSHARED, "readonly": True}, ("rbind", "rshared", "ro")),
        ({"readonly": True, "recursive_read_only": True}, ("rbind", "rprivate", "ro", "rro")),
        ({"mount_options": ["noexec", "nosuid", "noexec"]}, ("rbind", "rprivate", "rw", "noexec", "nosuid")),
    ],
)
def test_options(fields: dict[str, Any], options: tuple[str, ...]) -> None:
    assert mounted(**fields).options == (*options, "x-crib.mkdir")


def test_idmapped() -> None:
    mapping = [pb.IDMapping(container_id=0, host_id=65536, length=65536)]
    made = mounted(uidMappings=mapping, gidMappings=mapping)
    assert made.uid_mappings == made.gid_mappings == (IDMapping(container_id=0, host_id=65536, size=65536),)
    assert "ridmap" in made.options


def test_propagation_of_the_root() -> None:
    def root(*modes: pb.MountPropagation) -> str:
        wanted = [
            pb.Mount(container_path=f"/{number}", host_path="/", propagation=mode) for number, mode in enumerate(modes)
        ]
        return linux(spec(container(mounts=wanted))).rootfs_propagation

    assert root() == root(pb.MountPropagation.PROPAGATION_PRIVATE) == ""
    assert root(RSLAVE) == "rslave"
    assert root(RSLAVE, RSHARED) == "rshared"


ONE = [pb.IDMapping(length=1)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"container_path": ""}, "mounts.container_path is missing"),
        ({"container_path": "d"}, "mounts.container_path 'd': not an absolute path"),
        ({"container_path": "/d\n"}, "mounts.container_path '/d\\n'"),
        ({"container_path": "/x/.."}, "mounts '/': would hide"),
        ({"container_path": "/proc"}, "mounts '/proc': only the host's /proc"),
        ({"container_path": "/proc/self/attr"}, "mounts '/proc/self/attr': may not be mounted over"),
        ({"host_path": ""}, "mounts '/d': host_path is missing"),
        ({"host_path": "s"}, "mounts '/d': host_path 's': not an absolute path"),
        ({"host_path": "/s/../etc"}, "host_path '/s/../etc': a path may not hold '..'"),
        ({"host_path": "/" + "s" * 5000}, "longer than 4095 bytes"),
        ({"propagation": 9}, "propagation 9"),
        ({"recursive_read_only": True}, "recursive_read_only needs readonly"),
        ({"recursive_read_only": True, "readonly": True, "propagation": RSLAVE}, "PROPAGATION_HOST_TO_CONTAINER"),
        ({"recursive_read_only": True, "readonly": True, "propagation": RSHARED}, "PROPAGATION_BIDIRECTIONAL"),
        ({"mount_options": ["bind"]}, "mount_options 'bind' is not one of"),
        ({"mount_options": ["exec", "noexec"]}, "mount_options noexec and exec exclude each other"),
        ({"uidMappings": ONE}, "uidMappings and gidMappings only go together"),
        ({"uidMappings": [pb.IDMapping()], "gidMappings": ONE}, "uidMappings of length 0"),
        ({"uidMappings": ONE * 341, "gidMappings": ONE}, "uidMappings has 341 entries"),
        ({"image_sub_path": "x"}, "image_sub_path 'x' without an image"),
        ({"host_path": "", "image": pb.ImageSpec(image="i")}, "an image volume has to be readonly"),
        ({"image": pb.ImageSpec(image="i"), "readonly": True}, "host_path '/s' and image exclude each other"),
    ],
)
def test_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        mounted(**fields)
    assert said in str(error.value)


def test_unsupported() -> None:
    old = type(HOST)(recursive_read_only=False)
    rro = pb.Mount(container_path="/d", host_path="/s", readonly=True, recursive_read_only=True)
    with pytest.raises(Unsupported, match="RROUnsupported"):
        spec(container(mounts=[rro]), host=old)
    idmapped = pb.Mount(container_path="/d", host_path="/s", uidMappings=ONE, gidMappings=ONE)
    with pytest.raises(Unsupported, match="idmapped"):
        spec(container(mounts=[idmapped]), host=old)


def test_image_volumes() -> None:
    one = pb.Mount(container_path="/v//1", image=pb.ImageSpec(image="i"), image_sub_path="a/./b", readonly=True)
    two = pb.Mount(container_path="/v/2", image=pb.ImageSpec(image_ref="i@x"), readonly=True, mount_options=["noexec"])
    assert image_volumes([one, pb.Mount(container_path="/x", host_path="/y"), two]) == (
        ImageVolume("/v/1", pb.ImageSpec(image="i"), "a/b"),
        ImageVolume("/v/2", pb.ImageSpec(image_ref="i@x"), ""),
    )
    made = spec(container(mounts=[one, two]), image_volumes={"/v/1": "/m/1/a/b", "/v/2": "/m/2"})
    options = ("bind", "rprivate", "ro")
    assert mount_at(made, "/v/1") == Mount(destination="/v/1", type="bind", source="/m/1/a/b", options=options)
    assert mount_at(made, "/v/2").options == ("bind", "rprivate", "ro", "noexec")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"readonly": False}, "has to be readonly"),
        ({"host_path": "/x"}, "host_path '/x' and image exclude each other"),
        ({"propagation": RSHARED}, "can't have propagation PROPAGATION_BIDIRECTIONAL"),
        ({"image_sub_path": "../x"}, "image_sub_path '../x'"),
        ({"image_sub_path": "/x"}, "image_sub_path '/x': not a relative path"),
        ({"image_sub_path": "x\0"}, "image_sub_path 'x\\x00'"),
    ],
)
def test_image_volumes_refused(fields: dict[str, Any], said: str) -> None:
    fields = {"container_path": "/v", "image": pb.ImageSpec(image="i"), "readonly": True, **fields}
    with pytest.raises(InvalidSpec) as error:
        image_volumes([pb.Mount(**fields)])
    assert said in str(error.value)


def test_an_image_s_own_volumes() -> None:
    """As paths of the container, each once, in the order in which they are mounted; never its root."""
    paths = ["/b/c", "b", "/b/", "//b/./c", "/a/../b", "..", "/", "", "/new\nline", "/proc/x", "/v/below"]
    assert own_volumes(paths, [pb.Mount(container_path="/v")]) == ("/b", "/b/c", "/new\nline")
    with pytest.raises(InvalidSpec, match="image: 10000 volumes, the limit is 4096"):
        own_volumes([f"/{number}" for number in range(10_000)], [])
    for path, said in (("/" + "x" * 4999, "longer than 4095 bytes"), ("/n\0", "holds a NUL character")):
        with pytest.raises(InvalidSpec, match=f"image: VOLUME '/.*{said}"):
            own_volumes([path], [])
    with pytest.raises(InvalidSpec, match="image: names of volumes of 2048000 bytes, the limit is"):
        own_volumes([f"/{number:0>499}" for number in range(4096)], [])


def test_too_many() -> None:
    with pytest.raises(InvalidSpec, match="mounts: 5000 entries"):
        spec(container(mounts=[pb.Mount(container_path="/d", host_path="/s")] * 5000))


@pytest.mark.parametrize("target", ["/proc/cpuinfo", "/proc/net/dev", "/proc/sys/kernel/ns_last_pid"])
def test_what_lxcfs_mounts_over(target: str) -> None:
    assert mounted(container_path=target).destination == target


def test_the_host_s_proc_over_proc() -> None:
    made = spec(container(mounts=[pb.Mount(container_path="/proc", host_path="/proc/")]))
    assert mount_at(made, "/proc").type == "bind"


NULL = HostDevice("c", 1, 3, 0o20666, 0, 0)


def test_no_devices_but_the_default_rules() -> None:
    made = linux(spec())
    assert made.devices == ()
    assert made.resources is not None
    assert made.resources.devices == DEFAULT_DEVICE_RULES
    assert made.resources.devices[0] == DeviceCgroup(allow=False, access="rwm"), "deny first: later rules win"


def test_devices_and_their_rules() -> None:
    wanted = [
        pb.Device(host_path="/dev/null", container_path="/dev/mine", permissions="wr"),
        pb.Device(host_path="/dev/dir/", container_path="/dev/dir"),
    ]
    assert device_paths(wanted) == ("/dev/null", "/dev/dir")
    found = {"/dev/null": [NULL], "/dev/dir": [HostDevice("b", 8, 1, 0o660, 0, 6, below="a/b")]}
    made = linux(spec(container(devices=wanted), devices=found))
    assert made.devices == (
        Device(path="/dev/mine", type="c", major=1, minor=3, file_mode=0o666, uid=0, gid=0),
        Device(path="/dev/dir/a/b", type="b", major=8, minor=1, file_mode=0o660, uid=0, gid=6),
    )
    assert made.resources is not None
    assert made.resources.devices[len(DEFAULT_DEVICE_RULES) :] == (
        DeviceCgroup(allow=True, type="c", major=1, minor=3, access="rw"),
        DeviceCgroup(allow=True, type="b", major=8, minor=1, access="rwm"),
    )


def test_privileged_gets_every_device_of_the_host_unless_the_handler_says_no() -> None:
    every = {"/dev/null": NULL}
    made = linux(spec(secured(privileged=True), pod=PRIVILEGED, host_devices=every))
    assert [device.path for device in made.devices] == ["/dev/null"]
    assert made.resources is not None
    assert made.resources.devices == ALL_DEVICE_RULES
    handler = Handler(privileged_without_host_devices=True)
    less = linux(spec(secured(privileged=True), pod=PRIVILEGED, host_devices=every, handler=handler))
    assert less.devices == ()
    assert less.resources is not None
    assert less.resources.devices == DEFAULT_DEVICE_RULES


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (pb.Device(host_path="/dev/none", container_path="/dev/x"), "devices.host_path '/dev/none': no device"),
        (pb.Device(host_path="dev/null", container_path="/dev/x"), "devices.host_path 'dev/null'"),
        (pb.Device(host_path="/dev/../x", container_path="/dev/x"), "devices.host_path '/dev/../x'"),
        (pb.Device(host_path="/dev/null", container_path="x"), "devices.container_path 'x'"),
        (pb.Device(host_path="/dev/null", container_path="/x/.."), "devices.container_path '/'"),
        (pb.Device(host_path="/dev/null", permissions="rx"), "devices.permissions 'rx'"),
        (pb.Device(host_path="/dev/null", permissions="rr"), "devices.permissions 'rr'"),
    ],
)
def test_devices_refused(device: pb.Device, said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        spec(container(devices=[device]), devices={"/dev/null": [NULL]})
    assert said in str(error.value)


def test_what_is_no_directory_of_devices_is_not_searched_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        (tmp_path / f"{number}/below").mkdir(parents=True)
    wanted = container(devices=[pb.Device(host_path=str(tmp_path))])
    assert host.requested_devices(wanted) == {str(tmp_path): ()}
    monkeypatch.setattr(host, "_NAMES_LIMIT", 50)
    with pytest.raises(InvalidSpec, match=f"devices.host_path '{tmp_path}': holds more than 50 names"):
        host.requested_devices(wanted)

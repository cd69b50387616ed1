"""CDI: names, files, precedence and edits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cri.api import cri_pb2 as pb
from cri.container import host
from cri.translate import HostDevice, ResolvedUser, cdi
from runtime.errors import InvalidSpec, Unsupported
from runtime.spec import Device, DeviceCgroup, Hook, Mount
from tests.cri.translate.given import container, linux, mount_at, spec

NULL = HostDevice("c", 1, 3, 0o666, 0, 0)


def text(**fields: Any) -> bytes:
    whole = {
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/gpu",
        "containerEdits": {"env": ["COMMON=1", "WHO=file"], "mounts": [{"hostPath": "/lib/v", "containerPath": "/v"}]},
        "devices": [
            {"name": "0", "containerEdits": {"env": ["WHO=0"], "deviceNodes": [{"path": "/dev/gpu0"}]}},
            {"name": "1", "containerEdits": {"env": ["WHO=1"], "deviceNodes": [{"path": "/dev/gpu1"}]}},
        ],
        **fields,
    }
    return json.dumps(whole).encode()


def one_device(**edits: Any) -> bytes:
    return text(containerEdits={}, devices=[{"name": "0", "containerEdits": edits}])


def source(content: bytes, path: str = "/etc/cdi/a.json", priority: int = 0) -> cdi.Source:
    return cdi.parse(path, priority, content)


def named(*names: str, **fields: Any) -> pb.ContainerConfig:
    return container(CDI_devices=[pb.CDIDevice(name=name) for name in names], **fields)


def test_names_by_field_and_by_annotation_each_once() -> None:
    config = named(
        "v.com/a=x", "v.com/a=y", "v.com/a=x", annotations={"cdi.k8s.io/plugin": "v.com/a=y,v.com/a.b=z", "other": "w"}
    )
    assert cdi.requested(config) == ("v.com/a=x", "v.com/a=y", "v.com/a.b=z")
    assert cdi.requested(container()) == ()


@pytest.mark.parametrize("wrong", ["", "gpu0", "v.com/a", "v.com/a=", "v.com/a=x/y", "../a=b", "v.com/a=x\n"])
def test_names_refused(wrong: str) -> None:
    with pytest.raises(InvalidSpec, match="CDI_devices"):
        cdi.requested(named(wrong))


def test_a_file_s_own_edits_come_once_and_first() -> None:
    found = cdi.resolve(["vendor.com/gpu=1", "vendor.com/gpu=0"], [source(text())])
    assert [edit.env for edit in found] == [("COMMON=1", "WHO=file"), ("WHO=1",), ("WHO=0",)]
    assert cdi.paths(found) == ("/dev/gpu1", "/dev/gpu0")


def test_a_later_directory_wins_and_one_directory_contradicts_itself() -> None:
    low = source(one_device(env=["FROM=etc"]))
    high = source(one_device(env=["FROM=run"]), "/run/cdi/a.json", 1)
    assert cdi.resolve(["vendor.com/gpu=0"], [high, low])[-1].env == ("FROM=run",)
    with pytest.raises(InvalidSpec, match=r"in /etc/cdi/a\.json and /etc/cdi/b\.json"):
        cdi.resolve(["vendor.com/gpu=0"], [low, source(one_device(env=["A=1"]), "/etc/cdi/b.json")])


def test_a_file_in_yaml() -> None:
    content = b"cdiVersion: 0.5.0\nkind: v.com/c\ndevices:\n- name: all\n  containerEdits: {env: [A=1]}\n"
    (edits,) = (edit for edit in cdi.resolve(["v.com/c=all"], [source(content, "/run/cdi/v.yaml")]) if edit.env)
    assert edits.env == ("A=1",)
    assert source(b"{", "/run/cdi/v.yaml").error


def test_an_unknown_device_names_the_broken_files() -> None:
    with pytest.raises(InvalidSpec) as error:
        cdi.resolve(["vendor.com/gpu=9"], [source(text()), source(b"{", "/etc/cdi/bad.json")])
    assert "CDI_devices 'vendor.com/gpu=9': no such device (/etc/cdi/bad.json: " in str(error.value)


@pytest.mark.parametrize("content", [b"kind: 2001-13-45", b"kind: !!int ''", b"kind: &a [*a]", b"\xff", b"[" * 100000])
def test_a_broken_file_beside_matters_to_nobody_else(content: bytes) -> None:
    for path in ("/etc/cdi/bad.yaml", "/etc/cdi/bad.json"):
        broken = source(content, path)
        assert broken.content is None
        assert broken.error
        assert cdi.resolve(["vendor.com/gpu=0"], [source(text()), broken])


@pytest.mark.parametrize("edit", ["netDevices", "intelRdt"])
def test_an_edit_that_is_not_made_is_refused_for_the_devices_that_have_it(edit: str) -> None:
    value: Any = [{"hostInterfaceName": "a", "name": "b"}] if edit == "netDevices" else {"closID": "x"}
    devices = [{"name": "0", "containerEdits": {edit: value}}, {"name": "1", "containerEdits": {"env": ["A=1"]}}]
    found = [source(text(devices=devices))]
    with pytest.raises(Unsupported) as error:
        cdi.resolve(["vendor.com/gpu=0"], found)
    assert str(error.value) == f"CDI_devices 'vendor.com/gpu=0': crib doesn't make the edit {edit} of /etc/cdi/a.json"
    assert len(cdi.resolve(["vendor.com/gpu=1"], found)) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", ""),
        (b"[]", "object"),
        (text(cdiVersion="2.0.0"), "cdiVersion '2.0.0'"),
        (text(kind="gpu"), "kind 'gpu'"),
        (text(newThing=1), "newThing"),
        (text(devices=[{"name": "a", "containerEdits": {}}] * 2), "two devices"),
        (text(devices=[{"name": "a/b", "containerEdits": {}}]), "device 'a/b'"),
        (one_device(env=["secret"]), "env 'secret'"),
        (one_device(deviceNodes=[{"path": "gpu"}]), "deviceNodes.path 'gpu'"),
        (one_device(deviceNodes=[{"path": "/g", "permissions": "x"}]), "permissions 'x'"),
        (one_device(deviceNodes=[{"path": "/g", "type": "z"}]), "deviceNodes.type 'z'"),
        (one_device(mounts=[{"hostPath": "a", "containerPath": "/b"}]), "mounts.hostPath 'a'"),
        (one_device(hooks=[{"hookName": "later", "path": "/h"}]), "hooks.hookName 'later'"),
        (one_device(additionalGIDs=[-1]), "additionalGIDs -1"),
        (b" " * (cdi.FILE_LIMIT_BYTES + 1), "longer than"),
    ],
)
def test_files_refused(content: bytes, said: str) -> None:
    broken = source(content)
    assert broken.content is None
    assert broken.error
    assert said in broken.error


def applied(*contents: bytes, name: str = "vendor.com/gpu=0", hooks: bool = True, **kwargs: Any) -> Any:
    edits = cdi.resolve([name], [source(content, f"/etc/cdi/{n}.json") for n, content in enumerate(contents)])
    return cdi.apply(spec(**kwargs), edits, {path: [NULL] for path in cdi.paths(edits)}, hooks=hooks)


def test_environment_and_mounts_replace() -> None:
    made = applied(
        one_device(
            env=["HOME=/cdi", "NEW=1"],
            mounts=[
                {"hostPath": "/lib/v", "containerPath": "/etc/hosts", "options": ["ro", "bind"]},
                {"hostPath": "/x", "containerPath": "/t/u//v/"},
                {"hostPath": "tmpfs", "containerPath": "/s", "type": "tmpfs", "options": ["size=1m"]},
            ],
        )
    )
    assert [entry for entry in made.process.env if entry.startswith(("HOME", "NEW"))] == ["HOME=/cdi", "NEW=1"]
    assert mount_at(made, "/etc/hosts") == Mount(
        destination="/etc/hosts", type="bind", source="/lib/v", options=("ro", "bind")
    )
    assert mount_at(made, "/t/u/v").options == ("rbind",)
    assert mount_at(made, "/s") == Mount(destination="/s", type="tmpfs", source="tmpfs", options=("size=1m",))
    depths = [mount.destination.count("/") for mount in made.mounts]
    assert depths == sorted(depths)


def test_an_images_own_volumes_stay_before_what_is_mounted() -> None:
    """A link in the image leads none of them onto a mount (CVE-2022-23648)."""
    edited = one_device(mounts=[{"hostPath": "/x", "containerPath": "/t"}])
    made = applied(edited, own_volumes={"/a/b/c/d": "/own/0"})
    places = [mount.destination for mount in made.mounts]
    assert places.index("/a/b/c/d") < min(places.index(each) for each in ("/t", "/etc/hosts"))


def test_devices_are_completed_from_the_host_and_allowed() -> None:
    nodes = [
        {"path": "/dev/gpu0", "permissions": "rw"},
        {"path": "/dev/b", "type": "b", "major": 8, "minor": 1, "fileMode": 0o600, "uid": 7},
        {"path": "/dev/renamed", "hostPath": "/dev/null"},
        {"path": "/dev/pipe", "type": "p"},
    ]
    made = linux(applied(one_device(deviceNodes=nodes), user=ResolvedUser(1000, 1000, (1000,))))
    assert made.devices == (
        Device(path="/dev/gpu0", type="c", major=1, minor=3, file_mode=0o666, uid=1000, gid=1000),
        Device(path="/dev/b", type="b", major=8, minor=1, file_mode=0o600, uid=7, gid=1000),
        Device(path="/dev/renamed", type="c", major=1, minor=3, file_mode=0o666, uid=1000, gid=1000),
        Device(path="/dev/pipe", type="p", uid=1000, gid=1000),
    )
    assert made.resources is not None
    assert made.resources.devices[-3:] == (
        DeviceCgroup(allow=True, type="c", major=1, minor=3, access="rw"),
        DeviceCgroup(allow=True, type="b", major=8, minor=1, access="rwm"),
        DeviceCgroup(allow=True, type="c", major=1, minor=3, access="rwm"),
    )


def test_a_device_that_is_not_there() -> None:
    edits = cdi.resolve(["vendor.com/gpu=0"], [source(text())])
    with pytest.raises(InvalidSpec, match="CDI_devices: '/dev/gpu0': no device there"):
        cdi.apply(spec(), edits, {}, hooks=True)


def test_groups_and_hooks() -> None:
    hooks = [
        {"hookName": "createContainer", "path": "/h", "args": ["h", "x"], "env": ["A=1"], "timeout": 3},
        {"hookName": "prestart", "path": "/p"},
    ]
    content = one_device(additionalGIDs=[44, 0, 5], hooks=hooks)
    made = applied(content)
    assert made.process.user.additional_gids == (0, 5, 44)
    assert made.hooks.create_container == (Hook(path="/h", args=("h", "x"), env=("A=1",), timeout=3),)
    assert made.hooks.prestart == (Hook(path="/p"),)
    with pytest.raises(Unsupported, match="hooks can't be run"):
        applied(content, hooks=False)


def test_from_the_files_of_two_directories(tmp_path: Path) -> None:
    low, high = tmp_path / "etc", tmp_path / "run"
    low.mkdir()
    (low / "v.json").write_bytes(
        one_device(env=["FROM=etc"], deviceNodes=[{"path": "/dev/mine", "hostPath": "/dev/null"}])
    )
    (low / "ignored.txt").write_bytes(b"{")
    config, directories = named("vendor.com/gpu=0"), (str(low), str(high))
    made = host.with_cdi_devices(config, spec(config), directories)
    assert "FROM=etc" in made.process.env
    status = os.stat("/dev/null")
    assert [(node.path, node.major, node.minor) for node in linux(made).devices] == [
        ("/dev/mine", os.major(status.st_rdev), os.minor(status.st_rdev))
    ]
    high.mkdir()
    (high / "v.json").write_bytes(one_device(env=["FROM=run"]))
    assert "FROM=run" in host.with_cdi_devices(config, spec(config), directories).process.env, "read again"


def test_a_request_without_devices_reads_nothing() -> None:
    plain = spec()
    assert host.with_cdi_devices(container(), plain, ("/nowhere",)) is plain

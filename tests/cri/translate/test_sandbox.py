"""A sandbox request to its plan, the pod's files, sysctls and names."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.api import cri_pb2 as pb
from cri.translate import (
    Defaults,
    HostPort,
    PodPlan,
    container_key,
    difference,
    etc,
    fingerprint,
    hosts,
    log_path,
    sandbox_key,
    sandbox_to_pod,
    sysctls,
)
from runtime.errors import InvalidSpec
from tests.cri.translate.given import DEFAULTS, HOST, container, sandbox, sandbox_with

NODE = pb.NamespaceMode.NODE
NO_POLICY = cast(pb.SupplementalGroupsPolicy, 9)
HOST_NETWORK = pb.LinuxSandboxSecurityContext(namespace_options=pb.NamespaceOption(network=NODE, ipc=NODE))


def plan(config: pb.PodSandboxConfig, defaults: Defaults = DEFAULTS) -> PodPlan:
    return sandbox_to_pod(config, defaults=defaults, host=HOST)


def linux(**fields: Any) -> pb.PodSandboxConfig:
    return sandbox(linux=pb.LinuxPodSandboxConfig(**fields))


def test_the_plainest_pod() -> None:
    made = plan(sandbox())
    assert made.name_key == "pod_default_u-1_0"
    assert (made.network, made.ipc, made.pid, made.user) == (True, True, True, None)
    assert made.hostname == "pod"
    assert made.etc_hostname("node-1") == "pod\n"
    assert made.shm_bytes == 64 << 20
    assert (made.cgroup_parent, made.resolv_conf, made.log_directory) == ("", None, "")
    assert not made.privileged
    assert made.selinux.process == ""


def test_on_the_host_s_network() -> None:
    made = plan(sandbox_with(HOST_NETWORK, port_mappings=[pb.PortMapping(container_port=80, host_port=80)]))
    assert (made.network, made.ipc, made.hostname) == (False, False, None)
    assert made.etc_hostname("node-1") == "node-1\n"
    assert made.sysctls == {}
    assert made.host_ports == (), "a container's port is the host's"


def test_a_pod_without_a_hostname_has_the_node_s() -> None:
    assert plan(sandbox(hostname="")).hostname == "node-1"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (pb.PodSandboxConfig(), "metadata is missing"),
        (sandbox(metadata=pb.PodSandboxMetadata(namespace="n", uid="u")), "metadata.name is missing"),
        (sandbox(metadata=pb.PodSandboxMetadata(name="n", uid="u")), "metadata.namespace is missing"),
        (sandbox(metadata=pb.PodSandboxMetadata(name="n", namespace="n")), "metadata.uid is missing"),
        (sandbox(metadata=pb.PodSandboxMetadata(name="../n", namespace="n", uid="u")), "metadata.name '../n'"),
        (sandbox(hostname="a b"), "hostname 'a b'"),
        (sandbox(hostname="x\n127.0.0.1 evil"), "hostname 'x\\n"),
        (sandbox(hostname="h" * 65), "hostname 'hhh"),
        (sandbox(log_directory="logs"), "log_directory 'logs': not an absolute path"),
        (sandbox(log_directory="/var/log/../../etc"), "log_directory '/var/log/../../etc'"),
        (sandbox(annotations={"crib/shm-size": "1"}), "annotations crib/shm-size '1'"),
        (sandbox(annotations={"crib/shm-size": "lots"}), "annotations crib/shm-size 'lots'"),
        (sandbox(labels={"a": "x" * (1 << 20)}), "labels: 1048577 bytes"),
        (sandbox(annotations={"a": "x" * (9 << 20)}), "sandbox config: "),
        (linux(cgroup_parent="/a/../b"), "cgroup_parent '/a/../b'"),
        (linux(cgroup_parent="/"), "cgroup_parent '/'"),
        (linux(cgroup_parent="/a b"), "cgroup_parent '/a b'"),
        (linux(sysctls={"kernel.core_pattern": "|/x"}), "sysctls kernel.core_pattern"),
        (sandbox_with(pb.LinuxSandboxSecurityContext(run_as_group=pb.Int64Value(value=5))), "run_as_group 5"),
        (sandbox_with(pb.LinuxSandboxSecurityContext(run_as_user=pb.Int64Value(value=-5))), "run_as_user -5"),
        (sandbox_with(pb.LinuxSandboxSecurityContext(supplemental_groups=[1 << 40])), "supplemental_groups 1099"),
        (sandbox_with(pb.LinuxSandboxSecurityContext(supplemental_groups_policy=NO_POLICY)), "policy 9: neither"),
        (
            sandbox_with(pb.LinuxSandboxSecurityContext(seccomp=pb.SecurityProfile(profile_type=9))),  # type: ignore[arg-type]
            "seccomp.profile_type 9",
        ),
        (sandbox(dns_config=pb.DNSConfig(servers=["dns.example"])), "dns_config.servers 'dns.example'"),
        (sandbox(port_mappings=[pb.PortMapping(container_port=80, host_port=70000)]), "port_mappings.host_port 70000"),
        (sandbox(port_mappings=[pb.PortMapping(host_port=80)]), "port_mappings.container_port 0"),
        (
            sandbox(port_mappings=[pb.PortMapping(container_port=1, host_port=80, host_ip="x")]),
            "port_mappings.host_ip 'x'",
        ),
        (
            sandbox(port_mappings=[pb.PortMapping(container_port=port, host_port=80) for port in (1, 2)]),
            "port_mappings.host_port 80/tcp: leads to two",
        ),
    ],
)
def test_refused(config: pb.PodSandboxConfig, said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        plan(config)
    assert said in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("given_parent", "expected"),
    [
        ("/kubepods/burstable/pod1", "/kubepods/burstable/pod1"),
        ("kubepods//x/", "/kubepods/x"),
        ("kubepods-burstable-pod1.slice", "kubepods-burstable-pod1.slice"),
        ("/a.slice/b.slice", "/a.slice/b.slice"),
    ],
)
def test_cgroup_parent(given_parent: str, expected: str) -> None:
    assert plan(linux(cgroup_parent=given_parent)).cgroup_parent == expected


@pytest.mark.parametrize(("text", "size"), [("128Mi", 128 << 20), ("1G", 10**9), ("4096", 4096), ("2Gi", 2 << 30)])
def test_shm_size(text: str, size: int) -> None:
    assert plan(sandbox(annotations={"crib/shm-size": text})).shm_bytes == size


def test_host_ports() -> None:
    tcp = pb.PortMapping(container_port=80, host_port=8080)
    udp = pb.PortMapping(protocol=pb.Protocol.UDP, container_port=53, host_port=8080, host_ip="127.0.0.1")
    declared = pb.PortMapping(container_port=9)
    any4 = pb.PortMapping(protocol=pb.Protocol.SCTP, container_port=7, host_port=7, host_ip="0.0.0.0")
    assert plan(sandbox(port_mappings=[tcp, tcp, udp, declared, any4])).host_ports == (
        HostPort("tcp", 80, 8080, ""),
        HostPort("udp", 53, 8080, "127.0.0.1"),
        HostPort("sctp", 7, 7, ""),
    )


def test_sysctls_and_their_defaults() -> None:
    asked = {"kernel.shm_rmid_forced": "1", "net/ipv4/conf/eth0.1/forwarding": "1", "fs.mqueue.msg_max": "100"}
    defaults = Defaults(node_name="n", sysctls={"net.core.somaxconn": "9", "kernel.shmmax": "5"})
    assert plan(linux(sysctls=asked), defaults).sysctls == {
        "kernel.shm_rmid_forced": "1",
        "net.ipv4.conf.eth0/1.forwarding": "1",
        "fs.mqueue.msg_max": "100",
        "net.ipv4.ip_unprivileged_port_start": "0",
        "net.ipv4.ping_group_range": "0 2147483647",
        "net.core.somaxconn": "9",
        "kernel.shmmax": "5",
    }
    request_wins = linux(sysctls={"net.ipv4.ip_unprivileged_port_start": "1024", "net.core.somaxconn": "1"})
    assert plan(request_wins, defaults).sysctls["net.ipv4.ip_unprivileged_port_start"] == "1024"
    assert plan(request_wins, defaults).sysctls["net.core.somaxconn"] == "1"
    assert plan(sandbox_with(HOST_NETWORK), defaults).sysctls == {}, "none of these is the pod's"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("net.ipv4.ip_forward", "1", "sysctls net.ipv4.ip_forward: the pod is in the host's network namespace"),
        ("kernel.sem", "1", "sysctls kernel.sem: the pod is in the host's ipc namespace"),
        ("vm.overcommit_memory", "1", "belongs to no namespace"),
        ("kernel.hostname", "x", "belongs to no namespace"),
    ],
)
def test_sysctls_of_the_host(name: str, value: str, said: str) -> None:
    config = pb.LinuxPodSandboxConfig(security_context=HOST_NETWORK, sysctls={name: value})
    with pytest.raises(InvalidSpec) as error:
        plan(sandbox(linux=config))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("net", "1"),
        ("net..x", "1"),
        ("../net.x", "1"),
        ("net.ipv4/../../kernel/core_pattern", "1"),
        ("net.x\n", "1"),
        ("net." + "x" * 300, "1"),
        ("net.x", ""),
        ("net.x", "1\nkernel.core_pattern=x"),
        ("net.x", "1+kernel.core_pattern=x"),
        ("net.x", "9" * 2000),
    ],
)
def test_sysctl_syntax(name: str, value: str) -> None:
    with pytest.raises(InvalidSpec, match="sysctls"):
        plan(linux(sysctls={name: value}))


def test_a_sysctl_given_in_two_spellings() -> None:
    with pytest.raises(InvalidSpec, match="given twice"):
        plan(linux(sysctls={"net.core.somaxconn": "1", "net/core/somaxconn": "2"}))


words = st.text(st.sampled_from("netkrl.shmv4/-_ \n=+0é\0"), max_size=24)


@given(words | words.map("net.".__add__), words)
def test_an_accepted_sysctl_stays_inside(name: str, value: str) -> None:
    try:
        made = sysctls.pod_sysctls({name: value}, own_network=True, own_ipc=True, own_user=True, default={})
    except InvalidSpec:
        return
    ((accepted, written),) = made.items()
    path = accepted.translate(str.maketrans("./", "/."))
    assert path.startswith(("net/", "kernel/sem", "kernel/shm", "kernel/msg", "fs/mqueue/"))
    assert not {"", ".", ".."} & set(path.split("/"))
    assert not set(written) & set("\n=+\0")


def test_resolv_conf() -> None:
    dns = pb.DNSConfig(servers=["10.96.0.10", "fd00::a"], searches=["a.b", "c"], options=["ndots:5", "edns0"])
    assert plan(sandbox(dns_config=dns)).resolv_conf == (
        "search a.b c\nnameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5 edns0\n"
    )
    assert plan(sandbox(dns_config=pb.DNSConfig())).resolv_conf is None


@pytest.mark.parametrize(
    ("dns", "said"),
    [
        (pb.DNSConfig(servers=["1.2.3"]), "servers '1.2.3'"),
        (pb.DNSConfig(servers=["1.1.1.1"] * 17), "servers: 17 entries"),
        (pb.DNSConfig(servers=["fe80::1%a b"]), "servers 'fe80::1%a b'"),
        (pb.DNSConfig(searches=["a b"]), "searches 'a b'"),
        (pb.DNSConfig(searches=["a\nnameserver 6.6.6.6"]), "searches 'a\\n"),
        (pb.DNSConfig(searches=["a"] * 33), "searches: 33 entries"),
        (pb.DNSConfig(searches=["a" * 200] * 12), "searches: 2411 characters"),
        (pb.DNSConfig(options=[""]), "options ''"),
        (pb.DNSConfig(options=["x"] * 33), "options: 33 entries"),
    ],
)
def test_resolv_conf_refused(dns: pb.DNSConfig, said: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        etc.resolv_conf(dns)
    assert f"dns_config.{said}" in str(error.value)


texts = st.lists(st.text(max_size=20), max_size=4)


@given(st.lists(st.ip_addresses().map(str) | st.text(max_size=9), max_size=4), texts, texts)
def test_an_accepted_dns_config_has_only_its_own_lines(
    servers: list[str], searches: list[str], options: list[str]
) -> None:
    dns = pb.DNSConfig(servers=servers, searches=searches, options=options)
    try:
        text = etc.resolv_conf(dns) or ""
    except InvalidSpec:
        return
    assert [line.split()[0] for line in text.splitlines()] == (
        ["search"] * bool(searches) + ["nameserver"] * len(servers) + ["options"] * bool(options)
    )
    assert text == "" or text.endswith("\n")


def test_hosts() -> None:
    assert hosts("pod", ["10.0.0.2", "fd00::2"]).splitlines()[-2:] == ["10.0.0.2\tpod", "fd00::2\tpod"]
    assert "127.0.0.1\tlocalhost" in hosts("pod", [])


@pytest.mark.parametrize(
    ("directory", "relative", "expected"),
    [
        ("/var/log/pods/x", "c/0.log", "/var/log/pods/x/c/0.log"),
        ("/var/log//pods/", "./c//0.log", "/var/log/pods/c/0.log"),
        ("", "c/0.log", None),
        ("/var/log", "", None),
    ],
)
def test_log_path(directory: str, relative: str, expected: str | None) -> None:
    assert log_path(directory, relative) == expected


@pytest.mark.parametrize(
    "relative", ["../x", "a/../../x", "/etc/passwd", "a\0b", "a\nb", ".", "a/", "x" * 5000, "x" * 256 + "/0"]
)
def test_log_path_refused(relative: str) -> None:
    with pytest.raises(InvalidSpec, match="log_path"):
        log_path("/var/log", relative)


def test_keys_are_unambiguous() -> None:
    one = pb.PodSandboxMetadata(name="a_b", namespace="c", uid="u")
    two = pb.PodSandboxMetadata(name="a", namespace="b_c", uid="u")
    three = pb.PodSandboxMetadata(name="a%5Fb", namespace="c", uid="u")
    assert len({sandbox_key(metadata) for metadata in (one, two, three)}) == 3
    assert container_key(pb.ContainerMetadata(name="c", attempt=2), sandbox().metadata) == "c_pod_default_u-1_2"


def test_fingerprints_ignore_the_order_of_map_entries() -> None:
    one, two = sandbox(labels={"a": "1", "b": "2"}), sandbox(labels={"b": "2", "a": "1"})
    assert fingerprint(one) == fingerprint(two)
    assert difference(one, two) is None
    assert fingerprint(one, two) != fingerprint(one)
    assert fingerprint(one) != fingerprint(sandbox(labels={"a": "1"}))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (sandbox(hostname="a"), sandbox(hostname="b"), "hostname: 'a', then 'b'"),
        (sandbox(labels={"a": "1"}), sandbox(labels={"a": "2"}), "labels['a']: '1', then '2'"),
        (sandbox(), linux(cgroup_parent="/x"), "linux is set in one of them only"),
        (linux(cgroup_parent="/x"), linux(cgroup_parent="/y"), "linux.cgroup_parent: '/x', then '/y'"),
        (container(command=["a"]), container(command=["a", "b"]), "command: 1 entries, then 2"),
        (container(command=["a"]), container(command=["b"]), "command[0]: 'a', then 'b'"),
        (
            container(mounts=[pb.Mount(host_path="/a")]),
            container(mounts=[pb.Mount(host_path="/b")]),
            "mounts[0].host_path: '/a', then '/b'",
        ),
        (
            container(envs=[pb.KeyValue(key="K", value=b"secret1")]),
            container(envs=[pb.KeyValue(key="K", value=b"secret2")]),
            "envs[0].value differs",
        ),
        (
            pb.LinuxContainerSecurityContext(run_as_user=pb.Int64Value()),
            pb.LinuxContainerSecurityContext(),
            "run_as_user is set in one of them only",
        ),
    ],
)
def test_the_first_difference(first: Any, second: Any, said: str) -> None:
    assert difference(first, second) == said

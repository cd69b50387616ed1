"""hosts.toml as containerd reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import InvalidSpec
from runtime.images.hosts import Endpoint, Tls, endpoints, is_loopback


def write(directory: Path, registry: str, text: str) -> Path:
    (directory / registry).mkdir()
    (directory / registry / "hosts.toml").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("registry", "base"),
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("example.com", "https://example.com/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.9:5000", "http://127.0.0.9:5000/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("127.0.0.1:443", "https://127.0.0.1:443/v2"),
        ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
    ],
)
def test_without_configuration(registry: str, base: str, tmp_path: Path) -> None:
    for hosts_dir in (None, tmp_path, tmp_path / "missing"):
        assert endpoints(registry, hosts_dir) == [Endpoint(base, True)]


def test_loopback() -> None:
    assert is_loopback("localhost")
    assert is_loopback("[::1]:80")
    assert not is_loopback("localhost.example.com")
    assert not is_loopback("128.0.0.1")


def test_everything(tmp_path: Path) -> None:
    write(
        tmp_path,
        "docker.io",
        """
        server = "https://docker.io"
        ca = "upstream.pem"
        [host."https://first:5000"]
          capabilities = ["pull", "resolve"]
          ca = ["one.pem", "/etc/two.pem"]
          client = [["c.pem", "k.pem"], ["both.pem", ""]]
          skip_verify = true
          [host."https://first:5000".header]
            X-One = ["a", "b"]
            Authorization = "Basic x"
        [host."http://second/proxy/docker"]
          override_path = true
        [host."third"]
          capabilities = ["push"]
        [host."localhost:5001"]
          client = "pair.pem"
        """,
    )
    d = tmp_path / "docker.io"
    assert endpoints("docker.io", tmp_path) == [
        Endpoint(
            "https://first:5000/v2",
            False,
            frozenset({"pull", "resolve"}),
            Tls(
                ca=(f"{d}/one.pem", "/etc/two.pem"),
                client=((f"{d}/c.pem", f"{d}/k.pem"), (f"{d}/both.pem", None)),
                skip_verify=True,
            ),
            (("X-One", "a, b"), ("Authorization", "Basic x")),
        ),
        Endpoint("http://second/proxy/docker", False),
        Endpoint("http://localhost:5001/v2", False, tls=Tls(client=((f"{d}/pair.pem", None),))),
        Endpoint("https://registry-1.docker.io/v2", True, tls=Tls(ca=(f"{d}/upstream.pem",))),
    ]
    assert "Basic x" not in repr(endpoints("docker.io", tmp_path))


def test_which_directory(tmp_path: Path) -> None:
    write(tmp_path, "_default", '[host."https://fallback"]')
    assert [e.base for e in endpoints("r.example:5000", tmp_path)] == [
        "https://fallback/v2",
        "https://r.example:5000/v2",
    ]
    write(tmp_path, "r.example:5000", 'server = "https://colon"')
    assert [e.base for e in endpoints("r.example:5000", tmp_path)] == ["https://colon/v2"]
    write(tmp_path, "r.example_5000_", 'server = "https://underscore"')
    assert [e.base for e in endpoints("r.example:5000", tmp_path)] == ["https://underscore/v2"]


def test_the_server_among_the_hosts_is_asked_once_and_is_the_upstream(tmp_path: Path) -> None:
    write(tmp_path, "r.example", 'server = "https://r.example"\n[host."https://r.example"]\n[host."https://m"]')
    found = endpoints("r.example", tmp_path)
    assert [(e.base, e.upstream) for e in found] == [("https://r.example/v2", True), ("https://m/v2", False)]


def test_a_server_of_another_name_than_the_registrys_is_the_upstream(tmp_path: Path) -> None:
    write(tmp_path, "r.example", 'server = "https://s.example"\n[host."https://s.example"]\nskip_verify = true')
    [endpoint] = endpoints("r.example", tmp_path)
    assert endpoint == Endpoint("https://s.example/v2", True, tls=Tls(skip_verify=True))


def test_certificates_without_a_file(tmp_path: Path) -> None:
    directory = tmp_path / "localhost:5000"
    directory.mkdir()
    for name in ("ca.crt", "me.cert", "me.key"):
        (directory / name).touch()
    [endpoint] = endpoints("localhost:5000", tmp_path)
    assert endpoint.base == "https://localhost:5000/v2", "certificates mean TLS"
    assert endpoint.tls == Tls((f"{directory}/ca.crt",), ((f"{directory}/me.cert", f"{directory}/me.key"),))


@pytest.mark.parametrize(
    "text",
    [
        "server = 1",
        "server = [",
        "host = 1",
        '[host."ftp://x"]',
        '[host."https://user:password@x"]',
        '[host."https://x:port"]',
        '[host."https://x"]\ncapabilities = ["fly"]',
        '[host."https://x"]\nca = 1',
        '[host."https://x"]\nskip_verify = "yes"',
        '[host."https://x"]\nclient = [["a"]]',
        '[host."https://x"]\nheader = "a"',
    ],
)
def test_malformed(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"hosts.toml"):
        endpoints("x", write(tmp_path, "x", text))


def test_an_unusable_certificate(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"certificate file .*/none.pem"):
        Tls(ca=(f"{tmp_path}/none.pem",)).context()

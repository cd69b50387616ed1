"""Names of images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidSpec
from runtime.images.reference import parse

D = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("user/app", "docker.io/user/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:v1", "localhost:5000/app:v1"),
        ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
        ("[::1]:5000/a/b:c", "[::1]:5000/a/b:c"),
        ("127.0.0.1:5000/a/b__c/d-e.f", "127.0.0.1:5000/a/b__c/d-e.f:latest"),
        (f"busybox@{D}", f"docker.io/library/busybox@{D}"),
        (f"busybox:1@{D}", f"docker.io/library/busybox@{D}"),
        ("cafe", "docker.io/library/cafe:latest"),
    ],
)
def test_normalised(text: str, normalised: str) -> None:
    assert str(parse(text)) == normalised


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "UPPER",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:" + "t" * 129,
        "a@sha256:123",
        "a@",
        "a:b:c",
        "host:port/a",
        "-a",
        "a" * 256,
        "a/../b",
        "http://host/a",
        "a\n",
        "a:b\n",
        "f" * 64,
        "sha256:" + "f" * 64,
        f"a@md5:{'0' * 32}",
    ],
)
def test_malformed(text: str) -> None:
    with pytest.raises(InvalidSpec, match="image reference"):
        parse(text)


@given(st.text(max_size=80))
def test_what_parses_is_stable(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidSpec:
        return
    assert parse(str(reference)) == parse(str(parse(str(reference))))
    assert "\n" not in str(reference)
    assert ".." not in str(reference)

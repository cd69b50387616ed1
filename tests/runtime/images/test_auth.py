"""Challenges and credentials."""

from __future__ import annotations

import base64
import time

import pytest

from runtime.errors import InvalidSpec
from runtime.images import Auth
from runtime.images.auth import Challenge, applies, challenges, read_token, token_request, user_and_password
from runtime.images.errors import BadContent


def test_challenges() -> None:
    header = 'Bearer realm="https://t/token",service="s",scope="repository:a/b:pull,push"'
    bearer = Challenge("bearer", "https://t/token", "s", "repository:a/b:pull,push")
    assert challenges(header) == [bearer]
    assert challenges(f'Basic realm="x", {header}') == [bearer, Challenge("basic", "x")]
    assert challenges('Basic realm="Bearer of news"') == [Challenge("basic", "Bearer of news")]
    assert challenges("Negotiate") == []
    assert challenges("") == []
    assert challenges("Bearer " + 'a="' * 10_000)[0].realm == ""


def test_credentials() -> None:
    assert user_and_password(Auth(username="u", password="p")) == ("u", "p")
    assert user_and_password(Auth(auth=base64.b64encode(b"u:p:q").decode())) == ("u", "p:q")
    assert user_and_password(Auth()) is None
    for bad in ("!", base64.b64encode(b"nocolon").decode(), base64.b64encode(b"\xff:").decode()):
        with pytest.raises(InvalidSpec, match="credentials"):
            user_and_password(Auth(auth=bad))


def test_nothing_secret_is_shown() -> None:
    secret = Auth("u", "hunter2", "hunter2", "hunter2", "hunter2", "host")
    assert "hunter2" not in repr(secret)


@pytest.mark.parametrize(
    ("address", "registry", "meant"),
    [
        ("", "any", True),
        ("r.example", "r.example", True),
        ("https://r.example/v1/", "r.example", True),
        ("https://index.docker.io/v1/", "docker.io", True),
        ("r.example", "evil.example", False),
        ("r.example", "r.example:5000", False),
    ],
)
def test_whom_credentials_are_for(address: str, registry: str, meant: bool) -> None:
    assert applies(Auth("u", "p", server_address=address), registry) is meant


def test_token_requests() -> None:
    challenge = Challenge("bearer", "https://t/token?x=1", "s v", "")
    request = token_request(challenge, "a/b", Auth("u", "p"))
    assert request.url == "https://t/token?x=1&scope=repository%3Aa%2Fb%3Apull&service=s+v"
    assert request.headers == {"Authorization": "Basic dTpw"}
    assert request.body is None
    assert token_request(challenge, "a/b", None).headers == {}
    request = token_request(challenge, "a/b", Auth(identity_token="refresh"))
    assert request.url == challenge.realm
    assert request.body is not None
    assert b"refresh_token=refresh" in request.body
    with pytest.raises(BadContent, match="not a URL"):
        token_request(Challenge("bearer", "file:///etc/passwd"), "a", None)


def test_tokens() -> None:
    token, until = read_token(b'{"token": "t", "expires_in": 300}', "h")
    assert token == "t"
    assert until == pytest.approx(time.monotonic() + 295, abs=5)
    assert read_token(b'{"access_token": "t"}', "h")[0] == "t"
    for bad in (b"<html>", b"{}", b'{"token": "a\\r\\nX: y"}', b'{"token": 1}'):
        with pytest.raises(BadContent, match="token service at h answers"):
            read_token(bad, "h")

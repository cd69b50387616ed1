"""Credentials towards one registry: Basic, and the bearer token flow of the distribution project.

Protocol: distribution docs/spec/auth (token, oauth). Nothing here is logged; an error names a host, never a secret.
"""

import base64
import binascii
import re
import time
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

import msgspec

from runtime.errors import InvalidSpec
from runtime.images.errors import BadContent
from runtime.images.image import Auth
from runtime.images.reference import DEFAULT_REGISTRY

_PARAMETER = re.compile(r'([a-zA-Z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))')
# What a token service that names no lifetime means.
_DEFAULT_LIFETIME_S = 60
_MARGIN_S = 5
_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True, slots=True)
class Challenge:
    """A WWW-Authenticate header: `scheme` in lower case and its parameters."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What to send to a token service; `body` makes it a POST."""

    url: str
    headers: dict[str, str]
    body: bytes | None


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: int | float = _DEFAULT_LIFETIME_S


def challenges(header: str) -> list[Challenge]:
    """The challenges of a WWW-Authenticate header that crib can answer, the strongest first."""
    found = []
    for match in re.finditer(
        r"(?i)(?:^|,)\s*(bearer|basic)(?=\s|$)([^\0]*?)(?=,\s*(?:bearer|basic)(?:\s|$)|$)", header
    ):
        values = {key.lower(): quoted or plain for key, quoted, plain in _PARAMETER.findall(match[2])}
        found.append(
            Challenge(match[1].lower(), values.get("realm", ""), values.get("service", ""), values.get("scope", ""))
        )
    return sorted(found, key=lambda challenge: challenge.scheme != "bearer")


def user_and_password(auth: Auth) -> tuple[str, str] | None:
    """Raises InvalidSpec if `auth.auth` is not base64 of `username:password`."""
    if auth.username:
        return auth.username, auth.password
    if not auth.auth:
        return None
    try:
        user, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        user = colon = password = ""
    if not colon:
        raise InvalidSpec("credentials: auth is not base64 of username:password")
    return user, password.rstrip("\0")


def applies(auth: Auth, registry: str) -> bool:
    """Whether the credentials are meant for `registry`: those with a server address are for that host alone."""
    if not auth.server_address:
        return True
    address = auth.server_address
    host = urlsplit(address if "://" in address else f"//{address}").netloc
    return host == registry or (host in _HUB and registry in (*_HUB, DEFAULT_REGISTRY))


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def token_request(challenge: Challenge, repository: str, auth: Auth | None) -> TokenRequest:
    """How to get a token for pulling `repository`. Raises BadContent for a realm that isn't a URL, InvalidSpec."""
    parts = urlsplit(challenge.realm)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadContent(f"token service {challenge.realm[:200]!r} is not a URL")
    scope = challenge.scope or f"repository:{repository}:pull"
    query = {"scope": scope} | ({"service": challenge.service} if challenge.service else {})
    if auth is not None and auth.identity_token:
        body = query | {"grant_type": "refresh_token", "refresh_token": auth.identity_token, "client_id": "crib"}
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return TokenRequest(challenge.realm, headers, urlencode(body).encode())
    pair = user_and_password(auth) if auth is not None else None
    join = "&" if parts.query else "?"
    return TokenRequest(
        f"{challenge.realm}{join}{urlencode(query)}", {"Authorization": basic(*pair)} if pair else {}, None
    )


def read_token(data: bytes, host: str) -> tuple[str, float]:
    """The token in a service's answer and until when (time.monotonic) to use it. Raises BadContent."""
    try:
        answer = msgspec.json.decode(data, type=_Token)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise BadContent(f"token service at {host} answers with something else than a token") from None
    token = answer.token or answer.access_token
    # It becomes a header.
    if not token or not token.isascii() or not token.isprintable():
        raise BadContent(f"token service at {host} answers without a token")
    return token, time.monotonic() + max(answer.expires_in, _DEFAULT_LIFETIME_S) - _MARGIN_S

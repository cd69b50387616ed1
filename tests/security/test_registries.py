"""What a registry, or whom it sends to, could get out of crib."""

from __future__ import annotations

import base64
from unittest.mock import ANY

import pytest

from runtime.errors import CribError
from runtime.images import Auth
from tests.requires import requires
from tests.runtime.images.conftest import OpenStore, images, liar, open_store, small  # noqa: F401
from tests.runtime.images.given import Built, Liar, Request, serving
from tests.security.defects import attack

pytestmark = requires("root")

BEARER = 'Bearer realm="http://{}/token",service="x"'
SECRET = base64.b64encode(b"user:secret").decode()


def stolen(open_store: OpenStore, small: Built, liar: Liar, challenge: str) -> list[str]:  # noqa: F811
    """A registry sends to somebody else for its layers, who wants credentials; what of them he gets."""
    with serving(small) as thief:

        def away(request: Request) -> None:
            request.reply(307, Location=f"http://{thief.host}{request.path}")

        def ask(request: Request) -> None:
            if request.path.startswith("/token"):
                request.reply(200, b'{"token": "good"}')
            else:
                request.reply(401, WWW_Authenticate=challenge.format(thief.host))

        liar.lies["/blobs/"] = away
        thief.lies["/"] = ask
        with pytest.raises(CribError):
            open_store().pull(f"{liar.host}/app", auth=Auth(username="user", password="secret"))
        assert thief.seen
        return [value for _, headers in thief.seen for value in headers.values() if SECRET in value]


@attack(
    "CVE-2020-15157",
    sentence="A registry redirects for its layers to somebody else, who answers that he wants the registry's "
    "credentials, himself or his token service",
    guard="only what the registry itself answers is taken for its challenge; redirected requests carry no credentials",
    control="test_15157_control_everybodys_challenge",
)
@pytest.mark.parametrize("challenge", [BEARER, 'Basic realm="x"'])
def test_cve_2020_15157(open_store: OpenStore, small: Built, liar: Liar, challenge: str) -> None:  # noqa: F811
    assert stolen(open_store, small, liar, challenge) == []


def test_15157_control_everybodys_challenge(
    open_store: OpenStore,  # noqa: F811
    small: Built,  # noqa: F811
    liar: Liar,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.images.hosts.Endpoint.host", ANY)
    assert stolen(open_store, small, liar, BEARER) == [f"Basic {SECRET}"]

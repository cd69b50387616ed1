"""Proxies of the environment, as Go's programs take them."""

from __future__ import annotations

import pytest

from runtime.images.proxy import proxy_of


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("https://r.example/v2", True),
        ("https://10.1.2.3/v2", False),
        ("https://11.1.2.3/v2", True),
        ("https://192.0.2.7:5000/v2", False),
        ("https://[fd00::1]:5000/v2", False),
        ("https://svc/v2", False),
        ("https://r.svc/v2", False),
        ("https://r.rsvc/v2", True),
        ("https://sub.star.example/v2", False),
        ("https://port.example:5000/v2", False),
        ("https://port.example/v2", True),
        ("https://default.example/v2", False),
        ("https://[::1]:5000/v2", False),
        ("https://localhost/v2", False),
        ("http://r.example/v2", None),
    ],
)
def test_exceptions(monkeypatch: pytest.MonkeyPatch, url: str, proxied: bool | None) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("https_proxy", "proxy:3128")
    monkeypatch.setenv(
        "no_proxy",
        "10.0.0.0/8, 192.0.2.7,fd00::/8,.svc,,*.star.example,Port.example:5000,default.example:443,x:y,1.2.3.4/99",
    )
    assert proxy_of(url) == ("http://proxy:3128" if proxied else None)


def test_everything_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy")
    assert proxy_of("http://r.example/v2") == "http://proxy"
    monkeypatch.setenv("NO_PROXY", "*")
    assert proxy_of("http://r.example/v2") is None

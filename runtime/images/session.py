"""HTTP towards the endpoints of one reference: connections, redirects, credentials, cancellation. Over urllib3.

Credentials, client certificates and configured headers go to the endpoint that they are for and never to where it
redirects, nor to whom that one names; a redirect does not leave HTTPS.
"""

import io
import socket
import threading
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from weakref import WeakSet

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InsecureRequestWarning,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.response import BaseHTTPResponse

from runtime.errors import Cancelled, NotFound
from runtime.images import auth as credentials
from runtime.images.errors import BadContent, RegistryDenied, RegistryUnavailable
from runtime.images.hosts import Endpoint
from runtime.images.image import Auth, ImagesConfig
from runtime.images.proxy import proxy_of
from runtime.images.reference import Reference

# `skip_verify` is the administrator's decision, and written in their own hosts.toml.
urllib3.disable_warnings(InsecureRequestWarning)

_REDIRECTS = (301, 302, 303, 307, 308)
_REDIRECT_LIMIT = 5
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_TOKEN_LIMIT_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_LINES_BYTES = 16 << 20


class Busy(Exception):
    """The endpoint asks to come back later, or failed in a way that may pass."""

    def __init__(self, cause: str, retry_after_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(cause)
        self.unreachable = unreachable
        self.retry_after_s = retry_after_s


class Answer:
    """A response of `host`'s being read; a context manager that gives the connection back."""

    def __init__(self, session: "Session", response: BaseHTTPResponse, host: str) -> None:
        self._session = session
        self._response = response
        self._broken = False
        self.host = host
        self.status = response.status
        self.headers = response.headers

    def __enter__(self) -> "Answer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.forget(self._response)
        remaining = getattr(self._response, "length_remaining", None)
        try:
            if kind is None and remaining is not None and remaining <= _READ_BYTES:
                self._response.drain_conn()  # also what tells the connection that nothing remains
                self._response.release_conn()
        finally:
            self._response.close()

    def shutdown(self) -> None:
        """Make a read that waits in another thread end."""
        try:
            self._response.shutdown()
        except (OSError, ValueError, RuntimeError):
            pass  # it has just ended

    def chunk(self, limit: int = _READ_BYTES) -> bytes:
        """What has arrived, at most `limit` bytes; b"" when the connection has ended, properly or not.

        Raises RegistryUnavailable when nothing comes for too long, Cancelled.
        """
        self._session.check()
        try:
            return self._response.read1(limit, decode_content=False)
        except ReadTimeoutError as error:
            raise self._session.stalled(self.host) from error
        except (HTTPError, OSError):
            self._session.check()
            self._broken = True
            return b""

    def body(self, limit: int) -> bytes:
        """The whole body, or its first `limit` bytes. Raises Busy when it breaks off."""
        data = b""
        while len(data) < limit and (chunk := self.chunk(limit - len(data))):
            data += chunk
        remaining = getattr(self._response, "length_remaining", None)
        if len(data) < limit and (remaining or self._broken):
            of = f" of {len(data) + remaining}" if remaining else ""
            raise Busy(f"connection ends after {len(data)}{of} bytes")
        return data


class _Lines(io.BufferedReader):
    """What a server sends, whose lines (of status, headers, chunks, trailers) have an end as bodies have."""

    _left = _LINES_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self._left -= len(line)
        if self._left < 0:
            raise HTTPException(f"more than {_LINES_BYTES} bytes around the body")
        return line


class _Response(HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = _Lines(self.fp.detach())


class Session:
    """Thread-safe; `cancel` may come from any thread."""

    def __init__(self, reference: Reference, auth: Auth | None, config: ImagesConfig) -> None:
        self._reference = reference
        self._config = config
        self._auth = auth if auth is not None and credentials.applies(auth, reference.registry) else None
        self._pools: dict[object, urllib3.PoolManager] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        self._basic: set[str] = set()
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._open: dict[BaseHTTPResponse, Answer] = {}
        self._connections: WeakSet[HTTPConnection] = WeakSet()

    def cancel(self) -> None:
        """Make every running and further call end with Cancelled, at once but for those that are still connecting."""
        self._cancelled.set()
        with self._lock:
            answers, connections = list(self._open.values()), list(self._connections)
        for answer in answers:
            answer.shutdown()
        for connection in connections:  # those that wait for an answer to begin
            try:
                if connection.sock is not None:
                    connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has just ended

    def check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"pull of {self._reference} was cancelled")

    def pause(self, time_s: float) -> None:
        """Wait, or until cancelled."""
        self._cancelled.wait(time_s)

    def close(self) -> None:
        """Close every connection; urllib3 by itself would leave that to the garbage collector."""
        for manager in self._pools.values():
            for key in list(manager.pools.keys()):
                if (pool := manager.pools.get(key)) is not None:
                    pool.close()
            manager.clear()

    def forget(self, response: BaseHTTPResponse) -> None:
        with self._lock:
            self._open.pop(response, None)

    def stalled(self, host: str) -> RegistryUnavailable:
        return RegistryUnavailable(f"{host}: no data for {self._config.progress_timeout_s:g} s")

    def get(self, endpoint: Endpoint, path: str, headers: dict[str, str]) -> Answer:
        """An answer of status 200 or 206. Raises Busy, NotFound, RegistryDenied, RegistryUnavailable, BadContent."""
        url = f"{endpoint.base}/{self._reference.repository}/{path}"
        if not endpoint.upstream:
            url += f"?ns={self._reference.registry}"
        given = self._authorization(endpoint)
        answer = self._send(endpoint, url, headers)
        auth = self._auth if endpoint.upstream else None
        if answer.status == 401 and answer.host == endpoint.host:  # and not whom it redirects to (CVE-2020-15157)
            with answer:
                offered = credentials.challenges(answer.headers.get("WWW-Authenticate", ""))
            if not self._satisfy(endpoint, offered, auth, given):
                raise self._denied(answer, auth)
            answer = self._send(endpoint, url, headers)
        if answer.status in (200, 206):
            return answer
        with answer:
            detail = "" if answer.status == 404 else _detail(answer.body(4096))
        if answer.status in (401, 403):
            raise self._denied(answer, auth if answer.host == endpoint.host else None)
        if answer.status == 404:
            raise NotFound(f"{self._reference}: not found at {endpoint.host}")
        if answer.status in _TRANSIENT:
            raise Busy(f"answers {answer.status}{detail}", _retry_after_s(answer.headers.get("Retry-After", "")))
        raise BadContent(f"{endpoint.host}: answers {answer.status}{detail} when asked for {path}")

    def _denied(self, answer: Answer, given: Auth | None) -> RegistryDenied:
        why = "the credentials are refused" if given else "it wants credentials"
        return RegistryDenied(f"{self._reference}: {answer.host} answers {answer.status}: {why}")

    def _send(self, endpoint: Endpoint, url: str, headers: dict[str, str]) -> Answer:
        """Send a GET and follow redirects; only requests to the endpoint itself carry its headers and credentials."""
        origin = urlsplit(url)[:2]
        elsewhere = replace(endpoint, tls=replace(endpoint.tls, client=()))
        for _ in range(_REDIRECT_LIMIT + 1):
            sent = {"User-Agent": "crib", "Accept-Encoding": "identity", **headers}
            own = urlsplit(url)[:2] == origin
            if own:
                sent.update(endpoint.headers)
                sent.update(self._authorization(endpoint))
            answer = self._request(endpoint if own else elsewhere, "GET", url, sent)
            location = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or not location:
                return answer
            with answer:
                before, url = url, urljoin(url, location)
            scheme = urlsplit(url).scheme
            if scheme not in ("http", "https") or (scheme == "http" and before.startswith("https:")):
                raise BadContent(f"{endpoint.host}: redirects to a {scheme[:20]!r} URL")
        raise BadContent(f"{endpoint.host}: redirects more than {_REDIRECT_LIMIT} times")

    def _request(
        self, endpoint: Endpoint, method: str, url: str, headers: dict[str, str], body: bytes | None = None
    ) -> Answer:
        self.check()
        host = urlsplit(url).netloc
        try:
            response = self._pool(endpoint, url).request(
                method, url, headers=headers, body=body, redirect=False, retries=False, preload_content=False
            )
        except ReadTimeoutError as error:
            raise self.stalled(host) from error
        except SSLError as error:
            raise RegistryUnavailable(f"{host}: {_reason(error)}") from error
        except (HTTPError, OSError, ValueError) as error:
            self.check()
            cause = f"{'' if host == endpoint.host else host + ': '}{_reason(error)}"
            raise Busy(cause, unreachable=isinstance(error, (NewConnectionError, ConnectTimeoutError))) from error
        answer = Answer(self, response, host)
        with self._lock:
            self._open[response] = answer
        return answer

    def _pool(self, endpoint: Endpoint, url: str) -> urllib3.PoolManager:
        proxy = proxy_of(url)
        encrypted = url.startswith("https:") or (proxy or "").startswith("https:")
        with self._lock:
            pool = self._pools.get((endpoint.tls, encrypted, proxy))
            if pool is None:
                options: dict[str, Any] = {
                    "maxsize": self._config.max_parallel * max(1, self._config.max_ranges) + 1,
                    "timeout": urllib3.Timeout(
                        connect=self._config.connect_timeout_s, read=self._config.progress_timeout_s
                    ),
                }
                if encrypted:  # it takes 20 ms to read the system's authorities
                    options["ssl_context"] = endpoint.tls.context()
                if endpoint.tls.skip_verify:
                    options |= {"cert_reqs": "CERT_NONE", "assert_hostname": False}
                if proxy:
                    user = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
                    headers = urllib3.make_headers(proxy_basic_auth=user) if user else None
                    pool = urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
                else:
                    pool = urllib3.PoolManager(**options)
                pool.pool_classes_by_scheme = self._pool_classes()
                self._pools[endpoint.tls, encrypted, proxy] = pool
            return pool

    def _pool_classes(self) -> dict[str, type[HTTPConnectionPool]]:
        """urllib3's own, but this session knows of each connection when it is made."""
        session = self

        class Plain(HTTPConnection):
            response_class = _Response

            def connect(self) -> None:
                super().connect()
                session.made(self)

        class Encrypted(HTTPSConnection):
            response_class = _Response

            def connect(self) -> None:
                super().connect()
                session.made(self)

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class EncryptedPool(HTTPSConnectionPool):
            ConnectionCls = Encrypted

        return {"http": PlainPool, "https": EncryptedPool}

    def made(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._connections.add(connection)
        self.check()

    def _authorization(self, endpoint: Endpoint) -> dict[str, str]:
        """What has been found to be wanted by this endpoint."""
        token = self._tokens.get(endpoint.base)
        if token is not None and token[1] > time.monotonic():
            return {"Authorization": f"Bearer {token[0]}"}
        if endpoint.base in self._basic and self._auth is not None:
            pair = credentials.user_and_password(self._auth)
            return {"Authorization": credentials.basic(*pair)} if pair else {}
        return {}

    def _satisfy(
        self, endpoint: Endpoint, offered: list[credentials.Challenge], auth: Auth | None, given: dict[str, str]
    ) -> bool:
        """Do what a challenge of the endpoint's asks for; False when there is nothing to answer it with but what was
        `given`."""
        for challenge in offered:
            if challenge.scheme == "basic":
                pair = credentials.user_and_password(auth) if auth is not None else None
                if pair is None or given.get("Authorization") == credentials.basic(*pair):
                    return False
                self._basic.add(endpoint.base)
            elif auth is not None and auth.registry_token:
                self._tokens[endpoint.base] = (auth.registry_token, float("inf"))
            else:
                self._tokens[endpoint.base] = self._token(endpoint, challenge, auth)
            return True
        return False

    def _token(self, endpoint: Endpoint, challenge: credentials.Challenge, auth: Auth | None) -> tuple[str, float]:
        request = credentials.token_request(challenge, self._reference.repository, auth)
        method = "GET" if request.body is None else "POST"
        headers = {"User-Agent": "crib", "Accept": "application/json", **request.headers}
        host = urlsplit(request.url).netloc
        if endpoint.base.startswith("https:") and not request.url.startswith("https:"):
            raise BadContent(f"{endpoint.host}: token service {host} is not on HTTPS")
        with self._request(endpoint, method, request.url, headers, request.body) as answer:
            data = answer.body(_TOKEN_LIMIT_BYTES)
        if answer.status in (400, 401, 403, 404):
            raise self._denied(answer, auth)
        if answer.status != 200:
            wait_s = _retry_after_s(answer.headers.get("Retry-After", ""))
            raise Busy(f"token service {host} answers {answer.status}", wait_s)
        return credentials.read_token(data, host)


def _reason(error: BaseException) -> str:
    """What an exception of urllib3 is about, without the objects that its text holds."""
    cause: BaseException = error
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return str(cause if isinstance(cause, OSError) else error)[:200] or type(error).__name__


def _detail(body: bytes) -> str:
    text = " ".join(body[:200].decode(errors="replace").split())
    return f" ({text})" if text and text.isprintable() and not text.startswith("<") else ""


def _retry_after_s(value: str) -> float | None:
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None

"""One pull's conversation with a registry and its mirrors: OCI distribution-spec 1.1 over urllib3.

Everything received is checked: manifests and blobs against digest and size while they arrive, redirects against
leaving HTTPS. Credentials and configured headers go to the endpoint that they are for and never to where it redirects.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning, ReadTimeoutError, SSLError
from urllib3.response import BaseHTTPResponse

from runtime.errors import Cancelled, CribError, Exhausted, NotFound
from runtime.images import auth as credentials
from runtime.images.errors import BadContent, RegistryDenied, RegistryUnavailable
from runtime.images.hosts import Endpoint, endpoints
from runtime.images.image import Auth, ImagesConfig
from runtime.images.manifest import ACCEPT, Descriptor, digest_of
from runtime.images.reference import Reference

log = logging.getLogger(__name__)

# `skip_verify` is the administrator's decision, and written in their own hosts.toml.
urllib3.disable_warnings(InsecureRequestWarning)

_REDIRECTS = (301, 302, 303, 307, 308)
_REDIRECT_LIMIT = 5
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_TOKEN_LIMIT_BYTES = 1 << 20
_READ_BYTES = 1 << 18
# A registry that cuts every connection still makes progress; this bounds how often one blob is resumed.
_RESUMES = 100

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as received."""

    data: bytes
    content_type: str
    digest: str


class _Busy(Exception):
    """The registry asks to come back later, or failed in a way that may pass."""

    def __init__(self, cause: str, retry_after_s: float | None = None) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s


class Registry:
    """A session for one reference. Blocking methods; thread-safe; `cancel` may come from any thread."""

    def __init__(self, reference: Reference, auth: Auth | None, config: ImagesConfig) -> None:
        self._reference = reference
        self._config = config
        self._auth = auth if auth is not None and credentials.applies(auth, reference.registry) else None
        self._endpoints = endpoints(reference.registry, config.hosts_dir)
        self._pools: dict[object, urllib3.PoolManager] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        self._basic: set[str] = set()
        self._down: set[str] = set()
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._open: set[BaseHTTPResponse] = set()

    def cancel(self) -> None:
        """Make every running and further call end with Cancelled, at once where data are flowing."""
        self._cancelled.set()
        with self._lock:
            for response in self._open:
                try:
                    response.shutdown()
                except (OSError, ValueError, RuntimeError):
                    pass  # it has just ended

    def close(self) -> None:
        """Close every connection; urllib3 by itself would leave that to the garbage collector."""
        for manager in self._pools.values():
            for key in list(manager.pools.keys()):
                if (pool := manager.pools.get(key)) is not None:
                    pool.close()
            manager.clear()

    def resolve(self) -> Document:
        """The document that the reference names. Raises NotFound, RegistryDenied, RegistryUnavailable, BadContent."""
        return self._document(self._reference.target, "resolve", None)

    def document(self, descriptor: Descriptor) -> Document:
        """The manifest or index that an index names."""
        return self._document(descriptor.digest, "pull", descriptor.size)

    def small_blob(self, descriptor: Descriptor, limit_bytes: int) -> bytes:
        """A blob that is kept in memory, such as a configuration."""
        if descriptor.size > limit_bytes:
            raise Exhausted(f"blob {descriptor.digest} of {descriptor.size} bytes, the limit is {limit_bytes}")

        def fetch(endpoint: Endpoint) -> bytes:
            response = self._get(endpoint, f"blobs/{descriptor.digest}", {})
            try:
                return self._read(response, descriptor.size + 1)
            finally:
                self._release(response)

        data = self._ask("pull", f"blob {descriptor.digest}", fetch)
        if len(data) != descriptor.size or digest_of(data, descriptor.digest) != descriptor.digest:
            raise BadContent(f"{self._reference.registry}: blob is not {descriptor.digest} of {descriptor.size} bytes")
        return data

    def blob(self, descriptor: Descriptor, file: int, arrived: Callable[[int], None]) -> None:
        """Write a blob to the descriptor `file` from its start; `arrived` hears how many bytes are there.

        A broken connection is resumed. On return size and digest are right. What `arrived` raises passes through.
        """
        state = _Arriving(hashlib.new(descriptor.digest.partition(":")[0]))

        def fetch(endpoint: Endpoint) -> None:
            while state.position < descriptor.size or not state.started:
                self._receive(endpoint, descriptor, file, state, arrived)

        self._ask("pull", f"blob {descriptor.digest}", fetch)
        if state.hash.hexdigest() != descriptor.digest.partition(":")[2]:
            raise BadContent(f"{self._reference.registry}: blob {descriptor.digest} arrives with other content")

    def _receive(
        self, endpoint: Endpoint, descriptor: Descriptor, file: int, state: "_Arriving", arrived: Callable[[int], None]
    ) -> None:
        """One request for what is missing of a blob. Raises _Busy when it breaks off with some progress made or not."""
        headers = {"Range": f"bytes={state.position}-"} if state.position else {}
        response = self._get(endpoint, f"blobs/{descriptor.digest}", headers)
        try:
            if state.position and not (
                response.status == 206
                and response.headers.get("Content-Range", "").startswith(f"bytes {state.position}-")
            ):
                # No ranges here: what has come already comes again and is left out.
                self._skip(response, state.position)
            state.started = True
            while chunk := self._chunk(response, endpoint):
                if state.position + len(chunk) > descriptor.size:
                    raise BadContent(
                        f"{endpoint.host}: blob {descriptor.digest} is larger than {descriptor.size} bytes"
                    )
                state.hash.update(chunk)
                _write_all(file, chunk)
                state.position += len(chunk)
                arrived(state.position)
        finally:
            self._release(response)
        if state.position < descriptor.size:
            state.resumes += 1
            where = f"{state.position} of {descriptor.size} bytes"
            if state.resumes > _RESUMES or state.position == state.before:
                raise _Busy(f"connection ends after {where}")
            state.before = state.position

    def _skip(self, response: BaseHTTPResponse, size: int) -> None:
        while size:
            chunk = response.read1(min(size, _READ_BYTES), decode_content=False)
            if not chunk:
                raise _Busy("connection ends early")
            size -= len(chunk)

    def _chunk(self, response: BaseHTTPResponse, endpoint: Endpoint) -> bytes:
        """What has arrived; b"" when the connection has ended, properly or not."""
        self._check()
        try:
            return response.read1(_READ_BYTES, decode_content=False)
        except ReadTimeoutError as error:
            raise self._stalled(endpoint) from error
        except (HTTPError, OSError):
            self._check()
            return b""

    def _stalled(self, endpoint: Endpoint) -> RegistryUnavailable:
        return RegistryUnavailable(f"{endpoint.host}: no data for {self._config.progress_timeout_s:g} s")

    def _document(self, target: str, capability: str, size: int | None) -> Document:
        limit = self._config.manifest_limit_bytes
        if size is not None and size > limit:
            raise Exhausted(f"manifest {target} of {size} bytes, the limit is {limit}")

        def fetch(endpoint: Endpoint) -> Document:
            response = self._get(endpoint, f"manifests/{target}", {"Accept": ACCEPT})
            try:
                data = self._read(response, limit + 1)
            finally:
                self._release(response)
            if len(data) > limit:
                raise Exhausted(f"{endpoint.host}: manifest {target} of more than {limit} bytes")
            told = response.headers.get("Docker-Content-Digest", "")
            wanted = target if ":" in target else told if told.startswith(("sha256:", "sha512:")) else ""
            digest = digest_of(data, wanted or "sha256:")
            if wanted and digest != wanted:
                raise BadContent(f"{endpoint.host}: manifest {target} arrives as {digest} instead of {wanted}")
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
            if kind.startswith("text/"):
                raise BadContent(f"{endpoint.host}: manifest {target} arrives as {kind}: that is no registry")
            return Document(data, kind, digest)

        return self._ask(capability, f"manifest {target}", fetch)

    def _ask(self, capability: str, what: str, fetch: Callable[[Endpoint], T]) -> T:
        """Try the endpoints in order, those found dead last, each with retries; the last one's error is raised."""
        ready = [e for e in self._endpoints if capability in e.capabilities]
        ready.sort(key=lambda endpoint: endpoint.base in self._down)
        failure: CribError = NotFound(f"{self._reference}: no host is configured for {capability}")
        for endpoint in ready:
            try:
                return self._retried(endpoint, fetch)
            except Cancelled:
                raise
            except (NotFound, RegistryDenied, RegistryUnavailable, BadContent, Exhausted) as error:
                failure = error
                if isinstance(error, RegistryUnavailable):
                    self._down.add(endpoint.base)
                if len(ready) > 1:
                    log.info("host %s for %s fails with %s: %s", endpoint.host, self._reference, what, error)
        raise failure

    def _retried(self, endpoint: Endpoint, fetch: Callable[[Endpoint], T]) -> T:
        delay_s = self._config.backoff_s
        for attempt in range(1, self._config.attempts + 1):
            self._check()
            try:
                return fetch(endpoint)
            except _Busy as busy:
                wait_s = delay_s if busy.retry_after_s is None else busy.retry_after_s
                if attempt == self._config.attempts or wait_s > self._config.retry_after_limit_s:
                    raise RegistryUnavailable(f"{endpoint.host}: {busy}") from busy
                log.debug("host %s: %s; again in %.1f s", endpoint.host, busy, wait_s)
                self._cancelled.wait(wait_s)
                delay_s *= 2
        raise AssertionError("unreachable")

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"pull of {self._reference} was cancelled")

    def _get(self, endpoint: Endpoint, path: str, headers: dict[str, str]) -> BaseHTTPResponse:
        """A response of status 200 or 206 to be read and released. Raises _Busy and the domain's errors."""
        url = f"{endpoint.base}/{self._reference.repository}/{path}"
        if not endpoint.upstream:
            url += f"?ns={self._reference.registry}"
        response = self._send(endpoint, url, headers)
        if response.status == 401:
            offered = credentials.challenges(response.headers.get("WWW-Authenticate", ""))
            self._release(response)
            if not self._answer(endpoint, offered):
                raise self._denied(endpoint, 401)
            response = self._send(endpoint, url, headers)
        if response.status in (200, 206):
            return response
        status = response.status
        try:
            detail = "" if status == 404 else _detail(self._read(response, 4096))
        finally:
            self._release(response)
        if status in (401, 403):
            raise self._denied(endpoint, status)
        if status == 404:
            raise NotFound(f"{self._reference}: not found at {endpoint.host}")
        if status in _TRANSIENT:
            raise _Busy(f"answers {status}{detail}", _retry_after_s(response.headers.get("Retry-After", "")))
        raise BadContent(f"{endpoint.host}: answers {status}{detail} when asked for {path}")

    def _denied(self, endpoint: Endpoint, status: int) -> RegistryDenied:
        given = "the credentials are refused" if self._auth and endpoint.upstream else "it wants credentials"
        return RegistryDenied(f"{self._reference}: {endpoint.host} answers {status}: {given}")

    def _send(self, endpoint: Endpoint, url: str, headers: dict[str, str]) -> BaseHTTPResponse:
        """Send a GET and follow redirects; only requests to the endpoint itself carry its headers and credentials."""
        origin = urlsplit(url)[:2]
        for _ in range(_REDIRECT_LIMIT + 1):
            sent = {"User-Agent": "crib", "Accept-Encoding": "identity", **headers}
            if urlsplit(url)[:2] == origin:
                sent.update(endpoint.headers)
                sent.update(self._authorization(endpoint))
            response = self._request(endpoint, "GET", url, sent)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                return response
            self._release(response)
            before, url = url, urljoin(url, location)
            scheme = urlsplit(url).scheme
            if scheme not in ("http", "https") or (scheme == "http" and before.startswith("https:")):
                raise BadContent(f"{endpoint.host}: redirects to a {scheme[:20]!r} URL")
        raise BadContent(f"{endpoint.host}: redirects more than {_REDIRECT_LIMIT} times")

    def _request(
        self, endpoint: Endpoint, method: str, url: str, headers: dict[str, str], body: bytes | None = None
    ) -> BaseHTTPResponse:
        self._check()
        host = urlsplit(url).netloc
        try:
            response = self._pool(endpoint).request(
                method, url, headers=headers, body=body, redirect=False, retries=False, preload_content=False
            )
        except ReadTimeoutError as error:
            raise self._stalled(endpoint) from error
        except SSLError as error:
            raise RegistryUnavailable(f"{host}: {_reason(error)}") from error
        except (HTTPError, OSError, ValueError) as error:
            self._check()
            raise _Busy(f"{'' if host == endpoint.host else host + ': '}{_reason(error)}") from error
        with self._lock:
            self._open.add(response)
        return response

    def _release(self, response: BaseHTTPResponse) -> None:
        """Give a response's connection back, or close it when there is more to come."""
        with self._lock:
            self._open.discard(response)
        remaining = getattr(response, "length_remaining", None)
        try:
            if remaining is not None and remaining <= _READ_BYTES and not self._cancelled.is_set():
                response.drain_conn()  # also what tells the connection that nothing remains
                response.release_conn()
        finally:
            response.close()

    def _read(self, response: BaseHTTPResponse, limit: int) -> bytes:
        """The body, or its first `limit` bytes. Raises _Busy when it breaks off."""
        data = b""
        try:
            while len(data) < limit and (chunk := response.read1(limit - len(data), decode_content=False)):
                data += chunk
                self._check()
        except ReadTimeoutError as error:
            raise RegistryUnavailable(f"no data for {self._config.progress_timeout_s:g} s") from error
        except (HTTPError, OSError) as error:
            self._check()
            raise _Busy(f"connection ends early: {_reason(error)}") from error
        remaining = getattr(response, "length_remaining", None)
        if remaining and len(data) < limit:
            raise _Busy(f"connection ends {remaining} bytes early")
        return data

    def _pool(self, endpoint: Endpoint) -> urllib3.PoolManager:
        with self._lock:
            pool = self._pools.get(endpoint.tls)
            if pool is None:
                options: dict[str, Any] = {"ssl_context": endpoint.tls.context()}
                if endpoint.tls.skip_verify:
                    options |= {"cert_reqs": "CERT_NONE", "assert_hostname": False}
                timeout = urllib3.Timeout(connect=self._config.connect_timeout_s, read=self._config.progress_timeout_s)
                pool = urllib3.PoolManager(maxsize=self._config.max_parallel + 1, timeout=timeout, **options)
                self._pools[endpoint.tls] = pool
            return pool

    def _authorization(self, endpoint: Endpoint) -> dict[str, str]:
        """What has been found to be wanted by this endpoint."""
        token = self._tokens.get(endpoint.base)
        if token is not None and token[1] > time.monotonic():
            return {"Authorization": f"Bearer {token[0]}"}
        if endpoint.base in self._basic and self._auth is not None:
            pair = credentials.user_and_password(self._auth)
            return {"Authorization": credentials.basic(*pair)} if pair else {}
        return {}

    def _answer(self, endpoint: Endpoint, offered: list[credentials.Challenge]) -> bool:
        """Do what a challenge asks for; False when there is nothing to answer it with."""
        auth = self._auth if endpoint.upstream else None
        for challenge in offered:
            if challenge.scheme == "basic":
                if auth is None or credentials.user_and_password(auth) is None or endpoint.base in self._basic:
                    return False
                self._basic.add(endpoint.base)
                return True
            if auth is not None and auth.registry_token:
                self._tokens[endpoint.base] = (auth.registry_token, float("inf"))
                return True
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
        response = self._request(endpoint, method, request.url, headers, request.body)
        try:
            data = self._read(response, _TOKEN_LIMIT_BYTES)
        finally:
            self._release(response)
        if response.status in (400, 401, 403, 404):
            raise self._denied(endpoint, response.status)
        if response.status != 200:
            raise _Busy(f"token service {host} answers {response.status}")
        return credentials.read_token(data, host)


class _Arriving:
    """How far a blob's transfer is, over all its requests."""

    def __init__(self, digest: Any) -> None:
        self.hash = digest
        self.position = 0
        self.before = -1
        self.resumes = 0
        self.started = False


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


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
    if value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None

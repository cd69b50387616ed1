"""Manifests and blobs of one reference, from its registry and its mirrors: OCI distribution-spec 1.1.

Everything received is checked against digest and size while it arrives; what breaks off is resumed, what may pass is
tried again.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import Cancelled, CribError, Exhausted, NotFound
from runtime.images.errors import BadContent, RegistryDenied, RegistryUnavailable
from runtime.images.health import Health
from runtime.images.hosts import Endpoint, endpoints
from runtime.images.image import Auth, ImagesConfig
from runtime.images.manifest import ACCEPT, Descriptor, digest_of
from runtime.images.ranges import Front, in_parallel
from runtime.images.reference import Reference
from runtime.images.session import Answer, Busy, Session

log = logging.getLogger(__name__)

# A registry that cuts every connection still makes progress; this bounds how often one blob is resumed.
_RESUMES = 100

# Unpacking keeps up with little more than one connection that brings so much.
_FAST_BYTES_S = 256 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as received."""

    data: bytes
    content_type: str
    digest: str


class _Arriving:
    """How far a blob's transfer is, over all its requests, and who has sent of it."""

    def __init__(self, descriptor: Descriptor) -> None:
        self.hash: Any = hashlib.new(descriptor.digest.partition(":")[0])
        self.position = 0
        self.before = -1
        self.resumes = 0
        self.done = False
        self.fast = False
        self.senders: set[str] = set()


class Registry:
    """A conversation about one reference. Blocking methods; thread-safe; `cancel` may come from any thread."""

    def __init__(self, reference: Reference, auth: Auth | None, config: ImagesConfig, health: Health) -> None:
        self._reference = reference
        self._config = config
        self._endpoints = endpoints(reference.registry, config.hosts_dir)
        self._session = Session(reference, auth, config)
        self._health = health
        # The hosts that sent wrong content, by the blob's digest.
        self._liars: dict[str, set[str]] = {}
        self.cancel = self._session.cancel
        self.close = self._session.close

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
            with self._session.get(endpoint, f"blobs/{descriptor.digest}", {}) as answer:
                data = answer.body(descriptor.size + 1)
            if len(data) != descriptor.size or digest_of(data, descriptor.digest) != descriptor.digest:
                raise BadContent(f"{endpoint.host}: blob is not {descriptor.digest} of {descriptor.size} bytes")
            return data

        return self._ask("pull", f"blob {descriptor.digest}", fetch)

    def blob(self, descriptor: Descriptor, take: Callable[[bytes], None], spool: Path) -> None:
        """Give a blob to `take` piece by piece, in order. What arrives out of order is kept in a file in the directory
        `spool`.

        A broken connection is resumed, at another host if need be. On return size and digest are right; BadContent
        when they are wrong: then `another` tells whether there are hosts that have not sent of it. What `take` raises
        passes through.
        """
        state = _Arriving(descriptor)

        def fetch(endpoint: Endpoint) -> None:
            state.senders.add(endpoint.base)
            while not state.done:
                self._receive(endpoint, descriptor, state, take, spool)

        try:
            self._ask("pull", f"blob {descriptor.digest}", fetch, self._liars.get(descriptor.digest, ()))
            if state.hash.hexdigest() != descriptor.digest.partition(":")[2]:
                raise BadContent(f"{self._reference.registry}: blob {descriptor.digest} arrives with other content")
        except BadContent:
            self._liars.setdefault(descriptor.digest, set()).update(state.senders)
            raise

    def another(self, descriptor: Descriptor) -> bool:
        """Whether a host is left that has not sent wrong content for this blob."""
        liars = self._liars.get(descriptor.digest, set())
        return any("pull" in e.capabilities and e.base not in liars for e in self._endpoints)

    def _receive(
        self, endpoint: Endpoint, descriptor: Descriptor, state: _Arriving, take: Callable[[bytes], None], spool: Path
    ) -> None:
        """One request for what is missing of a blob, or several at once. Raises Busy when no progress is made.

        The first piece of a large blob tells whether it is the network that everything waits for, or the taker: more
        connections would only cost the latter.
        """
        start, size = state.position, descriptor.size
        large = size - start >= 2 * self._config.range_bytes and self._config.max_ranges > 1 and not state.fast
        until = min(start + self._config.range_bytes, size) if large else size
        headers = {"Range": f"bytes={start}-{until - 1 if large else ''}"} if start or large else {}
        with self._session.get(endpoint, f"blobs/{descriptor.digest}", headers) as answer:
            ranged = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if start and not ranged:
                _skip(answer, start)  # no ranges here: what has come already comes again
            limit = until if ranged else size
            began, waited_s = time.monotonic(), 0.0
            asked = began
            while chunk := answer.chunk():
                waited_s += time.monotonic() - asked
                if state.position + len(chunk) > limit:
                    raise BadContent(f"{endpoint.host}: blob {descriptor.digest} is larger than {size} bytes")
                state.hash.update(chunk)
                state.position += len(chunk)
                take(chunk)
                asked = time.monotonic()
        if large and ranged and state.position == until:
            state.fast = waited_s < max((asked - began) / 2, (until - start) / _FAST_BYTES_S)
            if state.fast:
                return
            self._receive_pieces(endpoint, descriptor, state, take, spool)
        state.done = state.position == size
        if not state.done:
            state.resumes += 1
            if state.resumes > _RESUMES or state.position == state.before:
                raise Busy(f"connection ends after {state.position} of {size} bytes")
            state.before = state.position

    def _receive_pieces(
        self, endpoint: Endpoint, descriptor: Descriptor, state: _Arriving, take: Callable[[bytes], None], spool: Path
    ) -> None:
        """The rest of a blob by ranges; a piece that breaks off is resumed on its own, one that fails ends them all."""

        def piece(start: int, end: int, progress: Callable[[int], None]) -> None:
            at, resumes = start, 0

            def fetch(endpoint: Endpoint) -> None:
                nonlocal resumes
                while at < end:
                    began = at
                    receive(endpoint)
                    resumes += 1
                    if at == began or (at < end and resumes > _RESUMES):
                        raise Busy(f"connection ends after {at - start} of {end - start} bytes")

            def receive(endpoint: Endpoint) -> None:
                nonlocal at
                with self._session.get(
                    endpoint, f"blobs/{descriptor.digest}", {"Range": f"bytes={at}-{end - 1}"}
                ) as answer:
                    if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {at}-"):
                        raise Busy("it has stopped to answer ranges")
                    while chunk := answer.chunk():
                        if at + len(chunk) > end:
                            raise BadContent(f"{endpoint.host}: sends more than the range that it was asked for")
                        _write_all(file.fileno(), chunk, at)
                        at += len(chunk)
                        progress(at)

            self._retried(endpoint, fetch, True)

        with tempfile.NamedTemporaryFile(dir=spool, buffering=0) as file:
            front = Front(file.fileno(), state.hash, state.position, take)
            try:
                in_parallel(piece, front, descriptor.size, self._config.range_bytes, self._config.max_ranges)
            finally:
                state.position = front.position

    def _document(self, target: str, capability: str, size: int | None) -> Document:
        limit = self._config.manifest_limit_bytes
        if size is not None and size > limit:
            raise Exhausted(f"manifest {target} of {size} bytes, the limit is {limit}")

        def fetch(endpoint: Endpoint) -> Document:
            with self._session.get(endpoint, f"manifests/{target}", {"Accept": ACCEPT}) as answer:
                data = answer.body(limit + 1)
            if len(data) > limit:
                raise Exhausted(f"{endpoint.host}: manifest {target} of more than {limit} bytes")
            told = answer.headers.get("Docker-Content-Digest", "")
            wanted = target if ":" in target else told if told.startswith(("sha256:", "sha512:")) else ""
            digest = digest_of(data, wanted or "sha256:")
            if wanted and digest != wanted:
                raise BadContent(f"{endpoint.host}: manifest {target} arrives as {digest} instead of {wanted}")
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            if kind.startswith("text/"):
                raise BadContent(f"{endpoint.host}: manifest {target} arrives as {kind}: that is no registry")
            return Document(data, kind, digest)

        return self._ask(capability, f"manifest {target}", fetch)

    def _ask(
        self, capability: str, what: str, fetch: Callable[[Endpoint], T], without: Collection[str] | None = None
    ) -> T:
        """Try the endpoints in order, each with retries; the last one's error is raised. Those found dead come last,
        and not after the upstream has answered."""
        ready = [e for e in self._endpoints if capability in e.capabilities and e.base not in (without or ())]
        failure: CribError = NotFound(f"{self._reference}: no host is configured for {capability}")
        left, told = self._health.ordered(ready), False
        while left:
            endpoint = left.pop(0)
            if told and self._health.down(endpoint):
                break
            try:
                result = self._retried(endpoint, fetch, not left)
                self._health.answered(endpoint)
                return result
            except Cancelled:
                raise
            except (NotFound, RegistryDenied, RegistryUnavailable, BadContent, Exhausted) as error:
                failure = error
                if isinstance(error, RegistryUnavailable):
                    self._health.failed(endpoint)
                elif endpoint.upstream:
                    told = True
                if isinstance(error, BadContent) and without is not None:
                    raise  # what has come is of no use to the next
                if len(ready) > 1:
                    log.info("host %s for %s fails with %s: %s", endpoint.host, self._reference, what, error)
        raise failure

    def _retried(self, endpoint: Endpoint, fetch: Callable[[Endpoint], T], patient: bool) -> T:
        """With `patient` also when there is no connection: there is nobody else to ask."""
        delay_s = self._config.backoff_s
        for attempt in range(1, self._config.attempts + 1):
            self._session.check()
            try:
                return fetch(endpoint)
            except Busy as busy:
                wait_s = delay_s if busy.retry_after_s is None else busy.retry_after_s
                if busy.unreachable and not patient:
                    raise RegistryUnavailable(f"{endpoint.host}: {busy}") from busy
                if attempt == self._config.attempts or wait_s > self._config.retry_after_limit_s:
                    raise RegistryUnavailable(f"{endpoint.host}: {busy}") from busy
                log.debug("host %s: %s; again in %.1f s", endpoint.host, busy, wait_s)
                self._session.pause(wait_s)
                delay_s *= 2
        raise AssertionError("unreachable")


def _skip(answer: Answer, size: int) -> None:
    while size:
        chunk = answer.chunk(min(size, 1 << 18))
        if not chunk:
            raise Busy("connection ends early")
        size -= len(chunk)


def _write_all(file: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, position)
        view, position = view[done:], position + done

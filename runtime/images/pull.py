"""One pull: from a reference to content, in a thread of its own, for everybody who asked for the same."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from runtime.errors import Cancelled, NotFound
from runtime.images.authfile import credentials
from runtime.images.errors import BadContent, BadImage
from runtime.images.health import Health
from runtime.images.image import Auth, ImagesConfig, Progress
from runtime.images.manifest import Descriptor, Index, Manifest, parse, select
from runtime.images.records import StoredImage
from runtime.images.reference import Reference
from runtime.images.registry import Registry
from runtime.images.transfer import Content, Source
from runtime.images.verifier import media_type, verify

log = logging.getLogger(__name__)

_NESTED_INDEXES = 3

Listener = Callable[[Progress], None]
# Installs content under cancellation by the pull; gives the image's id.
Install = Callable[[Content, Source, "Pull"], str]


class _RegistrySource:
    def __init__(self, registry: Registry, spool: Path) -> None:
        self._registry = registry
        self._spool = spool

    def fetch(self, descriptor: Descriptor, take: Callable[[bytes], None]) -> None:
        self._registry.blob(descriptor, take, self._spool)

    def another(self, descriptor: Descriptor) -> bool:
        return self._registry.another(descriptor)

    def cancel(self) -> None:
        self._registry.cancel()


class Pull:
    """Runs until it is done or nobody waits for it any more. `key` tells which requests are the same.

    `known` gives the image with an id if it is in the store: its configuration isn't fetched again.
    """

    def __init__(
        self,
        reference: Reference,
        auth: Auth | None,
        config: ImagesConfig,
        spool: Path,
        health: Health,
        only: str,
        known: Callable[[str], StoredImage | None],
    ) -> None:
        self.key = (str(reference), auth, only)
        self.reference = reference
        self.result: Future[str] = Future()
        self._auth = auth
        self._config = config
        self._spool = spool
        self._health = health
        self._only = only
        self._known = known
        self._lock = threading.Lock()
        self._waiting: list[Listener | None] = []
        self._latest: dict[str, Progress] = {}
        self._on_cancel: Callable[[], None] | None = None
        self.cancelled = False

    def join(self, listener: Listener | None) -> bool:
        """Wait along; False when the pull is being given up and another has to be started."""
        with self._lock:
            if self.cancelled:
                return False
            self._waiting.append(listener)
            latest = list(self._latest.values())
        for progress in latest:
            _tell(listener, progress)
        return True

    def leave(self, listener: Listener | None) -> None:
        with self._lock:
            self._waiting.remove(listener)
            if self._waiting or self.result.done():
                return
        self.cancel()

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            on_cancel = self._on_cancel
        if on_cancel is not None:
            on_cancel()

    def when_cancelled(self, action: Callable[[], None]) -> None:
        """`cancel` calls `action` from now on. Raises Cancelled if it is too late for that."""
        with self._lock:
            self._on_cancel = action
            if self.cancelled:
                raise Cancelled(f"pull of {self.reference} was cancelled")

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled(f"pull of {self.reference} was cancelled")

    def report(self, progress: Progress) -> None:
        with self._lock:
            self._latest[progress.digest] = progress
            listeners = list(self._waiting)
        for listener in listeners:
            _tell(listener, progress)

    def start(self, install: Install, ended: Callable[["Pull"], None]) -> threading.Thread:
        """Begin in a new thread; `ended` is called when nothing is running any more, before the result is set."""
        thread = threading.Thread(target=self._run, args=(install, ended), name=f"pull {self.reference}"[:60])
        thread.start()
        return thread

    def _run(self, install: Install, ended: Callable[["Pull"], None]) -> None:
        try:
            image = self._pull(install)
        except BaseException as error:
            ended(self)
            self.result.set_exception(error)
        else:
            ended(self)
            self.result.set_result(image)

    def _pull(self, install: Install) -> str:
        auth = self._auth or credentials(self._config.auth_file, self.reference)
        registry = Registry(self.reference, auth, self._config, self._health)
        try:
            self.when_cancelled(registry.cancel)
            content = self._content(registry)
            return install(content, _RegistrySource(registry, self._spool), self)
        finally:
            registry.close()

    def _content(self, registry: Registry) -> Content:
        reference = self.reference
        top = document = registry.resolve()
        parsed = _parse(document.data, document.content_type)
        kind = media_type(top.content_type, isinstance(parsed, Index))
        config = self._config
        asked = (kind, top.digest, len(top.data))
        verify(config.verifiers, config.verifier_timeout_s, str(reference), asked, self.check)
        for _ in range(_NESTED_INDEXES):
            if not isinstance(parsed, Index):
                break
            descriptor = select(parsed)
            document = registry.document(descriptor)
            if len(document.data) != descriptor.size:
                raise BadContent(f"{reference}: manifest {descriptor.digest} is not of {descriptor.size} bytes")
            parsed = _parse(document.data, document.content_type)
        if isinstance(parsed, Index):
            raise BadImage(f"{reference}: indexes more than {_NESTED_INDEXES} deep")
        if self._only not in ("", parsed.config.digest):
            raise NotFound(f"{reference}: is another image now, {parsed.config.digest}")
        known = self._known(parsed.config.digest)
        names = [f"{reference.name}@{top.digest}"]
        if not reference.digest:
            names.append(str(reference))
        return Content(
            manifest=parsed,
            manifest_digest=document.digest,
            raw_manifest=document.data,
            raw_config=known.config if known else registry.small_blob(parsed.config, config.config_limit_bytes),
            names=tuple(names),
        )


def _parse(data: bytes, content_type: str) -> Index | Manifest:
    try:
        return parse(data, content_type)
    except BadImage as error:
        raise BadContent(str(error)) from error


def _tell(listener: Listener | None, progress: Progress) -> None:
    if listener is None:
        return
    try:
        listener(progress)
    except Exception:
        log.exception("a listener to progress failed")

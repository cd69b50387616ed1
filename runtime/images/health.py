"""Which hosts did not answer of late, over all pulls: a dead mirror costs its time-out once."""

import threading
import time

from runtime.images.hosts import Endpoint


class Health:
    """Thread-safe; of bounded size, as only configured hosts get in."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._lock = threading.Lock()
        self._down: dict[str, float] = {}

    def failed(self, endpoint: Endpoint) -> None:
        """It did not answer: for `memory_s` it is asked after the others."""
        with self._lock:
            self._down[endpoint.base] = time.monotonic() + self._memory_s

    def answered(self, endpoint: Endpoint) -> None:
        with self._lock:
            self._down.pop(endpoint.base, None)

    def down(self, endpoint: Endpoint) -> bool:
        """Whether it did not answer of late."""
        with self._lock:
            return self._down.get(endpoint.base, 0) > time.monotonic()

    def ordered(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        """As configured, but those last that did not answer of late."""
        return sorted(endpoints, key=self.down)

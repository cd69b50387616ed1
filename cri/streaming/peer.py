"""The client's side of SPDY/3.1, for who connects to cribd: it opens streams, and keeps windows."""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Final

from cri.streaming.spdy import FLAG_FIN, SYN_STREAM, Spdy, Stream

_HEAD: Final = Struct(">IIH")  # the stream, no associated one, no priority


class Peer(Spdy):
    """One connection's client. A stream is taken to be accepted until it is reset."""

    _peers_parity = 0

    def open(self, headers: Mapping[str, str], *, ended: bool = False) -> int:
        """A new stream; `ended`: nothing will be sent on it."""
        number = self._last = self._last + 1 + self._last % 2
        self._streams[number] = Stream(remote_open=True, local_open=not ended)
        self._control(SYN_STREAM, FLAG_FIN if ended else 0, _HEAD.pack(number, 0, 0) + self._compressed(headers))
        return number

    def _replied(self, number: int) -> None:
        pass

"""The streaming server: hands out addresses with one-time tokens, and serves who comes to them."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from typing import TYPE_CHECKING, Final

from cri.streaming import upgrade
from cri.streaming.attach import AttachSession
from cri.streaming.exec import ExecSession
from cri.streaming.forward import ForwardSession
from cri.streaming.link import Link, Session
from cri.streaming.request import Attach, Exec, Forward, Request
from cri.streaming.spdy import Spdy
from cri.streaming.tokens import Tokens
from cri.streaming.upgrade import Refused, Upgrade, Upgrader
from runtime.errors import Unavailable

if TYPE_CHECKING:
    from cri.node import Node

_KINDS: Final = {Exec: upgrade.EXEC, Attach: upgrade.ATTACH, Forward: upgrade.PORT_FORWARD}
_ANY: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_logger = logging.getLogger(__name__)


class StreamingServer:
    """Serves from `start` to `close`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._config = node.config.streaming
        self._tokens: Tokens[Request] = Tokens()
        self._links: set[Link] = set()
        self._server: asyncio.Server | None = None
        self._door: ssl.SSLContext | None = None
        self._tls: ssl.SSLContext | None = None
        self._certificate: tuple[int, ...] = ()
        self._base = ""

    async def start(self) -> None:
        """Listen. Raises Unavailable."""
        config = self._config
        try:
            if config.tls_cert:
                self._tls = self._door = self._with_certificate()
                # Called for every connection, whatever name it gives: each gets the certificate of its time.
                self._door.sni_callback = lambda sock, name, context: setattr(sock, "context", self._tls)
            self._server = await asyncio.get_running_loop().create_server(
                self._connected,
                config.address,
                config.port,
                ssl=self._door,
                ssl_handshake_timeout=config.creation_timeout_s if self._door else None,
                reuse_address=True,
            )
        except (OSError, ssl.SSLError) as error:
            raise Unavailable(f"streaming server on {config.address}:{config.port}: {error}") from error
        host, port = self._server.sockets[0].getsockname()[:2]
        host = _ANY.get(host, host)
        self._base = f"http{'s' if self._tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"

    def url(self, request: Request) -> str:
        """Where the caller may take `request` up, once and soon. Raises Exhausted."""
        return f"{self._base}/{_KINDS[type(request)]}/{self._tokens.issue(request)}"

    async def close(self) -> None:
        """End all sessions; commands end with theirs."""
        if self._server:
            self._server.close()
        for link in list(self._links):
            link.break_off()

    def _connected(self) -> Link:
        if self._tls:
            self._renew_certificate()
        creation_s, idle_s = self._config.creation_timeout_s, self._config.idle_timeout_s
        return Link(self._take_up, Upgrader(), self._links, creation_s, idle_s)

    def _take_up(self, link: Link, asked: Upgrade) -> Session:
        """The session that the token stands for. Raises Refused."""
        request = self._tokens.take(asked.token)
        if request is None or _KINDS[type(request)] != asked.kind:
            raise Refused(404, "no such request: its address works once and for a minute")
        wire = asked.wire if isinstance(asked.wire, Spdy) else None
        if isinstance(request, Exec):
            return ExecSession(self._node, link, request, asked.version, wire)
        if isinstance(request, Attach):
            return AttachSession(self._node, link, request, asked.version, wire)
        if wire is None and not 0 < len(request.ports) <= upgrade.PORTS_LIMIT:
            raise Refused(400, f"port-forward by channels: 1 to {upgrade.PORTS_LIMIT} ports are named in the request")
        return ForwardSession(link, request, wire)

    def _with_certificate(self) -> ssl.SSLContext:
        """Raises OSError, of which ssl.SSLError is one."""
        self._certificate = self._certificate_now()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._config.tls_cert, self._config.tls_key)
        return context

    def _renew_certificate(self) -> None:
        """Take a certificate that was replaced on disk for the connections from now on, unless it is bad."""
        try:
            if self._certificate_now() != self._certificate:
                self._tls = self._with_certificate()
                _logger.info("streaming certificate loaded", extra={"fields": {"file": self._config.tls_cert}})
        except OSError as error:
            _logger.warning("streaming certificate kept: the new one is bad", extra={"fields": {"error": str(error)}})

    def _certificate_now(self) -> tuple[int, ...]:
        files = (os.stat(name) for name in (self._config.tls_cert, self._config.tls_key))
        return tuple(value for file in files for value in (file.st_mtime_ns, file.st_ino))

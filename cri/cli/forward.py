"""`crib port-forward`: local ports whose connections end at a pod's loopback address.

Each connection asks cribd for an address of its own, so that the others, and a cribd that was started again, are as
good as new to the next one.
"""

from __future__ import annotations

import asyncio
import os
import re
from argparse import Namespace
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import h11

from cri.api import cri_pb2 as pb
from cri.cli import failure
from cri.cli.client import Client
from cri.cli.failure import Failure
from cri.cli.inventory import Inventory
from cri.cli.stream import tls
from cri.streaming.peer import Peer
from cri.streaming.wire import Data, Ended, Reset, WireError

_LOOPBACK: Final = ("127.0.0.1", "::1")
_READ_BYTES: Final = 64 << 10
_CONNECT_S: Final = 30
_PORTS: Final = re.compile(
    r"(?:(?:(?P<address>\d+(?:\.\d+){3}|\[[0-9a-fA-F:]+\]):)?(?P<here>\d{0,5}):)?(?P<there>\d{1,5})"
)


@dataclass(frozen=True, slots=True)
class Port:
    """A port here (0: any that is free) at some addresses, and the pod's."""

    addresses: tuple[str, ...]
    here: int
    there: int


def _port(text: str) -> Port:
    """[[ADDRESS:]PORT:]PORT; without an address, both loopback ones."""
    match = _PORTS.fullmatch(text)
    if match:
        there = int(match["there"])
        here = there if match["here"] is None else int(match["here"] or 0)
        if 0 < there < 65536 and here < 65536:
            return Port((match["address"].strip("[]"),) if match["address"] else _LOOPBACK, here, there)
    raise Failure(f"port-forward {text!r}: not [[ADDRESS:]PORT:]PORT", failure.USAGE)


def port_forward(client: Client, options: Namespace) -> int:
    """Forward until this is interrupted, or the pod is gone."""
    ports = [_port(text) for text in options.ports]
    pod = Inventory(client).pod(options.pod)
    if pod.state != pb.SANDBOX_READY:
        raise Failure(f"pod {pod.metadata.name} does not run")
    return asyncio.run(_Forwarder(client, pod.id).run(ports))


class _Forwarder:
    def __init__(self, client: Client, pod_id: str) -> None:
        self._client = client
        self._pod_id = pod_id

    async def run(self, ports: list[Port]) -> int:
        self._gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        async with AsyncExitStack() as stack:
            for port in ports:
                await self._listen(port, stack)
            return await self._gone

    async def _listen(self, port: Port, stack: AsyncExitStack) -> None:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self._serve(port.there, reader, writer)
            except Failure as failed:
                failure.report(failed)
                if failed.code == failure.NOT_FOUND and not self._gone.done():
                    self._gone.set_exception(failed)
            except ConnectionError:  # of the connection here: whose it is knows
                pass
            except (OSError, WireError) as error:
                failure.report(Failure(f"port {port.there}: {error}"))
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

        here = port.here
        for address in port.addresses:
            try:
                server = await asyncio.start_server(accepted, address, here)
            except OSError as error:
                if here and address == _LOOPBACK[1] and port.addresses == _LOOPBACK:
                    continue  # no IPv6 here
                reason = os.strerror(error.errno).lower() if error.errno else str(error)
                raise Failure(f"port-forward: {address}:{here}: {reason}") from error
            await stack.enter_async_context(server)
            here = server.sockets[0].getsockname()[1]
            shown = f"[{address}]" if ":" in address else address
            print(f"forwarding {shown}:{here} to port {port.there}", flush=True)

    async def _serve(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = await asyncio.to_thread(self._client.call, "PortForward", pod_sandbox_id=self._pod_id, port=[port])
        connection = await _Connection.open(answer.url, port)
        try:
            await connection.carry(reader, writer)
        finally:
            await connection.close()


class _Connection:
    """One connection to a port of the pod."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        self._reader = reader
        self._writer = writer
        self._peer = Peer()
        self._error = self._peer.open({"streamtype": "error", "port": str(port), "requestid": "0"}, ended=True)
        self._data = self._peer.open({"streamtype": "data", "port": str(port), "requestid": "0"})
        self._room = asyncio.Event()
        self._said = b""

    @classmethod
    async def open(cls, url: str, port: int) -> _Connection:
        """Raises OSError or Failure."""
        parts = urlsplit(url)
        context = tls() if parts.scheme == "https" else None
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
            try:
                rest = await _upgrade(reader, writer, parts.netloc, parts.path)
            except BaseException:
                writer.close()
                raise
        made = cls(reader, writer, port)
        made._peer.feed(rest)
        return made

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes and ends on, both ways, until both have ended. Raises Failure with what cribd says."""
        giving = asyncio.create_task(self._give(reader))
        try:
            await self._take(writer)
            if not self._said:
                await giving
        finally:
            giving.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await giving
        if self._said:
            raise Failure(self._said.decode(errors="replace"))

    async def _give(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_READ_BYTES):
            while data:
                while (room := self._peer.room(self._data)) <= 0:
                    self._room.clear()
                    await self._room.wait()
                self._peer.send(self._data, data[:room])
                data = data[room:]
                await self._flush()
        self._peer.end(self._data)
        await self._flush()

    async def _take(self, writer: asyncio.StreamWriter) -> None:
        """Until both streams are at their ends."""
        left = {self._data, self._error}
        while left and (data := await self._reader.read(_READ_BYTES)):
            for event in self._peer.feed(data):
                if isinstance(event, Data) and event.stream == self._data:
                    writer.write(event.data)
                    await writer.drain()
                    self._peer.consumed(self._data, len(event.data))
                elif isinstance(event, Data):
                    self._said += event.data
                elif isinstance(event, Ended | Reset):
                    left.discard(event.stream)
                    if event.stream == self._data and writer.can_write_eof() and not writer.is_closing():
                        writer.write_eof()
            self._room.set()
            await self._flush()
        if left and not self._said:
            raise Failure("the connection to cribd has ended", failure.UNREACHABLE)

    async def _flush(self) -> None:
        self._writer.write(self._peer.take())
        await self._writer.drain()

    async def close(self) -> None:
        self._peer.close()
        self._writer.write(self._peer.take())
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


async def _upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, target: str) -> bytes:
    """Have the connection speak SPDY; what came of that already."""
    http = h11.Connection(h11.CLIENT)
    headers = [("Host", host), ("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("Content-Length", "0")]
    headers.append(("X-Stream-Protocol-Version", "portforward.k8s.io"))
    writer.write(http.send(h11.Request(method="POST", target=target, headers=headers)) or b"")
    writer.write(http.send(h11.EndOfMessage()) or b"")
    said = b""
    while True:
        try:
            event = http.next_event()
        except h11.RemoteProtocolError as error:
            raise Failure(f"cribd refuses to forward: {error}") from error
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.InformationalResponse) and event.status_code == 101:
            return http.trailing_data[0]
        elif isinstance(event, h11.Data):
            said += event.data
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            raise Failure(f"cribd refuses to forward: {said.decode(errors='replace').strip() or 'without a word'}")

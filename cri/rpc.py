"""From descriptor to served method: one wrapper around every call of every service.

It decodes the request (so that bad UTF-8 is the caller's InvalidArgument and not an internal error), sets the log's
context, knows the caller's deadline, turns an exception into a status, writes the call's log line and feeds the metric
hook. A method of the descriptor that nobody implements goes through it as well, and answers UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message

from cri.daemon import log
from cri.status import status_of
from runtime.errors import Exhausted, InvalidSpec, Unsupported

MESSAGE_LIMIT_BYTES: Final = 16 << 20  # what the kubelet's client accepts
_NO_DEADLINE_S: Final = 1e9  # grpcio reports about 9.2e18 seconds where the caller set none
_READS: Final = re.compile(r"^(List|Stream|Get)|(Status|Stats|Info)$|^(Version|RuntimeConfig|Plan|Doctor|ExecSync)$")
"""Calls that change nothing, or, as probes do with ExecSync, come every second: their lines are DEBUG."""
_NO_TROUBLE: Final = (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)
_BATCH: Final = 1000  # items of 1 to 4 KiB
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler may know of the call besides its request. `remaining_s` is None without a deadline."""

    method: str
    remaining_s: float | None


_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = Callable[..., Awaitable[Message]] | Callable[..., AsyncIterator[Message]]
MetricHook: TypeAlias = Callable[[str, str, float], None]
"""Called as (method, gRPC code's name, seconds) after each call."""


def streamed(listing: Callable[..., Awaitable[Message]], kind: type[Message]) -> Handler:
    """The streaming form of a call that lists: the same filter, and the items in messages of `kind` that stay small."""

    async def stream(request: Message, call: Call) -> AsyncIterator[Message]:
        for _, items in (await listing(request, call)).ListFields():
            for first in range(0, len(items), _BATCH):
                yield kind(**{kind.DESCRIPTOR.fields[0].name: items[first : first + _BATCH]})

    return stream


def generic_handler(
    service: ServiceDescriptor, handlers: Mapping[str, Handler], on_call: MetricHook | None = None
) -> grpc.GenericRpcHandler:
    """Serve all methods of `service`: those in `handlers` by them, the others by UNIMPLEMENTED.

    A handler is called as (request, call); a client-streaming one gets an async iterator of requests, and a
    server-streaming one is an async generator.
    """
    unknown = handlers.keys() - {method.name for method in service.methods}
    assert not unknown, f"{service.full_name} has no {unknown}"
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {method.name: _served(method, handlers.get(method.name), on_call) for method in service.methods},
    )


def _served(method: MethodDescriptor, handler: Any, on_call: MetricHook | None) -> grpc.RpcMethodHandler[Any, Any]:
    name = method.name
    request_class = message_factory.GetMessageClass(method.input_type)
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }

    def decoded(body: bytes) -> Message:
        try:
            return request_class.FromString(body)
        except DecodeError as error:
            raise InvalidSpec(f"{name} request: {error}") from error

    async def decoded_stream(bodies: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for body in bodies:
            yield decoded(body)

    def invoke(requests: Any, call: Call) -> Any:
        if handler is None:
            raise Unsupported(f"{name} is not implemented")
        return handler(decoded_stream(requests) if method.client_streaming else decoded(requests), call)

    async def serve(requests: Any, context: _Context) -> bytes:
        async with _Observed(name, context, on_call) as call:
            return _encoded(name, await invoke(requests, call))

    async def serve_stream(requests: Any, context: _Context) -> AsyncIterator[bytes]:
        async with _Observed(name, context, on_call) as call, contextlib.aclosing(invoke(requests, call)) as answers:
            await context.send_initial_metadata(())  # from here on nothing is missed by who asked
            async for answer in answers:
                yield _encoded(name, answer)

    made: grpc.RpcMethodHandler[Any, Any] = kinds[method.client_streaming, method.server_streaming](
        serve_stream if method.server_streaming else serve, None, None
    )
    return made


class _Observed:
    """Around one call: the log's context and line, the metric, and the status of whatever was raised inside."""

    def __init__(self, name: str, context: _Context, on_call: MetricHook | None) -> None:
        self._name, self._context, self._on_call = name, context, on_call

    async def __aenter__(self) -> Call:
        log.rpc.set(self._name)
        self._began = time.perf_counter()
        return Call(self._name, _remaining_s(self._context))

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        seconds = time.perf_counter() - self._began
        code, text, expected = (grpc.StatusCode.OK, "", True) if error is None else status_of(error)
        gone = isinstance(error, (asyncio.CancelledError, GeneratorExit))
        if gone:
            expired = (remaining := _remaining_s(self._context)) is not None and remaining <= 0
            code, text = (
                (grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed")
                if expired
                else (grpc.StatusCode.CANCELLED, "the caller went away")
            )
        _write(self._name, code, text, None if expected or gone else error, seconds)
        if self._on_call:
            self._on_call(self._name, code.name, seconds)
        if isinstance(error, Exception):
            await self._context.abort(code, text)


def _encoded(name: str, answer: Message) -> bytes:
    try:
        body = answer.SerializeToString()
    except EncodeError as error:
        raise Exhausted(f"{name} answer: {error}") from error
    if len(body) > MESSAGE_LIMIT_BYTES:
        raise Exhausted(f"{name} answer has {len(body)} bytes, a client takes {MESSAGE_LIMIT_BYTES}: narrow the filter")
    return body


def _remaining_s(context: _Context) -> float | None:
    remaining: float | None = context.time_remaining()
    return None if remaining is None or remaining > _NO_DEADLINE_S else remaining


def _write(name: str, code: grpc.StatusCode, text: str, failure: BaseException | None, seconds: float) -> None:
    """The call's one line: INFO for a change, DEBUG for `_READS`, also unheard ones; worse for what went wrong."""
    reads = _READS.search(name) is not None
    level = logging.DEBUG if reads else logging.INFO
    if failure is not None:
        level = logging.ERROR
    elif code not in _NO_TROUBLE and not (reads and code is grpc.StatusCode.CANCELLED):
        level = logging.WARNING
    if not _logger.isEnabledFor(level):
        return
    extra: dict[str, object] = {"code": code.name, "ms": f"{seconds * 1e3:.1f}"}
    if text:
        extra["error"] = text
    _logger.log(level, "call", extra={"fields": extra}, exc_info=failure)

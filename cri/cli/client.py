"""The connection to cribd: calls by name, straight from the descriptors, and gRPC's errors as failures."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias

# Its own complaints belong to nobody who types a command.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cri.api import cri_pb2, crib_pb2
from cri.cli import failure
from cri.cli.failure import Failure

CALL_S: Final = 120.0
_MESSAGE_LIMIT_BYTES: Final = 16 << 20
_SERVICES: Final = (
    cri_pb2.DESCRIPTOR.services_by_name["RuntimeService"],
    cri_pb2.DESCRIPTOR.services_by_name["ImageService"],
    crib_pb2.DESCRIPTOR.services_by_name["Crib"],
)
Answer: TypeAlias = Any
"""A response message; its class follows from the method's name."""


class Client:
    """Calls of cribd behind `endpoint`, "unix:///PATH" or a path. Connects when first used.

    Every method raises Failure.
    """

    def __init__(self, endpoint: str) -> None:
        path = endpoint.removeprefix("unix://")
        if not path.startswith("/"):
            raise Failure(f"endpoint {endpoint!r} is not unix:///PATH", failure.USAGE)
        self.endpoint = f"unix://{path}"
        self._path = path
        self._channel: grpc.Channel | None = None
        self._behind: list[Any] = []

    def close(self) -> None:
        """Let go of the connection; the next call makes a new one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def call(self, method: str, timeout_s: float | None = CALL_S, **fields: Any) -> Answer:
        """The answer of one call. `timeout_s` None waits as long as cribd does."""
        try:
            return self._stub(method)(_request(method, fields), timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._failure(method, error) from error

    def call_each(self, method: str, requests: Iterable[dict[str, Any]]) -> list[Answer | None]:
        """The answers of calls that run side by side, None where the object is gone by now."""
        stub = self._stub(method)
        futures = [stub.future(_request(method, fields), timeout=CALL_S) for fields in requests]
        return [self._answer(method, future) for future in futures]

    def call_behind(self, method: str, **fields: Any) -> None:
        """Make a call whose answer nobody waits for."""
        # Kept, for gRPC cancels a call with the last reference to its future.
        self._behind.append(self._stub(method).future(_request(method, fields)))

    def _answer(self, method: str, future: Any) -> Answer | None:
        try:
            return future.result()
        except grpc.RpcError as error:
            failed = self._failure(method, error)
            if failed.code == failure.NOT_FOUND:
                return None
            raise failed from error

    def stream(self, method: str, **fields: Any) -> Iterator[Answer]:
        """The answers of a call that has several, as they come."""
        try:
            yield from self._stub(method)(_request(method, fields))
        except grpc.RpcError as error:
            raise self._failure(method, error) from error

    def send(self, method: str, requests: Iterator[Message]) -> Answer:
        """The answer of a call that takes many requests."""
        try:
            return self._stub(method)(requests)
        except grpc.RpcError as error:
            raise self._failure(method, error) from error

    def _stub(self, method: str) -> Any:
        if self._channel is None:
            if reason := self._silence():
                raise self._unreachable(reason)
            self._channel = grpc.insecure_channel(
                self.endpoint,
                # Its own connections: another channel's may be waiting before they try again.
                options=[
                    ("grpc.max_receive_message_length", _MESSAGE_LIMIT_BYTES),
                    ("grpc.use_local_subchannel_pool", 1),
                ],
            )
        found = _method(method)
        kind = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, False): self._channel.stream_unary,
        }[found.client_streaming, found.server_streaming]
        return kind(
            f"/{found.containing_service.full_name}/{found.name}",
            request_serializer=GetMessageClass(found.input_type).SerializeToString,
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )

    def _silence(self) -> str:
        """Why nobody answers at the socket, "" when somebody does: the system's own words, which gRPC hides."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self._path)
            except OSError as error:
                return (error.strerror or str(error)).lower()
        return ""

    def _unreachable(self, reason: str) -> Failure:
        advice = "run it as root" if reason == "permission denied" else "is it running?"
        return Failure(f"cannot reach cribd at {self.endpoint}: {reason}: {advice}", failure.UNREACHABLE)

    def _failure(self, method: str, error: grpc.RpcError) -> Failure:
        code, details = error.code(), error.details() or ""
        # UNAVAILABLE may be cribd's own word, about something that doesn't answer it.
        if code is grpc.StatusCode.UNAVAILABLE and (reason := self._silence()):
            self.close()
            return self._unreachable(reason)
        if code is grpc.StatusCode.NOT_FOUND:
            return Failure(details, failure.NOT_FOUND)
        if code is grpc.StatusCode.UNIMPLEMENTED and not details.startswith(method):
            return Failure(f"{method}: this cribd can't do it: {details}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Failure(f"{method}: {details[:1].lower()}{details[1:]}")
        return Failure(details or f"{method}: {code.name.lower()}")


def _method(name: str) -> MethodDescriptor:
    for service in _SERVICES:
        if name in service.methods_by_name:
            return service.methods_by_name[name]
    raise LookupError(name)


def _request(method: str, fields: dict[str, Any]) -> Message:
    return GetMessageClass(_method(method).input_type)(**fields)

"""Calls to systemd over D-Bus, one connection each.

systemd's own socket comes first: no broker in between. Nothing is kept from one call to the next, so nothing is lost
when systemd is reloaded or executes itself anew, and no signals pile up for an idle connection. What is sent for
authentication doesn't wait for its answer (D-Bus specification, "Authentication Protocol"; sd-bus does the same).
"""

import os
import socket
import time
from typing import Any, Final, Self

from jeepney import DBusAddress, HeaderFields, MatchRule, Message, MessageType, Parser, message_bus, new_method_call

from runtime.errors import DeadlineExceeded, Unavailable

PRIVATE_SOCKET: Final = "/run/systemd/private"
SYSTEM_SOCKET: Final = "/run/dbus/system_bus_socket"
SOCKETS: Final = (PRIVATE_SOCKET, SYSTEM_SOCKET)
TIMEOUT_S: Final = 20.0

_PATH: Final = "/org/freedesktop/systemd1"
_MANAGER: Final = DBusAddress(_PATH, "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager")
_READ_BYTES: Final = 64 * 1024


class Refused(Exception):
    """systemd answered with an error; `name` is the last part of the D-Bus error's name ("NoSuchUnit")."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class Connection:
    """A connection to systemd's manager, used by one thread and for one purpose.

    Every method raises Unavailable when systemd can't be reached or goes away, DeadlineExceeded when it doesn't answer
    in time, Refused when it answers with an error.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S, sockets: tuple[str, ...] = SOCKETS) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._serial = 0
        self._parser = Parser()
        self._jobs: dict[str, str] = {}  # ended: object path to result
        self._socket, brokered = self._connect(sockets)
        try:
            self._send(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
            self._authenticated()
            if brokered:
                self._request(message_bus.Hello())
                self._request(message_bus.AddMatch(MatchRule(type="signal", path=_PATH, member="JobRemoved")))
                self._request(new_method_call(_MANAGER, "Subscribe"))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, method: str, signature: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a method of the manager; returns the answer's body."""
        return self._request(new_method_call(_MANAGER, method, signature, arguments))

    def job(self, method: str, signature: str, *arguments: Any) -> str:
        """Call a method that enqueues a job, and wait for its end; returns its result, "done" if it succeeded."""
        (path,) = self.call(method, signature, *arguments)
        while path not in self._jobs:
            self._receive(f"the job of {method} {arguments[0]}")
        return self._jobs[path]

    def _connect(self, sockets: tuple[str, ...]) -> tuple[socket.socket, bool]:
        failures = []
        for path in sockets:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connected.settimeout(self._timeout_s)
            try:
                connected.connect(path)
            except OSError as error:
                connected.close()
                failures.append(f"{path}: {(error.strerror or str(error)).lower()}")
            else:
                return connected, path != PRIVATE_SOCKET
        raise Unavailable(f"systemd can't be reached ({', '.join(failures)})")

    def _authenticated(self) -> None:
        """Read the one line of the answer; messages may follow in the same read."""
        received = b""
        while b"\r\n" not in received:
            received += self._read("authentication")
        line, _, rest = received.partition(b"\r\n")
        if not line.startswith(b"OK "):
            raise Unavailable(f"systemd refuses the connection: {line.decode(errors='replace')}")
        self._parser.add_data(rest)

    def _request(self, message: Message) -> tuple[Any, ...]:
        self._serial += 1
        serial = self._serial
        self._send(message.serialise(serial=serial))
        member = message.header.fields[HeaderFields.member]
        answer: Message | None = None
        while answer is None or answer.header.fields.get(HeaderFields.reply_serial) != serial:
            answer = self._receive(member)
        if answer.header.message_type is MessageType.error:
            name = answer.header.fields[HeaderFields.error_name].rpartition(".")[2]
            raise Refused(name, answer.body[0] if answer.body else name)
        return answer.body  # type: ignore[no-any-return]

    def _receive(self, awaited: str) -> Message:
        while (message := self._parser.get_next_message()) is None:
            self._parser.add_data(self._read(awaited))
        if message.header.fields.get(HeaderFields.member) == "JobRemoved":
            _, path, _, result = message.body
            self._jobs[path] = result
        return message

    def _read(self, awaited: str) -> bytes:
        left_s = self._deadline - time.monotonic()
        try:
            self._socket.settimeout(max(left_s, 0.001))
            data = self._socket.recv(_READ_BYTES)
        except TimeoutError as error:
            raise DeadlineExceeded(f"systemd has not answered within {self._timeout_s:g} s ({awaited})") from error
        except OSError as error:
            raise Unavailable(f"systemd: {error.strerror} ({awaited})") from error
        if not data:
            raise Unavailable(f"systemd closed the connection before it answered ({awaited})")
        return data

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except TimeoutError as error:
            raise DeadlineExceeded(f"systemd reads no request within {self._timeout_s:g} s") from error
        except OSError as error:
            raise Unavailable(f"systemd: {error.strerror}") from error

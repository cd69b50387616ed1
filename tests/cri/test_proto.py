"""The CRI's descriptor: complete, exact, and generated from what is in proto/."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor

from cri.api import cri_pb2, crib_pb2

ROOT = Path(__file__).parent.parent.parent
FACTS = os.environ.get("CRIB_FACTS")

TYPES = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}


def methods() -> dict[str, MethodDescriptor]:
    services = cri_pb2.DESCRIPTOR.services_by_name.values()
    return {method.name: method for service in services for method in service.methods}


def test_generated_code_is_current() -> None:
    done = subprocess.run([ROOT / "hack/verify-proto"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_call_of_the_interface_is_there() -> None:
    assert cri_pb2.DESCRIPTOR.package == "runtime.v1"
    assert {name: len(s.methods) for name, s in cri_pb2.DESCRIPTOR.services_by_name.items()} == {
        "RuntimeService": 37,
        "ImageService": 6,
    }
    assert len(methods()) == 43
    assert not any(method.client_streaming for method in methods().values())


def test_streaming_calls() -> None:
    assert {name for name, method in methods().items() if method.server_streaming} == {
        "GetContainerEvents",
        "StreamContainerStats",
        "StreamContainers",
        "StreamImages",
        "StreamPodSandboxMetrics",
        "StreamPodSandboxStats",
        "StreamPodSandboxes",
    }


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        ("ImageSpec", "user_specified_image", 18),
        ("ImageSpec", "image_ref", 20),
        ("LinuxSandboxSecurityContext", "supplemental_groups_policy", 11),
        ("LinuxContainerSecurityContext", "run_as_group", 12),
        ("Namespace", "options", 2),
        ("ContainerConfig", "CDI_devices", 17),
        ("Mount", "uidMappings", 6),
    ],
)
def test_numbers_that_are_out_of_order(message: str, field: str, number: int) -> None:
    assert cri_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name[field].number == number


def test_credentials_are_redacted_in_debug_output() -> None:
    files = (
        cri_pb2.DESCRIPTOR.message_types_by_name["AuthConfig"],
        crib_pb2.DESCRIPTOR.message_types_by_name["PullRequest"],
    )
    for message in files:
        redacted = {field.name for field in message.fields if field.GetOptions().debug_redact}
        assert redacted == {"password", "auth", "identity_token", "registry_token"}


def test_own_service() -> None:
    service = crib_pb2.DESCRIPTOR.services_by_name["Crib"]
    assert service.full_name == "crib.v1.Crib"
    assert [m.name for m in service.methods if m.client_streaming] == ["Load"]
    assert [m.name for m in service.methods if m.server_streaming] == ["Pull", "Save", "Check"]


@pytest.mark.skipif(FACTS is None, reason="CRIB_FACTS names no directory with cri-v1-interface.txt")
def test_descriptor_is_the_interface_table() -> None:
    assert FACTS is not None
    table = Path(FACTS, "cri-v1-interface.txt").read_text().splitlines()
    assert list(interface()) == [line for line in table if line]


def interface() -> Iterator[str]:
    """The descriptor in the words of the table."""
    file = cri_pb2.DESCRIPTOR
    yield f"package {file.package}; syntax proto3"
    for name, service in file.services_by_name.items():
        yield f"service {name}"
        for call in service.methods:
            stream = "stream " if call.server_streaming else ""
            yield f"  {call.name}({call.input_type.name}) -> {stream}{call.output_type.name}"
    for enum in file.enum_types_by_name.values():
        yield in_words(enum)
    for message in file.message_types_by_name.values():
        yield f"message {message.name}"
        for enum in message.enum_types:
            yield "  " + in_words(enum)
        for field in message.fields:
            yield f"{field.number:>5} {kind(field)} {field.name}{options(field)}"


def in_words(enum: EnumDescriptor) -> str:
    return f"enum {enum.name}: " + ", ".join(f"{value.name}={value.number}" for value in enum.values)


def kind(field: FieldDescriptor) -> str:
    message: Descriptor | None = field.message_type
    if message is not None and message.GetOptions().map_entry:
        return f"map<{kind(message.fields_by_name['key'])},{kind(message.fields_by_name['value'])}>"
    named = message or field.enum_type
    word = named.name if named is not None else TYPES[field.type]
    return f"repeated {word}" if field.is_repeated else word


def options(field: FieldDescriptor) -> str:
    chosen = field.GetOptions()
    return " [deprecated]" * chosen.deprecated + " [debug_redact]" * chosen.debug_redact

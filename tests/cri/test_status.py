"""What the kubelet is told of an error, and reads in it."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest

from cri.status import status_of
from runtime.images.errors import BadContent, BadImage, RegistryDenied, RegistryUnavailable, SignatureValidationFailed


def as_the_kubelet_reads_it(error: Exception) -> str:
    """cri-client's pullImageV1: the code UNKNOWN is taken off, any other is the text's beginning."""
    code, text, _ = status_of(error)
    return text if code is grpc.StatusCode.UNKNOWN else f"rpc error: code = {code.name} desc = {text}"


@pytest.mark.parametrize("kind", [RegistryUnavailable, SignatureValidationFailed])
def test_errors_that_the_kubelet_knows(kind: type[Exception]) -> None:
    """image_manager.go's evalCRIPullErr looks at how the text starts."""
    assert as_the_kubelet_reads_it(kind("host: refused")) == f"{kind.__name__}: host: refused"
    assert status_of(kind("x"))[2], "expected: no traceback in the log"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RegistryDenied("x"), grpc.StatusCode.PERMISSION_DENIED),
        (BadContent("x"), grpc.StatusCode.DATA_LOSS),
        (BadImage("x"), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_other_errors_of_images(error: Exception, code: grpc.StatusCode) -> None:
    assert status_of(error) == (code, "x", True)


def test_no_thread_is_to_be_had() -> None:
    """At a limit of processes; Python has only words for it."""
    start = "import resource, threading; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28));"
    start += "threading.stack_size(1 << 29); threading.Thread(target=print).start()"
    failed = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False)
    kind, _, words = failed.stderr.splitlines()[-1].partition(": ")
    assert kind == "RuntimeError"
    assert status_of(RuntimeError(words)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, words, True)

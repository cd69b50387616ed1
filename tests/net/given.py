"""What tests of several networks start from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

from net import PodIdentity
from tests.net.namespaces import Namespace

NewNamespace = Callable[[], Namespace]


def pod(number: int) -> PodIdentity:
    return PodIdentity(
        sandbox_id=f"{number:011x}".ljust(64, "0"), name=f"p{number}", namespace="tests", uid=f"u{number}"
    )


def ip(*arguments: str) -> list[dict[str, object]]:
    done = subprocess.run(["ip", "-j", "-d", *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout or "[]")  # type: ignore[no-any-return]


def nft(*arguments: str) -> str:
    return subprocess.run(["nft", *arguments], check=True, capture_output=True, text=True).stdout


def inside(path: str, command: str) -> str:
    """Run a shell command in the pinned namespace; what it prints."""
    arguments = ["nsenter", f"--net={path}", "sh", "-euc", command]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

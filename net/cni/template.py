"""A CNI configuration made from a template once the kubelet has told the node's pod CIDRs.

The template is the file as it is to be, with {{.PodCIDR}} (the first), {{.PodCIDRRanges}} (for host-local's `ranges`)
and {{.Routes}} (default routes of the same IP versions) in it. The last two take their quotes with them, if any.
"""

import ipaddress
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from net.cni.conf import parse
from net.errors import InvalidSpec, Unavailable

FILE: Final = "10-crib.conflist"
_ACTION: Final = re.compile(r'"?\{\{-?\s*\.(PodCIDRRanges|Routes)\s*-?\}\}"?|\{\{-?\s*\.(PodCIDR)\s*-?\}\}')
_DEFAULTS: Final = {4: "0.0.0.0/0", 6: "::/0"}


def fill(template: str, cidrs: Sequence[str], path: str) -> bytes:
    """The configuration. Raises InvalidSpec, naming `path`, when it would be none."""
    versions = dict.fromkeys(ipaddress.ip_network(cidr).version for cidr in cidrs)
    values = {
        "PodCIDR": cidrs[0],
        "PodCIDRRanges": json.dumps([[{"subnet": cidr}] for cidr in cidrs]),
        "Routes": json.dumps([{"dst": _DEFAULTS[version]} for version in versions]),
    }
    text = _ACTION.sub(lambda match: values[match[1] or match[2]], template)
    if left := re.search(r"\{\{.*?(\}\}|$)", text, re.DOTALL):
        raise InvalidSpec(
            f"{path}: {left[0][:80]}: crib fills in {{{{.PodCIDR}}}}, {{{{.PodCIDRRanges}}}}, {{{{.Routes}}}}"
        )
    parse(text.encode(), path)
    return text.encode()


def write(template: Path, directory: Path, cidrs: Sequence[str]) -> None:
    """Put the configuration into the directory, whole or not at all. Raises InvalidSpec, Unavailable."""
    target = directory / FILE
    new = directory / f".{FILE}.new"
    try:
        data = fill(template.read_text(), cidrs, str(template))
        if target.exists() and target.read_bytes() == data:
            return
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        new.write_bytes(data)
        os.rename(new, target)
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"CNI configuration {target} from {template}: {error}") from error

"""The interfaces of a pod, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from net.errors import CribError
from net.statistics import Counters, counters

if TYPE_CHECKING:
    from cri.sandbox.pod import Pod


def interfaces(pod: Pod) -> Sequence[Counters] | None:
    """Blocks. None for a pod in the host's network, whose interfaces aren't the pod's, and one that has ended."""
    if not pod.record.netns_path:
        return None
    try:
        return counters(pod.record.netns_path)
    except CribError:
        return None

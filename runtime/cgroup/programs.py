"""Device programs for cgroup v2: one in the kernel per policy, shared by all cgroups that have it."""

import os
from collections import OrderedDict
from threading import Lock
from typing import Final

from runtime.cgroup.devices import Policy
from runtime.errors import NotFound, Unavailable
from runtime.linux import bpf

_MOST_KEPT: Final = 32  # descriptors; nearly every container has the default policy


class Programs:
    """Loads device programs and attaches them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._loaded: OrderedDict[Policy, int] = OrderedDict()

    def attach(self, directory: str, policy: Policy) -> None:
        """Make `policy` what the cgroup's processes may do with devices, in one step. Raises NotFound, Unavailable."""
        try:
            cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"cgroup {directory} does not exist") from error
        try:
            if policy.open:
                bpf.detach(cgroup)
            else:
                with self._lock:
                    bpf.attach(cgroup, self._program(policy))
        except OSError as error:
            raise Unavailable(f"device rules of cgroup {directory}: {error}") from error
        finally:
            os.close(cgroup)

    def _program(self, policy: Policy) -> int:
        program = self._loaded.get(policy)
        if program is None:
            program = bpf.load(bpf.assemble(policy.default_allow, policy.exceptions))
            self._loaded[policy] = program
            if len(self._loaded) > _MOST_KEPT:
                os.close(self._loaded.popitem(last=False)[1])
        self._loaded.move_to_end(policy)
        return program

"""AppArmor: whether the kernel has it on, which profiles are loaded, and the profile of containers that name none."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path
from typing import Final

DEFAULT: Final = "crib-default"
_PROFILES: Final = Path("/sys/kernel/security/apparmor/profiles")
_ENABLED: Final = Path("/sys/module/apparmor/parameters/enabled")
_PARSER_TIMEOUT_S: Final = 30
# What a container has no business with even as root: the kernel's own files but for those of its namespaces, mounting,
# and processes outside. `attach_disconnected`: descriptors from outside the container's mount namespace are no error.
# The ABI is named, or else each newer parser and kernel would forbid what this doesn't allow because it is older: user
# namespaces from 4.0 on, then local sockets (containerd #12726). Where a distribution has a profile for an OCI runtime,
# it is that which signals.
_TEXT: Final = f"""
abi <abi/3.0>,
profile {DEFAULT} flags=(attach_disconnected,mediate_deleted) {{
  network,
  capability,
  file,
  umount,

  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (send, receive) peer={DEFAULT},
  ptrace (trace, read, tracedby, readby) peer={DEFAULT},

  deny mount,
  deny /proc/* w,
  deny /proc/{{[^1-9/],[^1-9/][^0-9/],[^1-9s/][^0-9y/][^0-9s/],[^1-9/][^0-9/][^0-9/][^0-9/]*}}/** w,
  deny /proc/sys/[^kn]** w,
  deny /proc/sys/kernel/{{?,??,[^s][^h][^m]**}} w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}}
"""
_logger = logging.getLogger(__name__)


def enabled() -> bool:
    """Whether the kernel confines by AppArmor and shows its profiles."""
    try:
        return _ENABLED.read_text().startswith("Y") and _PROFILES.exists()
    except OSError:
        return False


def loaded() -> frozenset[str]:
    """The names of the loaded profiles. Raises OSError."""
    return frozenset(line.rpartition(" (")[0] for line in _PROFILES.read_text().splitlines())


def load_default() -> str:
    """Load the default profile, with apparmor_parser; its name, or "" where that failed, which is logged."""
    parser = shutil.which("apparmor_parser")
    if parser is None:
        _logger.warning("no default AppArmor profile: apparmor_parser is not installed")
        return ""
    try:
        done = subprocess.run(
            [parser, "--replace", "--skip-cache"],
            input=_TEXT,
            capture_output=True,
            text=True,
            timeout=_PARSER_TIMEOUT_S,
            check=False,
        )
        cause = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        cause = str(error)
    if cause:
        _logger.warning("no default AppArmor profile", extra={"fields": {"error": cause}})
        return ""
    return DEFAULT

"""Load a seccomp filter and make system calls under it: what a container's process goes through.

Standard input holds the program. Arguments: flags, then one call each as "number:argument,argument". Prints, per call,
its errno (0 for success). Runs as `python -m`; needs no privilege, as it sets no_new_privs.
"""

from __future__ import annotations

import ctypes
import sys

from runtime.linux.lib import libc
from runtime.linux.seccomp import Filter

PR_SET_NO_NEW_PRIVS = 38


def main() -> None:
    program = Filter(sys.stdin.buffer.read())
    flags, calls = int(sys.argv[1]), [call.partition(":") for call in sys.argv[2:]]
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    program.load(flags)
    results = []
    for number, _, arguments in calls:
        values = [ctypes.c_long(int(value, 0)) for value in arguments.split(",") if value]
        ctypes.set_errno(0)
        failed = libc.syscall(ctypes.c_long(int(number)), *values) == -1
        results.append(ctypes.get_errno() if failed else 0)
    sys.stdout.write(" ".join(map(str, results)))


if __name__ == "__main__":
    main()

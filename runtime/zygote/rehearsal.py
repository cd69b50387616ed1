"""A child's way to its program, gone through by the zygote and without leaving a trace in it.

The interpreter makes code faster as it is run for the first few times, and writes that into the code. A child runs each
step once: unless it had been done before the fork, all that would be written anew, page after page, in each child.
"""

from __future__ import annotations

import os
import resource

from runtime.linux import caps
from runtime.linux.namespaces import CLONE
from runtime.linux.process import close_all_but
from runtime.plan import identity
from runtime.plan.plan import Context, Step, decode, encode, run


def rehearse_child() -> None:
    """Run the steps of an exec. What they set they set as it is; no program is found, and execve of "" fails."""
    before = _descriptors()
    umask = os.umask(0o22)
    os.umask(umask)
    with open("/proc/self/status", encoding="ascii") as file:
        held = dict(line.split(":\t") for line in file if line.startswith("Cap"))
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        oom_score_adj = int(file.read())
    close_all_but(tuple(before))
    context = Context({"stdin": 0, "stdout": 1, "stderr": 2, "container": os.pidfd_open(os.getpid())})
    plan: tuple[Step, ...] = (
        identity.JoinCgroup(("/dev/null",)),
        identity.OomScoreAdj(oom_score_adj),
        identity.Rlimits(((resource.RLIMIT_CORE, *resource.getrlimit(resource.RLIMIT_CORE)),)),
        identity.JoinProcess("container", int(CLONE.NEWUTS | CLONE.NEWIPC | CLONE.NEWNET)),
        identity.WorkingDirectory("/."),
        identity.FindExecutable("proc", "/nonexistent:/"),
        identity.Execute(
            args=("nothing",),
            env=("PATH=/",),
            uid=0,
            gid=os.getgid(),
            groups=tuple(os.getgroups()),
            bounding=-1,
            effective=int(held["CapEff"], 16),
            permitted=int(held["CapPrm"], 16),
            inheritable=int(held["CapInh"], 16),
            ambient=0,
            last_cap=caps.last_cap(),
            umask=umask,
            no_new_privileges=False,
            seccomp="",
            seccomp_flags=0,
            label="",
        ),
    )
    for step in decode(encode(plan)):
        run((step,), context)
    for fd in _descriptors() - before:
        os.close(fd)


def _descriptors() -> set[int]:
    """Those that are open, without the one that lists them."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}

"""The zygote's program: `python -I -S __main__.py PACKAGE_ROOT SOCKET_FD STAGE CGROUP_FILE…`

Threat model: a container could reach the files this process maps through /proc/PID/map_files, or overwrite the
interpreter through /proc/PID/exe (CVE-2019-5736). So every file is opened through a read-only private mount:
 1. stage `mount`: make a mount namespace of its own, make all of it read-only, execute the interpreter again (before
    that the modules are compiled, where they aren't yet)
 2. stage `serve`: load everything there will ever be need of, empty the import machinery, go back to the host's
    mount namespace (the mappings keep the read-only mounts), and serve
"""

import os
import sys


def main() -> None:
    """Run the stage that the arguments name."""
    package_root, fd, stage, host_ns, *cgroup = sys.argv[1:]
    sys.path.append(package_root)
    if stage == "mount":
        _compile(package_root)
        _read_only_world(package_root, int(fd), cgroup)
    _serve(int(fd), int(host_ns), cgroup)


def _compile(package_root: str) -> None:
    """Have the modules compiled on disk, where that can be: compiling leaves holes all over a process's memory, and all
    of it is copied, page table by page table, at each fork.
    """
    import compileall

    compileall.compile_dir(f"{package_root}/runtime", maxlevels=1, quiet=2)


def _read_only_world(package_root: str, fd: int, cgroup: list[str]) -> None:
    from runtime.linux.mount import AT_FDCWD, MS, MountAttr, mount, mount_setattr
    from runtime.linux.namespaces import CLONE, unshare

    host_ns = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    os.set_inheritable(host_ns, True)
    unshare(CLONE.NEWNS)
    mount("", "/", "", MS.REC | MS.PRIVATE)
    mount_setattr(AT_FDCWD, "/", set_=MountAttr.RDONLY, recursive=True)
    arguments = [package_root, str(fd), "serve", str(host_ns), *cgroup]
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__), *arguments])


def _serve(fd: int, host_ns: int, cgroup: list[str]) -> None:
    import socket

    from runtime.linux.namespaces import CLONE, setns
    from runtime.linux.process import default_attributes, default_policy
    from runtime.zygote.zygote import Zygote

    setns(host_ns, CLONE.NEWNS)
    os.close(host_ns)
    default_policy()  # with real-time group scheduling a v1 cgroup takes no real-time process
    for name in cgroup:  # here, where it isn't mounted read-only
        try:
            with open(name, "wb", buffering=0) as file:
                file.write(b"0")
        except OSError as error:
            sys.exit(f"crib-zygote: joining cgroup {name}: {error.strerror}")
    default_attributes()
    os.set_inheritable(fd, False)
    Zygote(socket.socket(fileno=fd)).serve()


if __name__ == "__main__":
    main()

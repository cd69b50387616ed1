"""What the machine it runs on, as root, offers to crib: one line per feature, or with --json one object.

Each function below tries one feature for real and returns what there is to know; that it raises means that the feature
is missing. A feature that the machine has not leaves nothing half-made that would disturb the next.
"""

import contextlib
import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
SYSCALLS = {"bpf": 321, "open_tree": 428, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "clone3": 435}
SYSCALLS |= {"openat2": 437, "mount_setattr": 442}  # x86_64, as User-Mode Linux is
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, 0o2000000
libc = ctypes.CDLL(None, use_errno=True)

features: dict[str, Callable[[], str]] = {}


def feature(function: Callable[[], str]) -> Callable[[], str]:
    features[function.__name__.replace("_", "-")] = function
    return function


def call(name: str, *arguments: int | bytes) -> int:
    values = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
    result = int(libc.syscall(ctypes.c_long(SYSCALLS[name]), *values))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def sh(script: str, *arguments: str) -> str:
    done = subprocess.run(["sh", "-euc", script, "sh", *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"exit status {done.returncode}")
    return done.stdout.strip()


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        try:
            yield running
        finally:
            running.kill()


@contextlib.contextmanager
def cgroup(*controllers: str) -> Iterator[Path]:
    """An empty cgroup with these controllers."""
    for name in controllers:
        (CGROUP / "cgroup.subtree_control").write_text(f"+{name}")
    path = Path(tempfile.mkdtemp(prefix="feature-", dir=CGROUP))
    try:
        yield path
    finally:
        path.rmdir()


# ---- the first process -----------------------------------------------------------------------------------------------


@feature
def systemd() -> str:
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    return sh("busctl get-property org.freedesktop.systemd1 /org/freedesktop/systemd1"
              " org.freedesktop.systemd1.Manager Version")  # fmt: skip


@feature
def systemd_scope() -> str:
    """A transient scope over D-Bus, with a limit and a delegated cgroup: what the systemd cgroup driver needs."""
    with process("sleep", "60") as sleeper:
        return sh(
            f"""busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager \\
            StartTransientUnit 'ssa(sv)a(sa(sv))' feature.scope replace 4 PIDs au 1 {sleeper.pid} Delegate b true \\
            MemoryMax t 67108864 Slice s feature.slice 0 >/dev/null
            trap 'systemctl stop feature.scope' EXIT
            for i in $(seq 100); do grep -q feature.scope /proc/{sleeper.pid}/cgroup && break; sleep 0.05; done
            path=$(cut -d: -f3 /proc/{sleeper.pid}/cgroup)
            [ $(cat /sys/fs/cgroup$path/memory.max) = 67108864 ]; echo $path"""
        )


# ---- cgroups ---------------------------------------------------------------------------------------------------------


@feature
def cgroup2() -> str:
    assert "cgroup2" in sh("stat -fc %T /sys/fs/cgroup")
    return (CGROUP / "cgroup.controllers").read_text().strip()


def controller(name: str, file: str) -> None:
    def enabled() -> str:
        with cgroup(name) as path:
            return f"{file} {(path / file).read_text().strip()}"

    features[f"cgroup-{name}"] = enabled


for _name, _file in {"cpu": "cpu.max", "cpuset": "cpuset.cpus.effective", "hugetlb": "hugetlb.2MB.max",
                     "io": "io.max", "memory": "memory.max", "pids": "pids.max"}.items():  # fmt: skip
    controller(_name, _file)


@feature
def cgroup_oom() -> str:
    with cgroup("memory") as path:
        (path / "memory.max").write_text("32M")
        (path / "memory.oom.group").write_text("1")
        grow = "import sys; open(sys.argv[1], 'w').write('0'); x = [b'x' * (1 << 20) * i for i in range(99)]"
        done = subprocess.run([sys.executable, "-c", grow, path / "cgroup.procs"])
        assert done.returncode == -signal.SIGKILL, f"status {done.returncode}"
        events = (path / "memory.events").read_text().split()
        assert int(events[events.index("oom_kill") + 1]) >= 1
        return f"peak {(path / 'memory.peak').read_text().strip()}"


@feature
def cgroup_freeze() -> str:
    with cgroup() as path, process("sleep", "60") as sleeper:
        (path / "cgroup.procs").write_text(str(sleeper.pid))
        (path / "cgroup.freeze").write_text("1")
        sh('for i in $(seq 100); do grep -q "frozen 1" "$1" && exit; sleep 0.05; done; exit 1', f"{path}/cgroup.events")
        (path / "cgroup.kill").write_text("1")
        assert sleeper.wait() == -signal.SIGKILL
        return "and cgroup.kill"


@feature
def clone_into_cgroup() -> str:
    with cgroup() as path:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        into_cgroup = 0x200000000
        child = call("clone3", struct.pack("11Q", into_cgroup, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, handle), 88)
        if child == 0:
            os._exit(Path("/proc/self/cgroup").read_text().strip() != f"0::/{path.name}")
        os.close(handle)
        assert os.waitpid(child, 0)[1] == 0
        return ""


@feature
def cgroup_bpf_device() -> str:
    program, licence = ctypes.create_string_buffer(struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)), b"GPL\0"
    text = ctypes.create_string_buffer(licence)
    load = struct.pack("<IIQQIIQII", 15, 2, ctypes.addressof(program), ctypes.addressof(text), 0, 0, 0, 0, 0)
    handle = call("bpf", 5, load + bytes(80), 128)
    with cgroup() as path:
        directory = os.open(path, os.O_RDONLY)
        call("bpf", 8, struct.pack("<IIII", directory, handle, 6, 0) + bytes(64), 80)
        os.close(directory)
        script = 'echo $$ >"$1/cgroup.procs"; ! echo x 2>/dev/null >/dev/null || exit 1'
        sh(f"sh -c '{script}' sh \"$1\"", str(path))
    os.close(handle)
    return ""


@feature
def psi() -> str:
    return Path("/proc/pressure/cpu").read_text().splitlines()[0]


# ---- file systems ----------------------------------------------------------------------------------------------------

OVERLAY = """
cd "$1"; mkdir l u w m; echo a >l/a; trap 'umount m' EXIT
mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m
rm m/a; [ -c u/a ]; echo b >m/b; [ "$(cat u/b)" = b ]
"""


@feature
def overlay() -> str:
    """On the disk where tests keep theirs."""
    with tempfile.TemporaryDirectory() as top:
        return sh(f"{OVERLAY} stat -fc %T .", top)


@feature
def overlay_tmpfs() -> str:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top:
        return sh(OVERLAY, top)


@feature
def overlay_userns() -> str:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top:
        return sh('unshare --user --map-root-user --mount sh -euc "$1" sh "$2"',
                  OVERLAY.replace("workdir=w", "workdir=w,userxattr").replace("rm m/a; [ -c u/a ]", "rm m/a"),
                  top)  # fmt: skip


def overlay_by_fsconfig(kind: int) -> str:
    """A read-only overlay of two layers, each added by its path (kind 1) or a detached mount's descriptor (5)."""
    with tempfile.TemporaryDirectory() as top, contextlib.ExitStack() as stack:
        context = call("fsopen", b"overlay", 1)
        stack.callback(os.close, context)
        for name in ("a", "b"):
            (layer := Path(top, name)).mkdir()
            tree = call("open_tree", AT_FDCWD, bytes(layer), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
            stack.callback(os.close, tree)
            value = (bytes(layer), 0) if kind == 1 else (0, tree)
            call("fsconfig", context, kind, b"lowerdir+", *value)
        call("fsconfig", context, 6, 0, 0, 0)
        os.close(call("fsmount", context, 1, 0))
    return ""


@feature
def overlay_lowerdir_add() -> str:
    """Since 6.7."""
    return overlay_by_fsconfig(1)


@feature
def overlay_lowerdir_fd() -> str:
    """Since 6.15."""
    return overlay_by_fsconfig(5)


def idmapped(top: str) -> str:
    (Path(top) / "file").touch()
    with process("unshare", "--user", "sh", "-c", "echo; exec sleep 60") as other:
        assert other.stdout
        other.stdout.read(1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{other.pid}/{name}").write_text("0 100000 65536")
        user_namespace = os.open(f"/proc/{other.pid}/ns/user", os.O_RDONLY)
        tree = call("open_tree", AT_FDCWD, top.encode(), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
        try:
            attributes = struct.pack("4Q", 0x100000, 0, 0, user_namespace)
            call("mount_setattr", tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, attributes, 32)
            assert os.stat("file", dir_fd=tree).st_uid == 100000
        finally:
            os.close(tree)
            os.close(user_namespace)
    return ""


@feature
def idmapped_disk() -> str:
    with tempfile.TemporaryDirectory() as top:
        return idmapped(top)


@feature
def idmapped_tmpfs() -> str:
    """Since 6.3."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top:
        return idmapped(top)


@feature
def openat2_in_root() -> str:
    top = os.open("/usr", os.O_PATH)
    os.close(call("openat2", top, b"/bin/sh", struct.pack("3Q", os.O_PATH, 0, 0x10), 24))
    os.close(top)
    return ""


@feature
def mqueue() -> str:
    return sh("unshare --ipc --mount sh -euc 'mount -t mqueue mqueue /mnt; : >/mnt/x'")


# ---- network ---------------------------------------------------------------------------------------------------------


@feature
def bridge() -> str:
    """Two namespaces on a bridge reach each other through veth pairs."""
    return sh("""unshare --net --mount sh -euc '
        mount -t tmpfs tmpfs /run/netns 2>/dev/null || { mkdir -p /run/netns; mount -t tmpfs tmpfs /run/netns; }
        ip link add br0 type bridge; ip link set br0 up
        for i in 1 2; do
            ip netns add n$i; ip link add v$i type veth peer name eth0 netns n$i; ip link set v$i master br0 up
            ip -n n$i address add 192.0.2.$i/24 dev eth0; ip -n n$i link set eth0 up
        done
        ip netns exec n2 python3 -c "
import socket, subprocess
with socket.create_server((\\"192.0.2.2\\", 80)) as server:
    server.settimeout(20)
    code = \\"import socket; socket.create_connection((\\\\\\"192.0.2.2\\\\\\", 80), 20)\\"
    with subprocess.Popen([\\"ip\\", \\"netns\\", \\"exec\\", \\"n1\\", \\"python3\\", \\"-c\\", code]):
        print(server.accept()[1][0])
"'""")


def nft(name: str, ruleset: str) -> None:
    features[name] = lambda: sh('unshare --net nft "$1"', ruleset)


SOURCE = "type nat hook postrouting priority srcnat;"
TARGET = "type nat hook prerouting priority dstnat;"
nft("nft-inet", "table inet t { chain c { type filter hook input priority 0; ct state established accept; }; }")
nft("nft-inet-nat", f"table inet t {{ chain s {{ {SOURCE} masquerade; }}; }}")
nft("nft-ip-nat", f"table ip t {{ chain s {{ {SOURCE} masquerade; }}; chain d {{ {TARGET} dnat to 192.0.2.1; }}; }}")
nft(
    "nft-maps",
    "table ip t { map m { type inet_service : ipv4_addr . inet_service; };"
    f" chain d {{ {TARGET} fib daddr type local dnat ip to tcp dport map @m; }}; }}",
)


@feature
def iptables_nft() -> str:
    return sh("unshare --net iptables-nft -t nat -A POSTROUTING -m comment --comment x -j MASQUERADE")


@feature
def iptables_legacy() -> str:
    return sh("unshare --net iptables-legacy -t nat -A POSTROUTING -m comment --comment x -j MASQUERADE")


@feature
def ipv6() -> str:
    return sh("unshare --net sh -euc 'ip link set lo up; ip -6 -brief address show dev lo'")


@feature
def shaping() -> str:
    return sh("unshare --net sh -euc 'ip link set lo up; tc qdisc add dev lo root tbf rate 1mbit burst 16k latency 1s'")


# ---- processes -------------------------------------------------------------------------------------------------------


@feature
def namespaces() -> str:
    return sh("unshare --mount --pid --net --ipc --uts --cgroup --user --map-root-user --fork --mount-proc id -u")


@feature
def time_namespace() -> str:
    return sh("unshare --time true")


@feature
def pidfd() -> str:
    with process("sleep", "60") as sleeper:
        handle = os.pidfd_open(sleeper.pid)
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        os.close(handle)
        assert sleeper.wait() == -signal.SIGTERM
    return ""


@feature
def seccomp() -> str:
    """A filter that refuses mkdir, by libseccomp."""
    refuses = """
import ctypes, errno, os
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))
mkdir = library.seccomp_syscall_resolve_name(b"mkdir")
assert library.seccomp_rule_add(context, 0x00050000 | errno.EMFILE, mkdir, 0) == 0
assert library.seccomp_load(context) == 0
try:
    os.mkdir("/tmp/refused")
except OSError as error:
    assert error.errno == errno.EMFILE
else:
    raise SystemExit("mkdir was not refused")
"""
    sh('exec "$1" -c "$2"', sys.executable, refuses)
    return Path("/proc/sys/kernel/seccomp/actions_avail").read_text().strip()


@feature
def apparmor() -> str:
    """A profile that is loaded and denies a file."""
    with tempfile.TemporaryDirectory() as top:
        (Path(top) / "secret").write_text("s")
        profile = f"profile feature flags=(attach_disconnected) {{\n file,\n deny {top}/secret rw,\n}}\n"
        (Path(top) / "profile").write_text(profile)
        sh('apparmor_parser -Kr "$1/profile"', top)
        try:
            run = "echo 'exec feature' >/proc/self/attr/exec; exec cat \"$1/secret\""
            refused = subprocess.run(["bash", "-c", run, "sh", top], capture_output=True, text=True)
            assert "Permission denied" in refused.stderr, "the profile was not enforced"
        finally:
            sh('apparmor_parser -R "$1/profile"', top)
    return ""


def report() -> dict[str, tuple[bool, str]]:
    found = {}
    for name, function in sorted(features.items()):
        try:
            found[name] = (True, function())
        except (OSError, AssertionError, subprocess.SubprocessError) as error:
            found[name] = (False, (str(error) or "not as expected").splitlines()[0])
    return found


if __name__ == "__main__":
    result = report()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"kernel": os.uname().release, "features": result}))
    else:
        print(f"Linux {os.uname().release}, Python {sys.version.split()[0]}")
        for name, (there, detail) in result.items():
            print(f"{'yes' if there else 'NO ':4}{name:22}{detail}")

"""Steps that build a container's root file system inside its own mount namespace.

Threat model: the image below the root is hostile. A target is reached only through openat2 below the root
directory (RESOLVE_IN_ROOT) and mounted on by descriptor; a source is opened before the process enters
anything of the container's.
"""

from __future__ import annotations

import os
import stat
from errno import ELOOP, ENOENT, ENOTDIR, EPERM

from runtime.linux import files
from runtime.linux.lib import SyscallError
from runtime.linux.mount import (
    MS,
    MountAttr,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    pivot_root,
    umount,
)
from runtime.plan.layers import context_option
from runtime.plan.plan import Context, Step

TYPE_CHECKING = False  # typing costs a monitor memory

if TYPE_CHECKING:
    Nodes = tuple[tuple[str, str, int, int, int, int, int], ...]  # name, kind, major, minor, mode, uid, gid

_SHOWN = 12
_PROPAGATION = {MS.SHARED: "shared", MS.SLAVE: "slave", MS.PRIVATE: "private"}


def attributes(set_: int) -> str:
    """Mount attributes as `ro,nosuid`, or `rw`."""
    names = [flag.name.lower() for flag in MountAttr if set_ & flag and flag.name and flag != MountAttr.ATIME_MASK]
    return ",".join("ro" if name == "rdonly" else name for name in names) or "rw"


def make_nodes(directory: int, nodes: Nodes) -> None:
    """Make device nodes in an open directory. What is there already stays as it is: it may be the host's /dev."""
    for name, kind, major, minor, mode, uid, gid in nodes:
        form = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}[kind]
        device = 0 if kind == "p" else os.makedev(major, minor)
        try:
            os.mknod(name, form | mode, device, dir_fd=directory)
        except FileExistsError:
            continue
        if uid or gid:
            os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)


def some(names: list[str]) -> str:
    """The first few of many names."""
    return " ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def mount_point(context: Context, target: str, *, directory: bool) -> int:
    """An O_PATH descriptor of `target` below the root, which is made if missing. Raises SyscallError.

    /proc and /sys may be no symlinks: what is masked below them later would be looked for where those lead then, and by
    then a volume may be there (CVE-2019-19921). For the same reason no link leads into /proc (CVE-2019-16884).
    """
    if target in ("/proc", "/sys"):
        try:
            found = files.open_in_root(context.root, target, os.O_PATH | os.O_NOFOLLOW)
        except SyscallError as error:
            if error.errno != ENOENT:
                raise
        else:
            if stat.S_ISLNK(os.fstat(found).st_mode):
                os.close(found)
                raise SyscallError("mount", ELOOP, f"{target}, a symbolic link in the image")
            os.close(found)
    make = files.make_directories if directory else files.make_file
    point = make(context.root, target)
    if os.fstat(point).st_dev == context.proc_device and not target.startswith("/proc"):
        os.close(point)
        raise SyscallError("mount", EPERM, f"{target}, a link into /proc")
    return point


class OpenSource(Step):
    """Open a bind's source as a detached mount, still in its peer group, while the host's tree is at hand.

    `make`: a missing source becomes a directory, 0755; what a link of that name leads to does not.
    """

    key: str
    path: str
    recursive: bool
    make: bool

    def run(self, context: Context) -> None:
        try:
            context.fds[self.key] = open_tree(self.path, recursive=self.recursive)
        except SyscallError as error:
            if error.errno != ENOENT or not self.make or os.path.islink(self.path):
                raise
            files.make_source(self.path)
            context.fds[self.key] = open_tree(self.path, recursive=self.recursive)

    def describe(self) -> str:
        return f"open source {self.path}{' with what is mounted below' if self.recursive else ''}"


class CloneSource(Step):
    """A copy of a mount that the parent handed in as descriptor `name` (the pod's /dev/shm)."""

    key: str
    name: str

    def run(self, context: Context) -> None:
        context.fds[self.key] = open_tree("", dirfd=context.fds[self.name])

    def describe(self) -> str:
        return f"clone the pod's {self.name}"


class Propagation(Step):
    """Change how mounts at and below / of this mount namespace propagate."""

    phase = "rootfs"

    flag: int

    def run(self, context: Context) -> None:
        mount("", "/", "", MS.REC | self.flag)

    def describe(self) -> str:
        return f"make / recursively {_PROPAGATION[MS(self.flag)]}"


class MountOverlay(Step):
    """Mount the root file system from its layers, at a directory that only this mount namespace sees covered.

    `lowers` are names relative to `base`, top first: short, so that hundreds fit mount(2)'s one page.
    """

    phase = "rootfs"

    base: str
    lowers: tuple[str, ...]
    upper: str
    work: str
    at: str
    label: str

    def run(self, context: Context) -> None:
        os.chdir(self.base)
        options = f"lowerdir={':'.join(self.lowers)},upperdir={self.upper},workdir={self.work}"
        mount("overlay", self.at, "overlay", 0, options + context_option(self.label))
        context.root = os.open(self.at, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def describe(self) -> str:
        return f"mount overlay of {len(self.lowers)} layers from {self.base}, writable part {self.upper}"


class Mount(Step):
    """Mount a new file system at `target` below the root, which is made if missing."""

    fstype: str
    target: str
    flags: int
    data: str
    source: str

    def run(self, context: Context) -> None:
        target = mount_point(context, self.target, directory=True)
        try:
            mount(self.source, f"/proc/self/fd/{target}", self.fstype, self.flags, self.data)
            if self.fstype == "proc":
                made = files.open_in_root(context.root, self.target, os.O_PATH)
                context.proc_device = os.fstat(made).st_dev
                os.close(made)
        except SyscallError as error:
            raise SyscallError("mount", error.errno or 0, self.target) from None
        finally:
            os.close(target)

    def describe(self) -> str:
        options = ",".join(
            [flag.name.lower() for flag in MS if self.flags & flag and flag.name] + ([self.data] if self.data else [])
        )
        return f"mount {self.fstype} on {self.target}{f' ({options})' if options else ''}"


class Label(Step):
    """Give the root of the file system at `target` below the root an SELinux label: for one that takes no context."""

    target: str
    label: str

    def run(self, context: Context) -> None:
        target = files.open_in_root(context.root, self.target, os.O_PATH)
        try:
            os.setxattr(f"/proc/self/fd/{target}", "security.selinux", self.label.encode() + b"\0")
        finally:
            os.close(target)

    def describe(self) -> str:
        return f"label {self.target} {self.label}"


class Attach(Step):
    """Attach the opened source `key` at `target` below the root; a missing target is made to fit the source.

    `set_` and `clear` are mount attributes, `recursive` applies them below as well; `propagation` is an MS flag
    applied recursively, or 0.
    """

    key: str
    target: str
    set_: int
    clear: int
    recursive: bool
    propagation: int
    source: str

    def run(self, context: Context) -> None:
        tree = context.take(self.key)
        target = -1
        try:
            target = mount_point(context, self.target, directory=stat.S_ISDIR(os.fstat(tree).st_mode))
            if self.propagation:
                mount_setattr(tree, "", propagation=self.propagation, recursive=True)
            if self.set_ or self.clear:
                mount_setattr(tree, "", set_=self.set_, clear=self.clear, recursive=self.recursive)
            move_mount(tree, target, self.target)
        finally:
            os.close(tree)
            if target >= 0:
                os.close(target)

    def describe(self) -> str:
        how = attributes(self.set_) + (" recursively" if self.recursive and self.set_ & MountAttr.RDONLY else "")
        kind = f", {_PROPAGATION[MS(self.propagation)]}" if self.propagation else ""
        return f"bind {self.source} on {self.target} ({how}{kind})"


class MakeDevices(Step):
    """Device nodes in one directory below the root, as (name, kind, major, minor, mode, uid, gid).

    `kind` is c, u, b or p. Runs with umask 0.
    """

    directory: str
    nodes: Nodes

    def run(self, context: Context) -> None:
        parent = files.make_directories(context.root, self.directory)
        try:
            make_nodes(parent, self.nodes)
        finally:
            os.close(parent)

    def describe(self) -> str:
        return f"make devices in {self.directory}: {some([node[0] for node in self.nodes])}"


class MakeLinks(Step):
    """Symbolic links in the directory `directory` below the root, as (name, target) pairs."""

    directory: str
    links: tuple[tuple[str, str], ...]

    def run(self, context: Context) -> None:
        parent = files.make_directories(context.root, self.directory)
        try:
            for name, target in self.links:
                os.symlink(target, name, dir_fd=parent)
        finally:
            os.close(parent)

    def describe(self) -> str:
        return f"link {', '.join(name for name, _ in self.links)} in {self.directory}"


class MaskPaths(Step):
    """Hide paths below the root: a file under the host's null device, a directory under an empty tmpfs.

    What is missing in this kernel or image is skipped. The null device is checked to be one (CVE-2025-31133).
    """

    paths: tuple[str, ...]

    def run(self, context: Context) -> None:
        null = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
        try:
            status = os.fstat(null)
            if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(1, 3):
                raise SyscallError("fstat", ENOTDIR, "/dev/null is not the null device")
            for path in self.paths:
                self._mask(context.root, path, null)
        finally:
            os.close(null)

    def _mask(self, root: int, path: str, null: int) -> None:
        try:
            target = files.open_in_root(root, path, os.O_PATH)
        except SyscallError as error:
            if error.errno in (ENOENT, ENOTDIR):
                return
            raise
        try:
            if stat.S_ISDIR(os.fstat(target).st_mode):
                flags = MS.RDONLY | MS.NOSUID | MS.NODEV | MS.NOEXEC
                mount("tmpfs", f"/proc/self/fd/{target}", "tmpfs", flags, "nr_blocks=1,nr_inodes=1")
            else:
                tree = open_tree("", dirfd=null)
                try:
                    move_mount(tree, target, path)
                finally:
                    os.close(tree)
        finally:
            os.close(target)

    def describe(self) -> str:
        return f"mask {' '.join(self.paths)}"


class ReadOnlyPaths(Step):
    """Make paths below the root read-only, each with all that is mounted below it; missing ones are skipped."""

    paths: tuple[str, ...]

    def run(self, context: Context) -> None:
        for path in self.paths:
            try:
                target = files.open_in_root(context.root, path, os.O_PATH)
            except SyscallError as error:
                if error.errno in (ENOENT, ENOTDIR):
                    continue
                raise
            try:
                tree = open_tree("", recursive=True, dirfd=target)
                try:
                    mount_setattr(tree, "", set_=MountAttr.RDONLY, recursive=True)
                    move_mount(tree, target, path)
                finally:
                    os.close(tree)
            finally:
                os.close(target)

    def describe(self) -> str:
        return f"make read-only {' '.join(self.paths)}"


class MakeDirectory(Step):
    """Make the directory `path` below the root if it is missing, while that can be written to."""

    path: str

    def run(self, context: Context) -> None:
        os.close(files.make_directories(context.root, self.path))

    def describe(self) -> str:
        return f"make {self.path} if it is missing"


class ReadOnlyRoot(Step):
    """Make the root mount read-only; what is mounted on it is not."""

    phase = "rootfs"

    def run(self, context: Context) -> None:
        mount_setattr(context.root, "", set_=MountAttr.RDONLY)

    def describe(self) -> str:
        return "make the root read-only"


class RemountReadOnly(Step):
    """Make the mount at `target` below the root read-only, now that what lies on it is made."""

    target: str

    def run(self, context: Context) -> None:
        target = files.open_in_root(context.root, self.target, os.O_PATH)
        try:
            mount_setattr(target, "", set_=MountAttr.RDONLY)
        finally:
            os.close(target)

    def describe(self) -> str:
        return f"make {self.target} read-only"


class Console(Step):
    """Show the process's terminal as /dev/console too, in a /dev of the container's own: config-linux.md, "Default
    Devices". Runs inside the root."""

    def run(self, context: Context) -> None:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        target = tree = -1
        try:
            target = files.make_file(root, "/dev/console")
            tree = open_tree("", dirfd=context.fds["stdin"])
            move_mount(tree, target, "/dev/console")
        finally:
            for fd in (root, target, tree):
                if fd >= 0:
                    os.close(fd)

    def describe(self) -> str:
        return "bind the terminal on /dev/console"


class PivotRoot(Step):
    """Make the root file system / and let go of the host's tree (pivot_root(2), with "." for both)."""

    phase = "rootfs"

    def run(self, context: Context) -> None:
        os.fchdir(context.root)
        os.close(context.root)
        context.root = -1
        # fchdir on an O_PATH descriptor is allowed; the old root ends up on top of "." and is detached there.
        pivot_root(".", ".")
        umount(".")
        os.chdir("/")

    def describe(self) -> str:
        return "pivot into the root"

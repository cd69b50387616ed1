"""Steps for a container in a user namespace: what takes the host's privileges, and how they are left behind.

Root inside can neither mount overlay layers of the host, nor make device nodes, nor change the host's mounts. So the
process that the monitor clones makes all of that as the host's root, outside of any container's view: detached mounts,
held as descriptors. Then it joins the user namespace and clones once more: only that second process, which has no
privilege outside its user namespace, enters the pid namespace, makes the mount namespace, and sees the image.
"""

from __future__ import annotations

import os
from errno import EPERM

from runtime.linux import userns
from runtime.linux.lib import SyscallError
from runtime.linux.mount import MS, detached, idmap, mount, mount_setattr, move_mount
from runtime.linux.namespaces import CLONE, setns
from runtime.linux.process import clone3
from runtime.plan.layers import overlay
from runtime.plan.mounts import attributes, make_nodes, some
from runtime.plan.plan import Context, Step

TYPE_CHECKING = False  # typing costs a monitor memory
if TYPE_CHECKING:
    from runtime.plan.mounts import Nodes


_VISIBLE = "/sys"  # on every host, and open to everybody


class MakeMapping(Step):
    """A user namespace for the mapping of idmapped mounts, as descriptor `key`."""

    phase = "namespaces"

    key: str
    uids: tuple[tuple[int, int, int], ...]
    gids: tuple[tuple[int, int, int], ...]

    def run(self, context: Context) -> None:
        context.fds[self.key] = userns.make(self.uids, self.gids)

    def describe(self) -> str:
        return f"make a mapping of uids {_shown(self.uids)}, gids {_shown(self.gids)}"


class Adjust(Step):
    """Change the opened source `key` while it is detached: its mapping, its attributes, how it propagates.

    `mapping` names the user namespace of an idmapped mount, or is empty; each change has its own reach.
    """

    key: str
    mapping: str
    mapping_recursive: bool
    set_: int
    clear: int
    recursive: bool
    propagation: int
    source: str

    def run(self, context: Context) -> None:
        tree = context.fds[self.key]
        if self.mapping:
            try:
                idmap(tree, context.fds[self.mapping], recursive=self.mapping_recursive)
            except SyscallError as error:
                raise SyscallError("idmapped mount", error.errno or 0, self.source) from None
        if self.propagation:
            mount_setattr(tree, "", propagation=self.propagation, recursive=True)
        if self.set_ or self.clear:
            mount_setattr(tree, "", set_=self.set_, clear=self.clear, recursive=self.recursive)

    def describe(self) -> str:
        how = ["idmapped"] if self.mapping else []
        how += [attributes(self.set_) + (" recursively" if self.recursive else "")] if self.set_ or self.clear else []
        return f"make source {self.source} {', '.join(how) or 'private'}"


class MountMappedOverlay(Step):
    """Mount the root file system with idmapped layers, detached; the writable part belongs to the mapped root.

    `lowers` are names relative to `base`, top first. `from_descriptors`: overlay takes detached mounts as layers
    (Linux 6.15); else they are attached in a mount namespace that only this process has.
    """

    phase = "rootfs"

    base: str
    lowers: tuple[str, ...]
    upper: str
    work: str
    uids: tuple[tuple[int, int, int], ...]
    gids: tuple[tuple[int, int, int], ...]
    from_descriptors: bool
    at: str
    label: str

    def run(self, context: Context) -> None:
        status = os.stat(self.upper)
        os.chown(self.upper, userns.mapped(status.st_uid, self.uids), userns.mapped(status.st_gid, self.gids))
        lowers = [f"{self.base}/{name}" for name in self.lowers]
        at = self.at if not self.from_descriptors else ""
        context.root = overlay(lowers, context.fds["user"], (self.upper, self.work), at, self.label)

    def describe(self) -> str:
        return f"mount overlay of {len(self.lowers)} idmapped layers from {self.base}, writable part {self.upper}"


class MakeDev(Step):
    """A file system for the container's /dev with its device nodes and links, detached, as descriptor `key`.

    Made with the host's privileges: nodes on a file system that root inside has mounted can't be opened.
    """

    key: str
    data: str
    attributes: int
    nodes: Nodes
    links: tuple[tuple[str, str], ...]
    uid: int
    gid: int
    label: str

    def run(self, context: Context) -> None:
        pairs = tuple((key, value) for key, _, value in (item.partition("=") for item in self.data.split(",") if item))
        own = [("uid", str(self.uid)), ("gid", str(self.gid))] + ([("context", self.label)] if self.label else [])
        tree = detached("tmpfs", (*pairs, *own), self.attributes)
        context.fds[self.key] = tree
        for path, kind, major, minor, mode, uid, gid in self.nodes:
            directory, _, name = path.rpartition("/")
            parent = self._directory(tree, directory)
            try:
                make_nodes(parent, ((name, kind, major, minor, mode, uid, gid),))
            finally:
                os.close(parent)
        for name, target in self.links:
            os.symlink(target, name, dir_fd=tree)
            os.chown(name, self.uid, self.gid, dir_fd=tree, follow_symlinks=False)

    def _directory(self, tree: int, path: str) -> int:
        """Nothing but this step has written to the tree: names in it are what they seem."""
        directory = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
        for name in (part for part in path.split("/") if part):
            try:
                os.mkdir(name, 0o755, dir_fd=directory)
                os.chown(name, self.uid, self.gid, dir_fd=directory)
            except FileExistsError:
                pass
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.close(directory)
            directory = below
        return directory

    def describe(self) -> str:
        return f"make devices for /dev: {some([node[0] for node in self.nodes])}"


class JoinUser(Step):
    """Join the pod's user namespace as its root, and the pid namespace `pid`, if there is one, for the children."""

    phase = "namespaces"

    def run(self, context: Context) -> None:
        if "pid" in context.fds:
            setns(context.fds["pid"], CLONE.NEWPID)
        setns(context.fds["user"], CLONE.NEWUSER)
        userns.become_root()

    def describe(self) -> str:
        return "join the pod's user namespace"


class CloneAgain(Step):
    """Clone the process that becomes the container's; this one tells the monitor of it, and ends.

    The new one waits until the monitor can know of it, so that nothing it does comes before that news.
    """

    phase = "namespaces"

    flags: int

    def run(self, context: Context) -> None:
        told, tell = os.pipe2(os.O_CLOEXEC)
        pid, pidfd = clone3(self.flags | CLONE.PARENT)
        if pid:
            assert context.announce is not None
            context.announce(pid, pidfd)
            os.write(tell, b"\0")
            os._exit(0)
        os.close(tell)
        if not os.read(told, 1):
            raise SyscallError("clone3", EPERM, "the first process has ended")
        os.close(told)

    def describe(self) -> str:
        return f"clone without the host's privileges{', into a new pid namespace' if self.flags else ''}"


class ShowBundle(Step):
    """Make two directories that root inside can reach, in this mount namespace only: `bundle`, with the opened source
    `key`, and `root`, for the root file system."""

    phase = "hooks"

    key: str
    bundle: str
    root: str

    def run(self, context: Context) -> None:
        mount("tmpfs", _VISIBLE, "tmpfs", MS.NOSUID | MS.NODEV | MS.NOEXEC, "mode=755")
        for name in (self.bundle, self.root):
            os.mkdir(f"{_VISIBLE}/{name}", 0o755)
        target = os.open(f"{_VISIBLE}/{self.bundle}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        tree = context.take(self.key)
        try:
            move_mount(tree, target, self.bundle)
        finally:
            os.close(target)
            os.close(tree)

    def describe(self) -> str:
        return f"show the bundle to hooks, at {_VISIBLE}/{self.bundle}"


class AttachRoot(Step):
    """Attach the root file system over the directory `at`, in this mount namespace only."""

    phase = "rootfs"

    at: str

    def run(self, context: Context) -> None:
        tree = context.root
        target = os.open(self.at, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            move_mount(tree, target, self.at)
        finally:
            os.close(target)
        context.root = os.open(self.at, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        os.close(tree)

    def describe(self) -> str:
        return f"attach the root file system at {self.at}"


def _shown(maps: tuple[tuple[int, int, int], ...]) -> str:
    return ", ".join(f"{inside} to {outside} ({count})" for inside, outside, count in maps)

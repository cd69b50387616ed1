"""The command line: what may be said, and which function does it."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from datetime import datetime
from typing import Final, NoReturn

from cri.cli import failure

ENDPOINT: Final = "unix:///run/crib/crib.sock"
LOG_DIR: Final = "/var/log/crib"
_NUMBER: Final = r"\d+(?:\.\d+)?"
_DURATION: Final = re.compile("".join(rf"(?:(?P<{unit}>{_NUMBER}){unit})?" for unit in "dhms"))
_EPILOG: Final = """\
Wherever a pod or container is asked for, its id, its name or a prefix of the id that fits nothing else will do.

exit codes: 0 done, 1 it failed, 2 not a valid command line, 3 no such object, 4 cribd can't be reached;
exec, attach and run (not detached): the command's exit code; 128 and its number for a signal that ended this one.

environment: CRIB_ENDPOINT, CRIB_LOG_DIR (defaults of --endpoint and of run's --log-dir).
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and where to read on."""
        print(f"{self.prog}: {message[:1].lower()}{message[1:]}: see {self.prog} --help", file=sys.stderr)
        raise SystemExit(failure.USAGE)


def _common() -> _Parser:
    """What may stand before the command or behind it. A new one each time: parsers share their parents' actions, and
    a default that is set for one would count for all."""
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--endpoint", metavar="unix:///PATH", help=f"cribd's socket (default {ENDPOINT})")
    common.add_argument("-o", "--output", choices=("table", "json"), help="for people or for programs")
    return common


def parser() -> argparse.ArgumentParser:
    """`handler` of what it returns is "module:function" below cri.cli."""
    top = _Parser(
        prog="crib",
        description="Run and look at pods, containers and images through cribd.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common()],
        allow_abbrev=False,
    )
    top.add_argument("--version", action="store_true", help="this command's own version")
    top.set_defaults(endpoint=os.environ.get("CRIB_ENDPOINT") or ENDPOINT, output="table", handler=None)
    commands = top.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def command(name: str, handler: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[_common()], allow_abbrev=False)
        added.set_defaults(handler=handler)
        return added

    pull = command("pull", "image:pull", "fetch an image")
    pull.add_argument("image", metavar="IMAGE")
    pull.add_argument("-q", "--quiet", action="store_true", help="no progress")
    pull.add_argument("--username", default="", help="for the registry")
    pull.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
    load = command("load", "image:load", "store the images of an OCI or docker archive, or of an OCI layout")
    load.add_argument("file", metavar="FILE", help="an archive, a layout's directory, or - for standard input")
    save = command("save", "storage:save", "write images to an archive that crib, docker and OCI tools load")
    save.add_argument("images", metavar="IMAGE", nargs="+")
    target = save.add_mutually_exclusive_group()
    target.add_argument("-f", "--file", metavar="FILE", default="-", help="the archive (default: standard output)")
    target.add_argument("--layout", metavar="DIR", default="", help="an OCI image layout, in a new directory")
    images = command("images", "image:images", "list images")
    images.add_argument("-q", "--quiet", action="store_true", help="ids only")
    rmi = command("rmi", "image:rmi", "remove images with all their tags")
    rmi.add_argument("images", metavar="IMAGE", nargs="+")
    rmi.add_argument("-f", "--force", action="store_true", help="even if containers were made from it")

    image = command("image", "", "look into images")
    parts = image.add_subparsers(metavar="COMMAND", parser_class=_Parser, required=True)
    for name, handler, text, number in (
        ("inspect", "storage:inspect", "all about images, as JSON", "+"),
        ("tree", "storage:tree", "images' layers, their sizes and who shares them", "*"),
    ):
        part = parts.add_parser(name, help=text, description=text, parents=[_common()], allow_abbrev=False)
        part.add_argument("images", metavar="IMAGE", nargs=number)
        part.set_defaults(handler=handler)
    command("df", "storage:df", "what images and containers take on the disk")
    check = command("check", "storage:check", "read all layers and compare them with what was unpacked")
    check.add_argument("--repair", action="store_true", help="fetch images with damaged layers again")

    _run(command("run", "run:run", "run a pod with one container"))

    ps = command("ps", "listing:ps", "list running containers")
    ps.add_argument("-a", "--all", action="store_true", help="those that don't run as well")
    ps.add_argument("-q", "--quiet", action="store_true", help="ids only")
    pods = command("pods", "listing:pods", "list pods")
    pods.add_argument("-q", "--quiet", action="store_true", help="ids only")
    logs = command("logs", "log:logs", "print a container's log, with what was rotated of it")
    logs.add_argument("container", metavar="CONTAINER")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the container ends")
    logs.add_argument("-n", "--tail", metavar="N", type=_count, help="of what is there, only the last N lines")
    logs.add_argument(
        "--since", metavar="TIME", type=_since, help="of what is there, only what came later: 90s, 1h30m, RFC 3339"
    )
    logs.add_argument("-t", "--timestamps", action="store_true", help="begin each line with its time")
    execute = command("exec", "container:exec_", "run a command in a container")
    execute.add_argument("-i", "--interactive", action="store_true", help="pass standard input on")
    execute.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    execute.add_argument("--timeout", metavar="SECONDS", type=_count, default=0, help="kill it after this time")
    execute.add_argument("container", metavar="CONTAINER")
    execute.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER)
    attach = command("attach", "container:attach", "share a container's streams, and its terminal where it has one")
    attach.add_argument("container", metavar="CONTAINER")
    attach.add_argument("--no-stdin", action="store_true", help="only watch")
    forward = command("port-forward", "forward:port_forward", "have ports of this host lead into a pod")
    forward.add_argument("pod", metavar="POD")
    forward.add_argument("ports", metavar="[[ADDRESS:]PORT:]PORT", nargs="+", help="here, and in the pod; 0 here: any")
    inspect = command("inspect", "container:inspect", "all about containers, pods and images, as JSON")
    inspect.add_argument("things", metavar="ID", nargs="+")
    stop = command("stop", "remove:stop", "stop containers or pods")
    stop.add_argument("things", metavar="ID", nargs="+")
    stop.add_argument("-t", "--time", metavar="SECONDS", type=_count, default=10, help="grace before the kill (10)")
    stop.set_defaults(all=False)
    rm = command("rm", "remove:rm", "remove containers or pods")
    rm.add_argument("things", metavar="ID", nargs="*")
    rm.add_argument("-f", "--force", action="store_true", help="even if running")
    rm.add_argument("-a", "--all", action="store_true", help="every pod on the node")
    plan = command("plan", "node:plan", "the steps that a pod or container was built with, and what each cost")
    plan.add_argument("things", metavar="ID", nargs="+")
    net = command(
        "net", "net:show_networks", "networks, and the addresses, host ports and rules that pods have of them"
    )
    parts = net.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    text = "what this host lacks for pods' traffic, and what to do about it"
    part = parts.add_parser("check", help=text, description=text, parents=[_common()], allow_abbrev=False)
    part.set_defaults(handler="net:check")
    command("doctor", "node:doctor", "whether cribd is ready, and what this kernel offers it")
    command("version", "node:version", "versions of crib and cribd")
    return top


def _run(run: argparse.ArgumentParser) -> None:
    run.add_argument("-d", "--detach", action="store_true", help="print its id and don't wait for its end")
    run.add_argument("-i", "--interactive", action="store_true", help="with -d: standard input for crib attach")
    run.add_argument("-t", "--tty", action="store_true", help="with -d: a terminal for crib attach")
    run.add_argument("--rm", action="store_true", help="remove the pod when the container has ended")
    run.add_argument("--name", default="", help="of the pod and the container")
    run.add_argument("--net", choices=("pod", "host"), default="pod", help="its own network, or the host's")
    run.add_argument("-e", "--env", metavar="KEY[=VALUE]", action="append", default=[], help="without a value: yours")
    run.add_argument("-v", "--volume", metavar="SOURCE:TARGET[:ro]", action="append", default=[], help="bind mount")
    run.add_argument(
        "-p", "--publish", metavar="[IP:]PORT:PORT[/udp]", action="append", default=[], help="the host's, the pod's"
    )
    run.add_argument("-u", "--user", metavar="USER[:GID]", default="", help="a number, or a name of the image's")
    run.add_argument("-w", "--workdir", metavar="DIR", default="", help="instead of the image's")
    run.add_argument("-m", "--memory", metavar="SIZE", default="", help="limit, like 512Mi")
    run.add_argument("--cpus", metavar="N", type=float, help="limit, like 0.5")
    run.add_argument("-l", "--label", metavar="KEY=VALUE", action="append", default=[], help="of the pod")
    run.add_argument("--entrypoint", metavar="PROGRAM", default="", help="instead of the image's")
    run.add_argument("--read-only", action="store_true", help="read-only root file system")
    run.add_argument("--privileged", action="store_true", help="all capabilities and devices, nothing hidden")
    run.add_argument(
        "--pull", choices=("missing", "always", "never"), default="missing", help="when to fetch the image"
    )
    run.add_argument("-q", "--quiet", action="store_true", help="no progress of a pull")
    run.add_argument("--cgroup-parent", metavar="PATH", default="", help="instead of cribd's")
    run.add_argument("--log-dir", metavar="DIR", default=os.environ.get("CRIB_LOG_DIR") or LOG_DIR, help="for its log")
    run.add_argument("image", metavar="IMAGE")
    run.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER)


def _since(text: str) -> float:
    """A time as seconds since 1970; a duration is one before now."""
    if text and (match := _DURATION.fullmatch(text)):
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        return time.time() - sum(float(number) * units[unit] for unit, number in match.groupdict("0").items())
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        message = f"{text!r} is no duration like 1h30m and no time like 2026-11-23T10:00:00Z"
        raise argparse.ArgumentTypeError(message) from None
    return found.timestamp()


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)

"""Run critest against a cribd of its own, or a socket, and report spec by spec.

exit status: 0 every spec that ran passed or failed for a known reason; 1 a spec failed; 2 usage;
3 there is no critest on PATH; 4 the run could not be set up, or critest ended without a report.

environment: CRIB_TEST_IMAGES, the storage directory of a registry with the images that critest pulls; without it they
come from where they are published.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console

from e2e import cribd
from e2e.registry import SetupError, serve
from runtime.linux.mount import MS, mount, umount
from runtime.linux.namespaces import CLONE, unshare

NO_CRITEST = 3
NO_SETUP = 4
WEBSOCKET = ("-websocket-exec", "-websocket-attach", "-websocket-portforward")
# Part of a spec's name, and why it fails through no fault of the runtime. Applied only with CRIB_TEST_IMAGES.
KNOWN = {
    "public image with digest should be pulled and removed": "pulls by the digest of the published image, which a "
    "registry with images of one's own making cannot have",
}
_STYLES = {"pass": "green", "fail": "bold red", "known": "yellow", "skip": "dim"}


@dataclass(frozen=True, slots=True)
class Spec:
    """One spec: `state` is pass, fail, known, skip or unselected; `text` says why it failed or was skipped."""

    name: str
    state: str
    seconds: float
    text: str = ""
    where: str = ""


def read_report(report: list[Any], known: dict[str, str]) -> list[Spec]:
    """The specs of ginkgo's JSON report, in its order. A failure named in `known` is given its reason there."""
    specs = []
    for entry in (entry for suite in report for entry in suite["SpecReports"] or ()):
        failure = entry.get("Failure") or {}
        text = failure.get("Message", "")
        if entry["LeafNodeType"] != "It":
            if entry["State"] == "passed":
                continue
            name = entry["LeafNodeType"]
        else:
            groups = (group.removeprefix("[k8s.io] ") for group in entry["ContainerHierarchyTexts"] or ())
            name = " :: ".join((*groups, entry["LeafNodeText"]))
        if entry["State"] == "passed":
            state = "pass"
        elif entry["State"] in ("skipped", "pending"):
            state = "skip" if text else "unselected"
        elif reason := next((reason for part, reason in known.items() if part in name), None):
            state, text = "known", reason
        else:
            state, text = "fail", text or entry["State"]
        location = failure.get("Location") or {}
        where = f"{Path(location['FileName']).name}:{location['LineNumber']}" if location.get("FileName") else ""
        specs.append(Spec(name, state, entry["RunTime"] / 1e9, text.strip(), where))
    return specs


def totals(specs: list[Spec]) -> str:
    count = Counter(spec.state for spec in specs)
    words = f"{count['pass']} passed, {count['fail']} failed, {count['skip']} skipped"
    return f"{words}, {count['known']} failed for known reasons, {count['unselected']} not selected"


def show(specs: list[Spec], console: Console) -> None:
    for spec in specs:
        if spec.state == "unselected":
            continue
        console.print(f"{spec.state:5} {spec.seconds:6.1f} s  {spec.name}", style=_STYLES[spec.state], markup=False)
        if spec.state in ("skip", "known"):
            console.print(f"                 {spec.text.splitlines()[0]}", style="dim", markup=False)
    for spec in specs:
        if spec.state == "fail":
            console.rule(f"{spec.name} ({spec.where})", align="left", style="red")
            console.print(spec.text, markup=False, highlight=False)
    console.rule()
    console.print(totals(specs), markup=False)


def _own_mounts() -> None:
    """Enter a mount namespace whose mounts go with it, however this run ends; / is shared, as systemd makes it."""
    unshare(CLONE.NEWNS)
    for propagation in (MS.SLAVE, MS.SHARED):
        mount("", "/", "", MS.REC | propagation)


@contextlib.contextmanager
def _directory() -> Iterator[str]:
    """A temporary directory that goes with all that is mounted below."""
    with tempfile.TemporaryDirectory(prefix="crib-critest-") as path:
        mount(path, path, "", MS.BIND)
        try:
            yield path
        finally:
            umount(path)  # lazily, and what lies on it too


def _critest(program: str, endpoint: str, extra: list[str], verbose: bool, console: Console) -> list[Any]:
    """Its report. Raises SetupError when it made none."""
    with _directory() as directory:
        report, log = Path(directory, "report.json"), Path(directory, "log")
        command = [program, "-runtime-endpoint", endpoint, "-image-endpoint", endpoint, "-ginkgo.no-color", "-ginkgo.v"]
        with log.open("w") as output, contextlib.ExitStack() as stack:
            process = subprocess.Popen(
                [*command, "-ginkgo.json-report", report, *extra],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | {"TMPDIR": directory},
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            status = stack.enter_context(console.status("critest"))
            assert process.stdout is not None
            done = 0
            for line in process.stdout:
                output.write(line)
                if verbose:
                    console.out(line, end="", highlight=False)
                if line.startswith("• ") and " seconds]" in line:
                    done += 1
                    status.update(f"critest: {done} specs done")
        try:
            found: list[Any] = json.loads(report.read_text())
        except (OSError, ValueError) as error:
            last = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:])
            raise SetupError(f"critest made no report ({error}); its last words:\n{last}") from error
        return found


def _cribd(registry: str | None, options: argparse.Namespace) -> contextlib.AbstractContextManager[cribd.Cribd]:
    return cribd.run(registry, options.log_level, options.daemon_log, options.runtime)


def _run(options: argparse.Namespace, program: str, console: Console) -> int:
    images = os.environ.get("CRIB_TEST_IMAGES")
    with contextlib.ExitStack() as stack:
        endpoint = options.endpoint
        if endpoint is None:
            _own_mounts()
            registry = stack.enter_context(serve(Path(images))) if images else None
            endpoint = stack.enter_context(_cribd(registry, options)).endpoint
        version = cribd.call(endpoint, "Version")
        console.print(f"{version.runtime_name} {version.runtime_version} at {endpoint}", markup=False)
        handler = ("-runtime-handler", cribd.HANDLER) if options.runtime else ()
        extra = [*(WEBSOCKET if options.websocket else ()), *handler, *options.critest]
        report = _critest(program, endpoint, extra, options.verbose, console)
        if options.report:
            options.report.write_text(json.dumps(report))
        if options.endpoint is None:
            for pod in cribd.remove_pods(endpoint):
                console.print(f"left behind by critest, removed: pod {pod}", style="yellow", markup=False)
    specs = read_report(report, KNOWN if images else {})
    show(specs, console)
    return 1 if any(spec.state == "fail" for spec in specs) else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="e2e/critest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- goes to critest: -ginkgo.focus REGEX, -ginkgo.skip REGEX, -parallel N (needs ginkgo).",
    )
    parser.add_argument("--endpoint", metavar="unix:///SOCKET", help="test what listens there instead of a cribd")
    parser.add_argument("--websocket", action="store_true", help="exec, attach, port-forward by it instead of SPDY")
    parser.add_argument("--runtime", metavar="PROGRAM", default="", help="an OCI runtime's, to run the containers by")
    parser.add_argument("--log-level", default="info", help="cribd's (%(default)s)")
    parser.add_argument("--daemon-log", type=Path, metavar="FILE", help="keep cribd's log there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="keep ginkgo's JSON report there")
    parser.add_argument("--verbose", action="store_true", help="show critest's output as it comes")
    parser.add_argument("critest", nargs="*", metavar="-- ARGUMENT", help="passed through")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was made is undone
    console = Console(width=None if sys.stdout.isatty() else 160)
    program = shutil.which("critest")
    if program is None:
        console.print("e2e/critest: no critest on PATH: it is built from kubernetes-sigs/cri-tools; nothing was run")
        return NO_CRITEST
    if os.geteuid() != 0:
        console.print("e2e/critest: needs root: cribd makes namespaces, mounts and cgroups")
        return NO_SETUP
    try:
        return _run(options, program, console)
    except SetupError as error:
        console.print(f"e2e/critest: {error}", style="red", markup=False)
    except grpc.RpcError as error:
        console.print(f"e2e/critest: {error.code().name}: {error.details()}", style="red", markup=False)
    return NO_SETUP


if __name__ == "__main__":
    sys.exit(main())

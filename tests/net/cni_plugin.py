# ruff: noqa: T201
"""A CNI plugin of version 1.1.0 for tests; `type` names copies of it. What it does beside, its configuration says:

`log`: a file that each call is added to, as a line of JSON. `fail`: {"ADD": {...}} prints that error and exits 1.
`say`: {"ADD": "text"} prints the text and exits 0. `result`: what ADD prints (default: prevResult, or one address).
`hang`: a list of commands that never end, with children that try to get away; all pids go to <log>.pid.
`versions`: what it says it speaks.
"""

import json
import os
import subprocess
import sys

ALL = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]


def main() -> int:
    conf = json.load(sys.stdin)
    command = os.environ["CNI_COMMAND"]
    if command == "VERSION":
        print(json.dumps({"cniVersion": "1.1.0", "supportedVersions": versions()}))
        return 0
    if log := conf.get("log"):
        seen = {key: value for key, value in os.environ.items() if key.startswith("CNI_")}
        with open(log, "a") as file:
            file.write(json.dumps({"command": command, "env": seen, "conf": conf}) + "\n")
    if command in conf.get("hang", ()):
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        bare = subprocess.Popen(["sleep", "1000"], start_new_session=True, env={})
        script = "setsid sh -c 'setsid sleep 1000 >/dev/null 2>&1 & echo $!'"  # its parents are gone when it runs
        orphan = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL)
        with open(f"{log}.pid", "w") as file:
            file.write(f"{os.getpid()} {child.pid} {bare.pid} {orphan.stdout.decode()}")
        print("about to hang", file=sys.stderr, flush=True)
        child.wait()
    if said := conf.get("say", {}).get(command):
        print(said * conf.get("times", 1))
        return 0
    if error := conf.get("fail", {}).get(command):
        print("what led to it", file=sys.stderr)
        print(json.dumps({"cniVersion": conf["cniVersion"], **error}))
        return 1
    if command == "ADD":
        default = {"cniVersion": conf["cniVersion"], "ips": [{"address": "192.0.2.7/24", "gateway": "192.0.2.1"}]}
        print(json.dumps(conf.get("result") or conf.get("prevResult") or default))
    return 0


def versions() -> list[str]:
    """Beside the executable, if a test has written it: VERSION gets no configuration."""
    try:
        with open(f"{sys.argv[0]}.versions") as file:
            found: list[str] = json.load(file)
            return found
    except FileNotFoundError:
        return ALL


sys.exit(main())

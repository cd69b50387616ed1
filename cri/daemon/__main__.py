"""cribd: serves the CRI on a unix socket, and runs pods.

The order matters. The zygote starts first, while this process is small. Then the records are taken up, and only then
does the socket answer. SIGTERM ends cribd alone: pods and their monitors keep running.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cri.config import Config, ConfigError, load
from cri.daemon import log
from cri.daemon.directories import prepare
from runtime.cgroup import detect
from runtime.errors import CribError
from runtime.zygote.launch import launch

if TYPE_CHECKING:
    from runtime.cgroup import Cgroups


def main() -> int:
    """Run cribd as the command line says; the exit status."""
    arguments = _parser().parse_args()
    if arguments.version:
        from importlib import metadata

        print(f"cribd {metadata.version('crib')}")
        return 0
    os.umask(0o022)
    try:
        config = load(
            arguments.config,
            listen=arguments.listen,
            root=arguments.root,
            state=arguments.state,
            log_level=arguments.log_level,
        )
    except ConfigError as error:
        print(f"cribd: {error}", file=sys.stderr)
        return 2
    log.setup(config.log_level, config.log_format)
    if os.geteuid() != 0:
        print("cribd: needs to be root", file=sys.stderr)
        return 1
    locks: tuple[int, ...] = ()
    try:
        locks = prepare(config)
        return _run(config, detect(driver=config.cgroup.driver))
    except (CribError, OSError) as error:
        print(f"cribd: {error}", file=sys.stderr)
        return 1
    finally:
        for lock in locks:
            os.close(lock)


def _run(config: Config, cgroups: Cgroups) -> int:
    """Serve, with the zygote and the monitors in a cgroup of their own: their memory is crib's and no pod's."""
    own = cgroups.join_path(config.cgroup.parent or cgroups.default_parent(config.instance), "monitors")
    # It exists, with monitors in it, when cribd is started again.
    made = () if cgroups.exists(own) else cgroups.create(own, None)
    status = 1
    try:
        zygote = launch(cgroups.join_files(own))
        try:
            from cri.daemon.serve import serve  # gRPC and all: after the zygote

            status = serve(config, cgroups, zygote)
        finally:
            zygote.close()
        return status
    finally:
        if status and cgroups.remove(own):  # it came to nothing
            for path in reversed(made):
                cgroups.remove(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cribd", description="A Kubernetes container runtime for a Linux node.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration, TOML")
    parser.add_argument("--listen", metavar="URL", help="socket of the API (unix:///run/crib/crib.sock)")
    parser.add_argument("--root", metavar="DIR", help="what outlives a reboot: images, records (/var/lib/crib)")
    parser.add_argument("--state", metavar="DIR", help="what doesn't: sockets, files of pods (/run/crib)")
    parser.add_argument("--log-level", choices=log.LEVELS, help="least severe messages to log (info)")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser


if __name__ == "__main__":
    sys.exit(main())

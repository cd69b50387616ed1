"""`crib`: parses the command line, does it, and turns what went wrong into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from argparse import Namespace

from cri.cli import failure
from cri.cli.arguments import parser
from cri.cli.failure import Failure, Interrupted


def main() -> int:
    """The exit code; see crib --help."""
    try:
        code = _main(sys.argv[1:])
        sys.stdout.flush()
    except Failure as failed:
        failure.report(failed)
        return failed.code
    except BrokenPipeError:
        # Whoever read this has seen enough. Nothing more may be written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Interrupted as interrupted:
        return 128 + interrupted.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


def _main(arguments: list[str]) -> int:
    parsing = parser()
    options = parsing.parse_args(arguments)
    if options.version:
        from importlib.metadata import version

        print(f"crib {version('crib')}")
        return 0
    if options.handler is None:
        parsing.print_help(sys.stderr)
        return failure.USAGE
    return _handle(options)


def _handle(options: Namespace) -> int:
    """Loads what this command needs, and only that: start-up is what one waits for most."""
    from cri.cli.client import Client

    if getattr(options, "command", [])[:1] == ["--"]:
        del options.command[0]
    module, _, function = options.handler.partition(":")
    handler = getattr(importlib.import_module(f"cri.cli.{module}"), function)
    client = Client(options.endpoint)
    try:
        code: int = handler(client, options)
    except UnicodeEncodeError as error:  # a word of the command line, as a rule
        raise Failure(f"{error.object!r} can't be told in {error.encoding}", failure.USAGE) from error
    finally:
        client.close()
    return code


if __name__ == "__main__":
    raise SystemExit(main())

r"""``partpar``: the command line.

Exit codes of every command: 0, done; 1, it failed, with the reason on standard error; 2, the command line is
wrong; 130, it was stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from partpar.cli import convert, copy, demo, doctor, inspect, launch, partition, report, verify
from partpar.errors import PartparError

EXIT_CODES = (
    "exit codes: 0 done, 1 failed (the reason is on standard error), 2 wrong command line, 130 stopped by Ctrl-C"
)


def make_parser() -> argparse.ArgumentParser:
    r"""The parser of all commands. Each command is a file with ``add_arguments(parser)`` and
    ``run(args)``."""
    parser = argparse.ArgumentParser(
        prog="partpar",
        description="Cut graphs into shares, look at the cut, and train on it.",
        epilog=f"example: partpar demo\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (partition, inspect, verify, convert, copy, launch, report, doctor, demo):
        name = command.__name__.rpartition(".")[2]
        below = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            epilog=f"example: {command.EXAMPLE}\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(below)
        below.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    r"""Runs a command.

    Args:
        argv: Its words, without ``partpar`` itself; by default those of this process.

    Returns:
        The exit code. A wrong command line raises :class:`SystemExit` with 2, as :mod:`argparse` does.
    """
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args, Console()))
    except (PartparError, OSError) as error:
        print(f"partpar: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("partpar: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

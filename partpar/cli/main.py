r"""``partpar``: the command line.

Exit codes of every command: 0, done; 1, it failed, with the reason on standard error; 2, the command line is
wrong; 130, it was stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from partpar.errors import PartparError

# Told here, so that the list of commands is printed without importing any of them, and torch with it.
COMMANDS = {
    "partition": "Cut a graph into shares, one for each worker, and report the quality of the cut.",
    "inspect": "Print the quality report of partitions that stand on disk.",
    "verify": "Read all of a partition and say whether it is whole: checksums, bounds, every node and every edge once.",
    "convert": "Turn a partition of torch_geometric.distributed or of DGL into one of partpar, with the same cut.",
    "copy": "Bring each host its shares of a partition and the manifest, by rsync or scp over ssh.",
    "launch": "Start a training script on all hosts by torchrun over ssh, and end it on all when it ends on one.",
    "report": "Draw a training's log as one HTML page: learning curves, time per phase and rank, traffic between ranks.",
    "doctor": "Check versions, backends, network, limits and memory, and that ranks reach each other.",
    "demo": "Train on a generated graph by one process, then by several workers, and compare their losses.",
}
EXIT_CODES = (
    "exit codes: 0 done, 1 failed (the reason is on standard error), 2 wrong command line, 130 stopped by Ctrl-C"
)


def make_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    r"""The parser of all commands. Each command is a file with ``EXAMPLE``, ``add_arguments(parser)`` and
    ``run(args, console)``.

    Args:
        chosen: The command whose options are needed: the only one that is imported.
    """
    parser = argparse.ArgumentParser(
        prog="partpar",
        description="Cut graphs into shares, look at the cut, and train on it.",
        epilog=f"example: partpar demo\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, text in COMMANDS.items():
        below = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            command = import_module(f"partpar.cli.{name}")
            below.epilog = f"example: {command.EXAMPLE}\n{EXIT_CODES}"
            command.add_arguments(below)
            below.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    r"""Runs a command.

    Args:
        argv: Its words, without ``partpar`` itself; by default those of this process.

    Returns:
        The exit code. A wrong command line raises :class:`SystemExit` with 2, as :mod:`argparse` does; none prints the
        list of commands on standard error and does the same.
    """
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser(next((word for word in words if not word.startswith("-")), None))
    args = parser.parse_args(words)
    if args.version:
        from importlib.metadata import version

        print("partpar", version("partpar"))
        return 0
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        parser.exit(2, "\npartpar: expected a command, found none\n")
    from rich.console import Console

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

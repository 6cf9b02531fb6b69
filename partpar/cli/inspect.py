r"""``partpar inspect``: what a partition on disk is and what training on it costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from partpar.cli.cost import add_cost_arguments, cost_of
from partpar.cli.output import add_json_argument, tables_wanted, write_json
from partpar.cli.quality import check_plot, print_report, record_of
from partpar.errors import MissingPartitionError
from partpar.partition import Manifest, read_manifest

EXAMPLE = "partpar inspect partitions/cora/metis_4 --plot cora.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    parser.add_argument("folder", type=Path, help="a partition such as ROOT/metis_4, or ROOT for all in it")
    add_json_argument(parser, "the reports")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw balance and traffic of one (needs matplotlib)"
    )
    add_cost_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Prints the report of every partition found."""
    found = find_partitions(args.folder)
    if args.plot is not None and len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise MissingPartitionError(
            f"{args.folder}: expected one partition to plot, found {names}; name one of them"
        )
    check_plot(args.plot)
    records = []
    for folder, manifest in found.items():
        table, cost = cost_of(manifest, args) if args.predict else (None, {})
        records.append(record_of(folder, manifest) | ({"prediction": cost} if args.predict else {}))
        print_report(console, folder, manifest, args.plot, quiet=not tables_wanted(args.json))
        if table is not None and tables_wanted(args.json):
            console.print(table)
    write_json(args.json, records)
    return 0


def find_partitions(folder: Path) -> dict[Path, Manifest]:
    r"""The partition that stands in a folder, or all of those one level below.

    Raises:
        MissingPartitionError: If there is none.
    """
    if (folder / "manifest.json").is_file():
        return {folder: read_manifest(folder)}
    found = sorted(path.parent for path in folder.glob("[!.]*/manifest.json"))
    if not found:
        raise MissingPartitionError(
            f"{folder}: expected a partition or a folder of some, found no manifest.json"
        )
    return {path: read_manifest(path) for path in found}

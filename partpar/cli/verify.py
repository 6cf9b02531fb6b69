r"""``partpar verify``: whether partitions on disk are whole."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from partpar.cli.inspect import find_partitions
from partpar.cli.output import add_json_argument, tables_wanted, write_json
from partpar.partition.verify import verify_partition

EXAMPLE = "partpar verify partitions/cora/metis_4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    parser.add_argument("folder", type=Path, help="a partition such as ROOT/metis_4, or ROOT for all in it")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="do not put the graph together again to compare its digest, which takes the memory of all of it",
    )
    add_json_argument(parser, "checks and findings")


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Verifies every partition found; 1 if one is damaged."""
    records = []
    for folder in find_partitions(args.folder):
        found = verify_partition(folder, contents=not args.quick)
        findings = [{"file": f.file, "what": f.what} for f in found.findings]
        records.append({"folder": str(folder), "whole": found.whole, "checks": found.checks, "findings": findings})
        if tables_wanted(args.json):
            table = Table("check", "result", title=str(folder))
            for check, passed in found.checks.items():
                table.add_row(check, "[green]yes[/green]" if passed else "[red]no[/red]")
            console.print(table)
        for finding in found.findings:
            print(f"partpar: {folder / finding.file}: {finding.what}", file=sys.stderr)
    write_json(args.json, records)
    return 0 if all(record["whole"] for record in records) else 1

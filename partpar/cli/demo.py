r"""``partpar demo``: one process and several workers train on the same graph and reach the same loss."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from partpar.cli.output import add_json_argument, tables_wanted, write_json
from partpar.cli.workers import run_workers

EXAMPLE = "partpar demo --workers 2"
TOLERANCE = 1e-9
_STDERR = 2  # its file descriptor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="workers of the second run (default: 2)"
    )
    parser.add_argument(
        "--nodes", type=int, default=2000, metavar="N", help="nodes of the graph (default: 2000)"
    )
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="epochs (default: 30)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds for each run (default: 300)"
    )
    add_json_argument(parser, "the losses of each epoch, by number of workers, and their difference")


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Trains twice and compares; 1 if the losses differ or a run fails."""
    runs: dict[int, list[dict[str, float]]] = {}
    # Where standard output is JSON, all that is for people goes beside it.
    alone = not tables_wanted(args.json)
    people = Console(stderr=True) if alone else console
    with tempfile.TemporaryDirectory(prefix="partpar-demo-") as folder:
        for workers in dict.fromkeys((1, args.workers)):
            people.print(
                f"[bold]{workers} worker(s)[/bold], planted graph of {args.nodes} nodes, {args.epochs} epochs"
            )
            words = [folder, str(args.nodes), str(args.epochs)]
            run_workers(
                "partpar.cli.demo_worker", workers, words, args.timeout, stdout=_STDERR if alone else None
            )
            lines = Path(folder, f"{workers}.jsonl").read_text().splitlines()
            runs[workers] = [json.loads(line) for line in lines]
    table = Table("epoch", *(f"loss, {workers} worker(s)" for workers in runs), "difference")
    worst, records = 0.0, []
    for epochs in zip(*runs.values(), strict=True):
        losses = [epoch["loss"] for epoch in epochs]
        gap = max(losses) - min(losses)
        worst = max(worst, gap / max(1.0, abs(losses[0])))
        number = int(epochs[0]["epoch"])
        by_workers = dict(zip(map(str, runs), losses, strict=True))
        records.append({"epoch": number, "loss": by_workers, "difference": gap})
        if number in (1, args.epochs) or number % 10 == 0:
            table.add_row(str(number), *(f"{loss:.12f}" for loss in losses), f"{gap:.1e}")
    write_json(args.json, records)
    people.print("times above are no benchmark: a small graph, on a machine that may be busy; see docs/performance.rst")
    people.print(table)
    if worst > TOLERANCE:
        people.print(f"[red]the losses differ by up to {worst:.1e}, more than {TOLERANCE:.0e}[/red]")
        return 1
    people.print(f"the same loss in every epoch: the largest difference is {worst:.1e}", highlight=False)
    return 0

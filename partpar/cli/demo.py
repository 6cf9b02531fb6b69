r"""``partpar demo``: one process and several workers train on the same graph and reach the same loss."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from partpar.cli.workers import run_workers

HELP = "Train on a generated graph by one process, then by several workers, and compare their losses."
EXAMPLE = "partpar demo --workers 2"
TOLERANCE = 1e-9


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


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Trains twice and compares; 1 if the losses differ or a run fails."""
    runs: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="partpar-demo-") as folder:
        for workers in dict.fromkeys((1, args.workers)):
            console.print(
                f"[bold]{workers} worker(s)[/bold], planted graph of {args.nodes} nodes, {args.epochs} epochs"
            )
            words = [folder, str(args.nodes), str(args.epochs)]
            run_workers("partpar.cli.demo_worker", workers, words, args.timeout)
            lines = Path(folder, f"{workers}.jsonl").read_text().splitlines()
            runs[workers] = [json.loads(line) for line in lines]
    table = Table("epoch", *(f"loss, {workers} worker(s)" for workers in runs), "difference")
    worst = 0.0
    for epochs in zip(*runs.values(), strict=True):
        losses = [epoch["loss"] for epoch in epochs]
        gap = max(losses) - min(losses)
        worst = max(worst, gap / max(1.0, abs(losses[0])))
        number = int(epochs[0]["epoch"])
        if number in (1, args.epochs) or number % 10 == 0:
            table.add_row(str(number), *(f"{loss:.12f}" for loss in losses), f"{gap:.1e}")
    console.print(table)
    if worst > TOLERANCE:
        console.print(f"[red]the losses differ by up to {worst:.1e}, more than {TOLERANCE:.0e}[/red]")
        return 1
    console.print(f"the same loss in every epoch: the largest difference is {worst:.1e}", highlight=False)
    return 0

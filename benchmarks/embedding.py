r"""How many rows a second are looked up, given gradients and updated, on a table that no worker holds whole.

.. code-block:: bash

    python benchmarks/embedding.py --json embedding.json

Each worker looks up random ids, half of which another worker keeps, runs a backward pass and takes a step of Adagrad
and of Adam. A step's time is that of the slower worker, the figure the median over steps, over rounds that take turns.
Beside it the bound of memory: fetching as many rows of a plain table of one's own and adding to them, without
optimiser, exchange or duplicates to find. Peak memory is a worker's whole process, above 1.3 times its rows with the
optimiser's state. The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.launch import launch

OPTIMISERS = ("adagrad", "adam")
TARGET_ROWS, TARGET_MIB = 1.4e6, 300.0


def summarise(rounds: list[list[dict[str, Any]]], case: dict[str, Any]) -> dict[str, Any]:
    r"""Rates over all workers, and memory of the largest."""
    told: dict[str, Any] = {}
    rows = case["ranks"] * case["batch"]
    over = []
    for name in case["optimisers"]:
        steps = [max(pair) for ranks in rounds for pair in zip(*(r[name]["seconds"] for r in ranks), strict=True)]
        told[f"{name}_step_ms"] = 1e3 * statistics.median(steps)
        told[f"{name}_rows_per_s"] = rows / statistics.median(steps)
        told[f"{name}_exchange_ms"] = 1e3 * statistics.median(
            max(r[name]["exchange_seconds"] for r in ranks) for ranks in rounds
        )
        told[f"{name}_sent_mb_per_step"] = sum(r[name]["bytes_sent"] for r in rounds[0]) / 1e6
        told[f"{name}_peak_mib"] = max(r[name]["peak"] for ranks in rounds for r in ranks) / 2**20
        kept = rounds[0][0][name]["kept"] / 2**20
        over.append(told[f"{name}_peak_mib"] - 1.3 * kept)
    bound = statistics.median(max(r["local"]["seconds"] for r in ranks) for ranks in rounds)
    return told | {"local_bound_rows_per_s": rows / bound, "peak_mib_over_shard": max(over)}


def parse() -> argparse.Namespace:
    r"""The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--batch", type=int, default=10_000, help="random ids for each worker and step")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm", type=int, default=20, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    return parser.parse_args()


def main() -> None:
    r"""Runs the benchmark; a process of its own for each optimiser, whose peak memory is its own."""
    args = parse()
    console = Console(stderr=True, width=130)
    case = {key: value for key, value in vars(args).items() if key not in ("json", "rounds")}
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(args.rounds):
        merged: list[dict[str, Any]] = [{} for _ in range(args.ranks)]
        for name in OPTIMISERS:
            found = launch("embedding_worker.py", case | {"optimisers": [name]}, args.ranks, args.threads)
            for into, one in zip(merged, found, strict=True):
                into.update(one)
        rounds.append(merged)
    told = summarise(rounds, case | {"optimisers": OPTIMISERS}) | {"case": case}

    table = Table("optimiser", "step ms", "in exchange ms", "sent MB", "rows/s", "of the local bound", "peak MiB")
    for name in OPTIMISERS:
        share = told[f"{name}_rows_per_s"] / told["local_bound_rows_per_s"]
        cells = (told[f"{name}_{key}"] for key in ("step_ms", "exchange_ms", "sent_mb_per_step"))
        table.add_row(
            name, *(f"{cell:.2f}" for cell in cells), f"{told[f'{name}_rows_per_s']:,.0f}", f"{share:.2f}",
            f"{told[f'{name}_peak_mib']:.0f}",
        )  # fmt: skip
    table.add_row("local bound", "", "", "", f"{told['local_bound_rows_per_s']:,.0f}", "1", "")
    console.print(table)
    for name in OPTIMISERS:
        held = told[f"{name}_rows_per_s"] >= TARGET_ROWS
        console.print(
            f"{'PASS' if held else 'FAIL'}  {name}: at least {TARGET_ROWS:,.0f} rows/s: {told[f'{name}_rows_per_s']:,.0f}"
        )
    held = told["peak_mib_over_shard"] <= TARGET_MIB
    console.print(
        f"{'PASS' if held else 'FAIL'}  peak memory at most {TARGET_MIB:.0f} MiB above 1.3 times rows and state: "
        f"{told['peak_mib_over_shard']:.0f}"
    )
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()

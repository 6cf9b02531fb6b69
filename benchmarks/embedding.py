r"""How many rows a second are looked up, given gradients and updated, on a table that no worker holds whole.

.. code-block:: bash

    python benchmarks/embedding.py --json embedding.json --rst docs/sharded_speed.rst

Each worker looks up random ids, half of which another worker keeps, runs a backward pass and takes a step of Adagrad
and of Adam. A step's time is that of the slower worker, the figure the median over steps, over rounds that take turns.
Beside it the bound of memory: fetching as many rows of a plain table of one's own and adding to them, without
optimiser, exchange or duplicates to find. Peak memory is a worker's whole process, of which importing torch takes some
220 MiB; nothing is compiled. Workers keep freed blocks, as ``partpar.init`` sets it. The last line printed is a JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support.contest import list_table
from support.launch import launch

OPTIMISERS = ("adagrad", "adam")
TARGET_ROWS, TARGET_MIB = 1.4e6, 286.0  # MiB: 300 MB
HEADER = (
    "optimiser", "step ms", "in exchange ms", "sent MB", "rows/s", "of the local bound", "rows and state MiB", "peak MiB",
)  # fmt: skip


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
        told[f"{name}_kept_mib"] = rounds[0][0][name]["kept"] / 2**20
        over.append(told[f"{name}_peak_mib"] - 1.3 * told[f"{name}_kept_mib"])
    bound = statistics.median(max(r["local"]["seconds"] for r in ranks) for ranks in rounds)
    return told | {"local_bound_rows_per_s": rows / bound, "peak_mib_over_shard": max(over)}


def table_rows(told: dict[str, Any]) -> list[list[str]]:
    r"""A line for each optimiser and one for the bound, cells as in :data:`HEADER`."""
    bound = told["local_bound_rows_per_s"]
    rows = [
        [
            name, *(f"{told[f'{name}_{key}']:.2f}" for key in ("step_ms", "exchange_ms", "sent_mb_per_step")),
            f"{told[f'{name}_rows_per_s']:,.0f}", f"{told[f'{name}_rows_per_s'] / bound:.2f}",
            f"{told[f'{name}_kept_mib']:.0f}", f"{told[f'{name}_peak_mib']:.0f}",
        ]
        for name in OPTIMISERS
    ]  # fmt: skip
    return [*rows, ["local bound", "", "", "", f"{bound:,.0f}", "1", "", ""]]


def claims(told: dict[str, Any]) -> list[tuple[str, bool, float]]:
    r"""What is asked for, whether it holds, and what was found."""
    rates = [(name, told[f"{name}_rows_per_s"]) for name in OPTIMISERS]
    over = told["peak_mib_over_shard"]
    return [
        *((f"{name.capitalize()}: at least {TARGET_ROWS:,.0f} rows/s", rate >= TARGET_ROWS, rate) for name, rate in rates),
        (f"Peak memory at most {TARGET_MIB:.0f} MiB above 1.3 times rows and state", over <= TARGET_MIB, over),
    ]


def rst(told: dict[str, Any], case: dict[str, Any]) -> str:
    r"""The page of the documentation."""
    lines = [
        "Steps of learned rows", "=====================", "",
        f"Written by ``benchmarks/embedding.py`` on {os.cpu_count()} cores, torch {torch.__version__}: {case['rows']:,} rows of",
        f"{case['columns']} float32 on {case['ranks']} workers, {case['batch']:,} random ids for each worker and step.", "",
        *(__doc__ or "").split("\n\n")[3].rsplit(" The last", 1)[0].splitlines(), "",
        *(f"- {claim}: {'yes' if holds else 'no'}, {found:,.0f}." for claim, holds, found in claims(told)),
        "", *list_table("", [HEADER, *table_rows(told)]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--rst", type=Path, help="write the page of the documentation")
    return parser.parse_args()


def main() -> None:
    r"""Runs the benchmark; a process of its own for each optimiser, whose peak memory is its own."""
    args = parse()
    console = Console(stderr=True, width=130)
    case = {key: value for key, value in vars(args).items() if key not in ("json", "rst", "rounds")}
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(args.rounds):
        merged: list[dict[str, Any]] = [{} for _ in range(args.ranks)]
        for name in OPTIMISERS:
            found = launch("embedding_worker.py", case | {"optimisers": [name]}, args.ranks, args.threads)
            for into, one in zip(merged, found, strict=True):
                into.update(one)
        rounds.append(merged)
    told = summarise(rounds, case | {"optimisers": OPTIMISERS}) | {"case": case}

    table = Table(*HEADER)
    for row in table_rows(told):
        table.add_row(*row)
    console.print(table)
    for claim, holds, found in claims(told):
        console.print(f"{'PASS' if holds else 'FAIL'}  {claim}: {found:,.0f}", highlight=False)
    if args.rst:
        args.rst.write_text(rst(told, case))
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
